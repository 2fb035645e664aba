"""How JAX is set up: one XLA device per CPU core, and a cache of compiled programs.

XLA:CPU spreads one convolution badly over cores. With one device per core each device works on its
own lanes. The number of CPU devices can only be set before JAX's backend starts.
"""

import logging
import os
from pathlib import Path

import jax

_LOGGER = logging.getLogger("gse_jax")
_hinted = False


def use_all_cpu_cores() -> int:
    """Give JAX one CPU device per core; call it before anything else touches JAX's devices.

    Returns:
        Number of CPU devices asked for.

    Raises:
        RuntimeError: if JAX's backend has already started.
    """
    cores = _num_cores()
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError as error:
        raise RuntimeError("use_all_cpu_cores() must be called before JAX is first used: put it "
                           "right after the imports") from error
    return cores


def local_devices() -> list[jax.Device]:
    """Return where attacks run: on all devices of this process, or on JAX's default device if one is set."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()
    return jax.local_devices(backend=chosen) if isinstance(chosen, str) else [chosen]


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": of `local_devices`."""
    return local_devices()[0].platform


def _num_cores() -> int:
    """How many cores this process may use; a container's quota counts, which the system's own numbers leave out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return cores
    return max(1, min(cores, quota // period))


_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_compilation_cache(folder) -> None:
    """Keep compiled programs in a folder, so that the next process need not compile them again.

    Off unless asked for: who can write to the folder can make your processes run their code, so it
    must be yours alone.

    Args:
        folder: path; made if absent.
    """
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    compilation_cache.reset_cache()  # else JAX stays with a folder that it has used already
    # JAX keeps only what took a second; an attack also compiles many small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def hint_at_idle_cores(devices) -> None:
    """Tell a CPU user once how to use all cores.

    Args:
        devices: the devices an attack is about to use.
    """
    global _hinted
    cores = _num_cores()
    one_wished = jax.config.jax_default_device is not None
    if _hinted or one_wished or cores == 1 or len(devices) > 1 or devices[0].platform != "cpu":
        return
    _hinted = True
    _LOGGER.warning("gse_jax runs on one CPU device of a machine with %d cores; "
                    "gse_jax.use_all_cpu_cores() before the first use of JAX is up to twice as "
                    "fast", cores)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the device ran out of memory.

    Args:
        error: what JAX raised.

    Returns:
        True for RESOURCE_EXHAUSTED.
    """
    return "RESOURCE_EXHAUSTED" in str(error)
