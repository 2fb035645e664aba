"""`gse-jax compare` and `gse-jax pareto`: many attacks on the same images, as table and as front."""

import contextlib

from gse_jax.cli import options, output


def add_commands(commands) -> None:
    """Add `compare` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    compare = commands.add_parser("compare", help="the paper's table for many attacks")
    _add_common(compare, out="gse-compare")
    compare.add_argument("--offsets", help="targeted at label + 1, + 3, ... as 1,3; default "
                                           "untargeted")
    compare.add_argument("--preset", default="gse_paper", choices=("gse_paper", "original"),
                         help="settings of the paper's comparison at the image size (default), or of "
                              "each attack's authors")
    compare.set_defaults(run=_compare)
    front = commands.add_parser("pareto", help="sparsity against the l2 norm: gse_refined under "
                                               "several caps, other attacks as points")
    _add_common(front, out="gse-pareto")
    front.add_argument("--targets", metavar="next|FILE",
                       help="targeted at label + 1, or at the classes in a file, one a line")
    front.add_argument("--max-l2", default="inf,3,2,1.5,1,0.75,0.5", metavar="LIST",
                       help="caps of gse_refined, images of range width 2 (default %(default)s)")
    front.set_defaults(run=_pareto)


def _add_common(parser, *, out):
    options.add_job(parser, out=out)
    parser.add_argument("--methods", default="all", metavar="all|LIST",
                        help="names with commas between (default all)")


@contextlib.contextmanager
def _displays():
    """Yield a function from the name of the attack that begins to its `progress`."""
    from gse_jax.evaluation import display
    from gse_jax.evaluation.progress import say

    with contextlib.ExitStack() as stack:
        def progress(method):
            stack.close()  # the display of the attack before
            say(f"{method} ...")
            return stack.enter_context(display(interval=10.0))

        yield progress


def _compare(args):
    from gse_jax import report
    from gse_jax.attacks import METHODS
    from gse_jax.evaluation import compare, save_run
    from gse_jax.evaluation.comparison import configurations_of

    methods = list(METHODS) if args.methods == "all" else args.methods.split(",")
    images, apply_fn, params, about = options.load_job(args)
    offsets = options.integers("--offsets", args.offsets) if args.offsets is not None else ()
    configurations_of(methods, args.preset, images.images.shape[1:], bool(offsets))  # or say what is wrong
    folder, rows = output.folder(args.out), []
    with _displays() as progress:
        for one in compare(params, apply_fn, images.images, images.labels, methods=methods,
                           offsets=offsets, domain=args.preset, key=args.seed, lanes=args.lanes,
                           num_classes=apply_fn.config.num_classes, ids=images.ids, about=about,
                           progress=progress):
            rows += one.rows
            run = one.runs[0]
            correct = output.clean_accuracy(int((run.predictions_before == run.y).sum()), len(run.y))
            for offset, run in zip(offsets or ("untargeted",), one.runs):
                save_run(run, folder / one.method / str(offset) / "adversarials.npz")
            # After each attack: a later failure must not take the table with it.
            written = report.write_table(rows, folder / "table", left=2 if offsets else 1)
    print(written[1].read_text(encoding="utf-8"))
    print(correct)
    print("seconds per image include compilation")
    print("written: " + ", ".join(map(str, written)))


def _pareto(args):
    import numpy as np

    from gse_jax import evaluation, report
    from gse_jax.data.atomic import replacing

    caps = options.numbers("--max-l2", args.max_l2)
    images, apply_fn, params, _ = options.load_job(args)
    targets = options.targets(args.targets, images.labels, apply_fn.config.num_classes)
    folder = output.folder(args.out)
    with _displays() as progress:
        def write(front):  # a later failure must not take the front with it
            with replacing(folder / "front.npz") as file:
                np.savez(file, **{name: np.asarray(value) for name, value in front._asdict().items()})
            return report.write_table(front.rows(), folder / "front", left=1)

        front = evaluation.pareto(
            params, apply_fn, images.images, images.labels, targets=targets, max_l2=caps,
            methods=None if args.methods == "all" else args.methods.split(","), key=args.seed,
            lanes=args.lanes, progress=progress, on_front=write)
    written = write(front)
    names = np.asarray(front.methods)
    choose = lambda values: {name: values[names == name] for name in dict.fromkeys(front.methods)}
    figure = report.front_plot(choose(front.means), choose(front.success_rate == 1.0))
    written += report.save_figure(figure, folder / "front")
    print(written[1].read_text(encoding="utf-8"))
    if "gse_refined" in front.methods:  # the only one that takes a cap
        print("an image that a cap leaves without success keeps that of the next larger cap: 'within the cap' "
              "is without those")
    print(output.clean_accuracy(int(front.correct.sum()), len(front.correct)))
    print("written: " + ", ".join(map(str, (*written, folder / "front.npz"))))
