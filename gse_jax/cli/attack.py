"""`gse-jax demo` and `gse-jax attack`."""

import argparse

from gse_jax.cli import options, output

# The paper's CIFAR-10 constants are made for networks with steep gradients. The embedded network is
# smooth and the digits have full contrast: with mu = 1 the l2 term wins on every second image.
_DEMO_HYPERPARAMS = "mu=0.1,step_size=0.1,q=0.9"


def add_commands(commands) -> None:
    """Add `demo` and `attack` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    demo = commands.add_parser("demo", help="attack the embedded classifier on embedded digits")
    demo.add_argument("--num", type=int, default=64, help="images to attack (default 64)")
    demo.add_argument("--targeted", action="store_true", help="aim at the next class")
    demo.add_argument("--out", default="gse-demo", help="folder for results (default gse-demo)")
    demo.set_defaults(run=_demo)

    attack = commands.add_parser("attack", help="attack your model on your images")
    options.add_job(attack, out="gse-attack")
    attack.add_argument("--method", default="gse", help="name of the attack (default gse)")
    attack.add_argument("--hyperparams", metavar="NAME=VALUE,...",
                        help="change the preset, e.g. mu=0.1,step_size=0.05")
    attack.add_argument("--targets", metavar="next|FILE",
                        help="targeted attack: the next class, or a text file, one class a line")
    attack.set_defaults(run=_attack)


def _demo(args):
    options.require_positive("--num", args.num)
    _attack(argparse.Namespace(
        data="digits", model="resnet20", weights="digits", normalize="half", method="gse",
        hyperparams=_DEMO_HYPERPARAMS, targets="next" if args.targeted else None, limit=args.num,
        lanes=None, seed=0, out=args.out))


def _attack(args):
    from gse_jax.attacks.registry import find_method
    from gse_jax.evaluation import display, run_attack, save_run
    from gse_jax.evaluation.progress import say

    find_method(args.method)  # or say so before anything is loaded
    images, apply_fn, params, about = options.load_job(args)
    targets = options.targets(args.targets, images.labels, apply_fn.config.num_classes)
    hyperparams = options.hyperparams(args.hyperparams, args.method, images.images.shape[1:],
                                      targets is not None)
    folder = output.folder(args.out)
    say(f"{len(images.labels)} images of {args.data}, {args.model}, {args.method}"
        f"{' targeted' if targets is not None else ''}; compiling ...")
    with display(interval=2.0) as show:
        run = run_attack(params, apply_fn, images.images, images.labels, targets=targets,
                         ids=images.ids, method=args.method, hyperparams=hyperparams, key=args.seed,
                         lanes=args.lanes, about=about, progress=show)
    path = save_run(run, folder / "adversarials.npz")
    output.write_json(folder / "summary.json", {
        **run.about, "clean_accuracy": run.clean_accuracy, **run.summary().to_dict()})
    picture = output.draw_panel(run, folder / "panel", output.NUM_PANELS)
    output.print_table(output.table(run))
    print("written: " + ", ".join(str(p) for p in (path, folder / "summary.json", *picture)))
