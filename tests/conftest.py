"""Strict JAX for every test, on four CPU devices."""

import os
import tempfile
from pathlib import Path

import pytest

# The processes that tests start compile many of the same programs: they share them in a folder. A limit on
# its size, not otherwise needed, has JAX lock it. In this process looking there costs more than it saves.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="gse_jax_tests_", ignore_cleanup_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _CACHE.name, "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

import jax  # noqa: E402, reads them

# Most of the time goes into compiling small programs once: less optimisation halves it, and changes no
# more than rounding. XLA refuses unknown flags, and newer versions have one kind of emitters only. Other
# processes keep the other cores busy: splitting a program between threads only costs.
_LESS = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    _LESS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_LESS} {os.environ.get('XLA_FLAGS', '')}"  # the user's own come last, and win

jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

SHARED = Path(os.environ.get("GSE_JAX_SHARED",
                             Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared():
    """Folder with real images and weights; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared real data is not on this machine (set GSE_JAX_SHARED)")
    return SHARED
