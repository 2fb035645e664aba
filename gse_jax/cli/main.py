"""The `gse-jax` command: one parser, one module for each group of commands."""

import argparse
import contextlib
import os
import signal
import sys

from gse_jax.cli import attack, compare, evaluate, explain, prepare


def main(argv=None) -> int:
    """Run `gse-jax`.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        Exit code: 0 done, 2 wrong input (one line on stderr) or a success that `verify` does not confirm, 75
        stopped by a signal with everything finished stored, 130 interrupted, 141 nobody reads the output.
    """
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal or file that cannot write every sign
        sys.stdout.reconfigure(errors="replace")
    from gse_jax.devices import is_out_of_memory, use_all_cpu_cores, use_compilation_cache
    from gse_jax.evaluation.durable import reason
    from gse_jax.evaluation.progress import say
    from gse_jax.types import StoreError

    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # JAX already runs, e.g. in a notebook: fewer devices
            use_all_cpu_cores()
    if args.compilation_cache:
        use_compilation_cache(args.compilation_cache)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError as error:  # nobody reads any more, as behind `| head`: all files are written
        say(f"gse-jax: the output was not read to its end ({error})")
        sys.stdout = open(os.devnull, "w")  # what is still in the buffer would fail at the end
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, ImportError, StoreError) as error:
        say(f"gse-jax: {reason(error) if isinstance(error, OSError) else error}")
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"gse-jax: {str(error).splitlines()[0]}; use fewer --lanes, or `gse-jax evaluate`, which finds "
            "out by itself how many fit")
        return 2
    except SystemExit as stop:
        from gse_jax.evaluation import Preempted

        if not isinstance(stop, Preempted):
            raise
        say(f"gse-jax: {stop}")
        return stop.code
    except KeyboardInterrupt:
        say("gse-jax: interrupted")
        if argv is None:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(130)  # the end of Python in the middle of a compilation may crash
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="gse-jax", description="Group-wise sparse, explainable adversarial attacks in JAX.")
    parser.add_argument("--compilation-cache", metavar="FOLDER",
                        help="keep compiled programs there, for the next call to start at once; a "
                             "folder of yours alone (off by default)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (attack, explain, compare, evaluate, prepare):
        module.add_commands(commands)
    return parser
