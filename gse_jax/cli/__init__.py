"""The command line: arguments -> the functions of the other rooms. No logic of its own."""

from gse_jax.cli.main import main

__all__ = ["main"]
