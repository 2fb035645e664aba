"""`python -m gse_jax.cli` is `gse-jax`."""

import sys

from gse_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
