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
    attack.add_argument("--data", required=True, help=options.DATA)
    options.add_model(attack, required=True)
    attack.add_argument("--method", default="gse", help="name of the attack (default gse)")
    attack.add_argument("--hyperparams", metavar="NAME=VALUE,...",
                        help="change the preset, e.g. mu=0.1,step_size=0.05")
    attack.add_argument("--targets", metavar="next|FILE",
                        help="targeted attack: the next class, or a text file, one class a line")
    attack.add_argument("--limit", type=int, help="take the first N images only")
    attack.add_argument("--lanes", type=int, help="images worked on at a time")
    attack.add_argument("--seed", type=int, default=0, help="for attacks with randomness")
    attack.add_argument("--out", default="gse-attack", help="folder (default gse-attack)")
    attack.set_defaults(run=_attack)


def _demo(args):
    options.require_positive("--num", args.num)
    _attack(argparse.Namespace(
        data="digits", model="resnet20", weights="digits", normalize="half", method="gse",
        hyperparams=_DEMO_HYPERPARAMS, targets="next" if args.targeted else None, limit=args.num,
        lanes=None, seed=0, out=args.out))


def _attack(args):
    from gse_jax import data, models
    from gse_jax.attacks import default_domain, preset
    from gse_jax.evaluation import display, run_attack, save_run

    options.require_positive("--limit", args.limit)
    images = data.load(args.data, limit=args.limit)
    preset(args.method, default_domain(images.images.shape[1:]), args.targets is not None)
    apply_fn, params = models.load(args.model, weights=args.weights,
                                   normalize=options.normalization(args.normalize))
    targets = options.targets(args.targets, images.labels, apply_fn.config.num_classes)
    hyperparams = options.hyperparams(args.hyperparams, args.method, images.images.shape[1:],
                                      targets is not None)
    about = {"data": args.data, "model": args.model, "weights": str(args.weights),
             "normalize": args.normalize, "class_names": list(images.class_names)}
    folder = output.folder(args.out)
    print(f"{len(images.labels)} images of {args.data}, {args.model}, {args.method}"
          f"{' targeted' if targets is not None else ''}; compiling ...", flush=True)
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
