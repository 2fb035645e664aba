"""Which part of the samples this process does: array jobs and `jax.distributed`.

Every process takes a residue class of the samples and writes its own files; there is no
communication while it works.
"""

import contextlib
import itertools

import jax

from gse_jax.evaluation.store import writer_name

# A process that is done waits for the others before it leaves: with JAX's default of five minutes
# the end of the fastest would be the end of all.
_LONGEST_SECONDS = 7 * 24 * 3600
_BARRIERS = itertools.count()  # their names; one is used once


def parse_shard(text: str) -> tuple[int, int]:
    """Read "I/N".

    Args:
        text: e.g. "0/3", counted from 0 like SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX.

    Returns:
        (i, n).

    Raises:
        ValueError: unless 0 <= I < N.
    """
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"shard must be I/N, e.g. 0/3, got {text!r}") from None
    return check_shard((index, count))


def check_shard(shard) -> tuple[int, int]:
    """Refuse an impossible shard.

    Args:
        shard: (i, n).

    Returns:
        (i, n).

    Raises:
        ValueError: unless 0 <= i < n.
    """
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise ValueError(f"shard must be a pair (i, n), e.g. (0, 3), got {shard!r}")
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be I/N with 0 <= I < N (counted from 0), got "
                         f"{index}/{count}")
    return int(index), int(count)


def combined_residue(shard: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
    """Return the samples of this process and the name it writes under.

    Args:
        shard: (i, n) or None.

    Returns:
        ((i, n), name): samples i, i + n, ...; processes of `jax.distributed` divide a shard.
    """
    index, count = check_shard(shard or (0, 1))
    process, processes = jax.process_index(), jax.process_count()
    name = writer_name((index, count))
    if processes > 1:
        part = writer_name((process, processes), "process")
        name = part if count == 1 else f"{name}-{part}"
    return (index + count * process, count * processes), name


def start_distributed() -> None:
    """Join the other processes, unless the caller has done so.

    Raises:
        ValueError: if JAX finds no cluster, or its backend has already started.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=_LONGEST_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"engine='distributed': {reason}; on a cluster that JAX does not recognise call "
            "jax.distributed.initialize(coordinator_address=..., num_processes=..., "
            "process_id=...) before anything else, or use shard=(i, n)") from None


def wait_for_others() -> None:
    """Wait, as a process of `jax.distributed` that is done, until all are.

    JAX hands `shutdown_timeout_seconds` to the service alone: a process that leaves gives up after five minutes
    and takes the others with it.
    """
    from jax._src import distributed  # there is no public barrier that needs no devices

    client = distributed.global_state.client
    if client is not None:
        # Where another process failed there is nobody to wait for; this one has stored its work.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier(f"gse_jax: done {next(_BARRIERS)}", _LONGEST_SECONDS * 1000)
