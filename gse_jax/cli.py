"""The command line: arguments -> the functions of the other rooms. No logic of its own."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

NORMALIZATIONS = {
    "half": (0.5, 0.5),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": (0.0, 1.0),
}
_NUM_PANELS = 6

# The paper's CIFAR-10 constants are made for networks with steep gradients. The embedded network is
# smooth and the digits have full contrast: with mu = 1 the l2 term wins on every second image.
_DEMO_HYPERPARAMS = "mu=0.1,step_size=0.1,q=0.9"


def main(argv=None) -> int:
    """Run `gse-jax`.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        Exit code: 0 done, 2 wrong input (one line on stderr), 130 interrupted.
    """
    args = _parser().parse_args(argv)
    from gse_jax.devices import use_all_cpu_cores

    with contextlib.suppress(RuntimeError):  # JAX already runs, e.g. in a notebook: fewer devices
        use_all_cpu_cores()
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"gse-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gse-jax: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="gse-jax", description="Group-wise sparse, explainable adversarial attacks in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="attack the embedded classifier on embedded digits")
    demo.add_argument("--num", type=int, default=64, help="images to attack (default 64)")
    demo.add_argument("--targeted", action="store_true", help="aim at the next class")
    demo.add_argument("--out", default="gse-demo", help="folder for results (default gse-demo)")
    demo.set_defaults(run=_demo)

    attack = commands.add_parser("attack", help="attack your model on your images")
    attack.add_argument("--data", required=True,
                        help="digits, npz:FILE (x uint8 or in [0, 1], y) or tfds:NAME:SPLIT")
    _add_model(attack, required=True)
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

    explain = commands.add_parser("explain", help="panels, curves and a table for a finished run")
    explain.add_argument("path", metavar="RUN_OR_NPZ", help="folder or npz of demo or attack")
    _add_model(explain, required=False)
    explain.add_argument("--panels", type=int, default=_NUM_PANELS, help="images to draw")
    explain.add_argument("--out", help="folder (default: explain/ beside the run)")
    explain.set_defaults(run=_explain)
    return parser


def _add_model(parser, *, required):
    hint = "" if required else " (default: what the run says)"
    parser.add_argument("--model", required=required, help=f"resnet20, 32, 44 or 56{hint}")
    parser.add_argument("--weights", required=required,
                        help=f"safetensors or npz in PyTorch layout, or digits{hint}")
    parser.add_argument("--normalize", default="half" if required else None,
                        metavar="half|imagenet|none|MEAN/STD",
                        help="what the model does to images in [0, 1]; three numbers each may be "
                             f"given as 0.49,0.48,0.45/0.25,0.24,0.26{hint or ' (default half)'}")


def _normalization(text):
    """Turn `half`, `imagenet`, `none` or MEAN/STD into (mean, std)."""
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--normalize {text!r} is unknown; use {', '.join(NORMALIZATIONS)} or "
                         "MEAN/STD such as 0.5/0.5") from None
    return mean, std


def _targets(text, y, num_classes):
    from gse_jax.evaluation import next_class

    if text is None or text == "next":
        return None if text is None else next_class(y, num_classes)
    import numpy as np

    try:
        targets = np.loadtxt(text, dtype=np.int32, ndmin=1)
    except ValueError as error:
        raise ValueError(f"--targets {text}: expected one class number a line; {error}") from None
    return targets[:len(y)]


def _hyperparams(text, method, image_shape, targeted):
    """Turn NAME=VALUE,... into the preset with these changes; None without changes."""
    if not text:
        return None
    from gse_jax.attacks import default_domain, preset

    _, values = preset(method, default_domain(image_shape), targeted)
    changes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            changes[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--hyperparams: {part!r} is not NAME=VALUE") from None
    unknown = sorted(changes.keys() - values._asdict().keys())
    if unknown:
        raise ValueError(f"--hyperparams: {method} has no {unknown[0]!r}; it has "
                         f"{', '.join(values._asdict())}")
    return values._replace(**changes)


def _demo(args):
    _require_positive("--num", args.num)
    _attack(argparse.Namespace(
        data="digits", model="resnet20", weights="digits", normalize="half", method="gse",
        hyperparams=_DEMO_HYPERPARAMS, targets="next" if args.targeted else None, limit=args.num, lanes=None, seed=0,
        out=args.out))


def _require_positive(name, value):
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _attack(args):
    from gse_jax import data, models
    from gse_jax.attacks import default_domain, preset
    from gse_jax.evaluation import run_attack, save_run

    _require_positive("--limit", args.limit)
    images = data.load(args.data, limit=args.limit)
    preset(args.method, default_domain(images.images.shape[1:]), args.targets is not None)
    apply_fn, params = models.load(args.model, weights=args.weights,
                                   normalize=_normalization(args.normalize))
    num_classes = apply_fn.config.num_classes
    targets = _targets(args.targets, images.labels, num_classes)
    hyperparams = _hyperparams(args.hyperparams, args.method, images.images.shape[1:],
                               targets is not None)
    about = {"data": args.data, "model": args.model, "weights": str(args.weights),
             "normalize": args.normalize, "class_names": list(images.class_names)}
    print(f"{len(images.labels)} images of {args.data}, {args.model}, {args.method}"
          f"{' targeted' if targets is not None else ''}", flush=True)
    with _progress(len(images.labels)) as report:
        run = run_attack(params, apply_fn, images.images, images.labels, targets=targets,
                         ids=images.ids, method=args.method, hyperparams=hyperparams, key=args.seed, lanes=args.lanes,
                         about=about, progress=report)
    folder = Path(args.out)
    path = save_run(run, folder / "adversarials.npz")
    rows = _table(run)
    _write_json(folder / "summary.json", {**run.about, "clean_accuracy": run.clean_accuracy,
                                          **run.summary().to_dict()})
    picture = _draw_panel(run, folder / "panel", _NUM_PANELS)
    _print_table(rows)
    print("written: " + ", ".join(str(p) for p in (path, folder / "summary.json", *picture)))


def _table(run):
    """Return the run's (name, value) rows."""
    numbers = run.summary()

    def mean(statistic, digits):
        return "-" if statistic.mean is None else f"{statistic.mean:.{digits}f}"

    def share(hits, total):
        return f"{hits / total:.1%} ({hits} of {total})" if total else "- (of 0)"

    total, seconds = numbers.num_images, run.about["seconds"]
    return [
        ("clean accuracy", share(round((run.clean_accuracy or 0) * total), total)),
        ("attack success rate, of correctly classified",
         share(numbers.num_found, numbers.num_attacked)),
        ("attack success rate, of all images", share(int(run.success.sum()), total)),
        ("changed pixels (ACP)", mean(numbers.changed_pixels, 2)),
        ("clusters of changed pixels (ANC)", mean(numbers.num_clusters, 2)),
        ("l2 norm, images in [-1, 1]", mean(numbers.l2, 3)),
        ("8x8 patches touched (d_2,0)", mean(numbers.patch_count, 2)),
        ("gradient evaluations per image", mean(numbers.gradient_evals, 1)),
        ("images per second, compilation included",
         f"{total / seconds:.2f} ({total} in {seconds:.1f} s)" if total else "-"),
    ]


