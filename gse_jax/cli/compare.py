"""`gse-jax compare`: the paper's table for many attacks on the same images."""

import contextlib
from pathlib import Path

from gse_jax.cli import options


def add_commands(commands) -> None:
    """Add `compare` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    compare = commands.add_parser("compare", help="the paper's table for many attacks")
    compare.add_argument("--data", required=True, help=options.DATA)
    options.add_model(compare, required=True)
    compare.add_argument("--methods", default="all", metavar="all|LIST",
                         help="names with commas between (default all)")
    compare.add_argument("--offsets", help="targeted at label + 1, + 3, ... as 1,3; default "
                                           "untargeted")
    compare.add_argument("--preset", default="gse_paper",
                         help="gse_paper (default: settings of the paper's comparison) or original")
    compare.add_argument("--limit", type=int, help="take the first N images only")
    compare.add_argument("--lanes", type=int, help="images worked on at a time")
    compare.add_argument("--seed", type=int, default=0, help="for attacks with randomness")
    compare.add_argument("--out", default="gse-compare", help="folder (default gse-compare)")
    compare.set_defaults(run=_compare)


def _compare(args):
    from gse_jax import data, models, report
    from gse_jax.attacks import METHODS
    from gse_jax.evaluation import compare, display, save_run

    options.require_positive("--limit", args.limit)
    methods = list(METHODS) if args.methods == "all" else args.methods.split(",")
    images = data.load(args.data, limit=args.limit)
    apply_fn, params = models.load(args.model, weights=args.weights,
                                   normalize=options.normalization(args.normalize))
    offsets = options.integers("--offsets", args.offsets) if args.offsets else ()
    folder, rows = Path(args.out), []
    with contextlib.ExitStack() as stack:
        def progress(method):
            stack.close()  # the display of the attack before
            print(f"{method} ...", flush=True)
            return stack.enter_context(display(interval=10.0))

        for one in compare(params, apply_fn, images.images, images.labels, methods=methods,
                           offsets=offsets, domain=args.preset, key=args.seed, lanes=args.lanes,
                           num_classes=apply_fn.config.num_classes, progress=progress):
            rows += one.rows
            for offset, run in zip(offsets or ("untargeted",), one.runs):
                save_run(run, folder / one.method / str(offset) / "adversarials.npz")
            # After each attack: a later failure must not take the table with it.
            written = report.write_table(rows, folder / "table", left=2 if offsets else 1)
    print(written[1].read_text(encoding="utf-8"))
    print("seconds per image include compilation")
    print("written: " + ", ".join(map(str, written)))