def _print_table(rows, title="result"):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


@contextlib.contextmanager
def _progress(total):
    """Yield a function of `Progress`: a bar on a terminal, a line now and then otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("attacking"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("attack", total=total, rate="compiling")
            yield lambda p: bar.update(
                task, completed=p.done, rate=f"{p.found} found, {p.lane_evals} evaluations")
        return
    print("compiling ...", file=sys.stderr, flush=True)
    last = [time.monotonic()]

    def line(p):
        if p.done == p.total or time.monotonic() - last[0] > 2.0:
            last[0] = time.monotonic()
            print(f"{p.done}/{p.total} images done, {p.found} found, {p.lane_evals} evaluations",
                  file=sys.stderr, flush=True)

    yield line


def _write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _draw_panel(run, stem, count, heat_maps=None):
    """Draw the first images with a success, filled up with others; nothing for an empty run."""
    import numpy as np

    from gse_jax import Status, report

    chosen = np.argsort(run.status != Status.FOUND, kind="stable")[:count]
    if not len(chosen):
        return ()
    names = run.about.get("class_names") or None
    figure = report.attack_panel(
        run.x[chosen], run.adversarials[chosen],
        report.Prediction(run.predictions_before[chosen], run.confidences_before[chosen]),
        report.Prediction(run.predictions_after[chosen], run.confidences_after[chosen]),
        bounds=tuple(run.about["bounds"]), class_names=names, status=run.status[chosen],
        heat_maps={name: maps[chosen] for name, maps in (heat_maps or {}).items()})
    return report.save_figure(figure, stem)


def _explain(args):
    from gse_jax import models
    from gse_jax.evaluation import explain, load_run

    _require_positive("--panels", args.panels)
    run = load_run(args.path)
    options = {name: getattr(args, name) or run.about.get(name)
               for name in ("model", "weights", "normalize")}
    for name, value in options.items():
        if value is None:
            raise ValueError(f"the run does not say its {name}; pass --{name}")
    apply_fn, params = models.load(options["model"], weights=options["weights"],
                                   normalize=_normalization(options["normalize"]))
    explanation = explain(run, params, apply_fn)
    path = Path(args.path)
    folder = Path(args.out or (path if path.is_dir() else path.parent) / "explain")
    heat_maps = {"saliency": explanation.saliency}
    if explanation.activation is not None:
        # Evidence for the class only, as in the paper's figures.
        heat_maps["CAM"] = explanation.activation.clip(min=0)
    written = [*_draw_panel(run, folder / "panels", args.panels, heat_maps),
               *_draw_curves(run, explanation, folder)]
    rows = _table(run) + _explanation_rows(explanation)
    table = folder / "table.csv"
    table.write_text("".join(f'"{name}","{value}"\n' for name, value in [("metric", "value"),
                                                                        *rows]), encoding="utf-8")
    _print_table(rows, "explanation")
    print("written: " + ", ".join(str(p) for p in (*written, table)))


def _draw_curves(run, explanation, folder):
    import numpy as np

    from gse_jax import Status, metrics, report
    from gse_jax.evaluation import PERCENTILES

    name, found = run.about["method"], explanation.found
    attacked = run.status != Status.ALREADY_MISCLASSIFIED
    numbers = metrics.image_metrics(run.x, run.adversarials, bounds=tuple(run.about["bounds"]))
    written = [*report.save_figure(report.interpretability_curves(
        PERCENTILES, {name: explanation.interpretability[found]}), folder / "interpretability")]
    for stem, label, counts in (("success_pixels", "changed pixels k", numbers.changed_pixels),
                                ("success_patches", "patches k", numbers.patch_count)):
        budgets = np.arange(int(counts[found].max(initial=1)) + 1)
        rates = metrics.success_at_k(counts, found, budgets, attacked=attacked)
        written += report.save_figure(report.success_curves(budgets, {name: np.asarray(rates)},
                                                            xlabel=label), folder / stem)
    samples = {"ACP": numbers.changed_pixels, "ANC": numbers.num_clusters,
               "d_{2,0}": numbers.patch_count}
    return written + [*report.save_figure(report.distribution_plots(
        {metric: {name: values[found]} for metric, values in samples.items()}),
        folder / "distributions")]


def _explanation_rows(explanation):
    from gse_jax.evaluation import PERCENTILES

    found = explanation.found
    rows = [(f"interpretability score, {p}th percentile",
             f"{explanation.interpretability[found, i].mean():.3f}" if found.any() else "-")
            for i, p in enumerate(PERCENTILES)]
    for name, overlap in (("saliency", explanation.saliency_overlap),
                          ("CAM", explanation.activation_overlap)):
        if overlap is not None and found.any():
            score, control = overlap.score[found], overlap.control[found]
            rows.append((f"changed pixels in the top 20 % of {name}",
                         f"{score.mean():.3f} (same mask anywhere: {control.mean():.3f}; "
                         f"{(score > control).mean():.0%} of images above)"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
