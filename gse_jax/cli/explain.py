"""`gse-jax explain`: panels, curves and a table for a finished run."""

import csv
from pathlib import Path

from gse_jax.cli import options, output


def add_commands(commands) -> None:
    """Add `explain` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    explain = commands.add_parser("explain", help="panels, curves and a table for a finished run")
    explain.add_argument("path", metavar="RUN_OR_NPZ", help="folder or npz of demo or attack")
    options.add_model(explain, required=False)
    explain.add_argument("--panels", type=int, default=output.NUM_PANELS, help="images to draw")
    explain.add_argument("--out", help="folder (default: explain/ beside the run)")
    explain.set_defaults(run=_explain)


def _explain(args):
    from gse_jax import models
    from gse_jax.evaluation import explain, load_run

    options.require_positive("--panels", args.panels)
    run = load_run(args.path)
    chosen = {name: getattr(args, name) or run.about.get(name)
              for name in ("model", "weights", "normalize")}
    for name, value in chosen.items():
        if value is None:
            raise ValueError(f"the run does not say its {name}; pass --{name}")
    try:
        apply_fn, params = models.load(chosen["model"], weights=chosen["weights"],
                                       normalize=options.normalization(chosen["normalize"]))
    except FileNotFoundError as error:
        if args.weights is not None:
            raise
        raise FileNotFoundError(f"{error} (so the run says; pass --weights if they are elsewhere now)") from None
    explanation = explain(run, params, apply_fn)
    path = Path(args.path)
    folder = Path(args.out or (path if path.is_dir() else path.parent) / "explain")
    heat_maps = {"saliency": explanation.saliency}
    if explanation.activation is not None:
        # Evidence for the class only, as in the paper's figures.
        heat_maps[explanation.activation_kind] = explanation.activation.clip(min=0)
    written = [*output.draw_panel(run, folder / "panels", args.panels, heat_maps),
               *_draw_curves(run, explanation, folder)]
    rows = output.table(run) + _explanation_rows(explanation)
    path = folder / "table.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("metric", "value"), *rows])
    output.print_table(rows, "explanation")
    print("written: " + ", ".join(str(p) for p in (*written, path)))


def _draw_curves(run, explanation, folder):
    import numpy as np

    from gse_jax import metrics, report
    from gse_jax.evaluation import PERCENTILES

    name, found, numbers = run.about["method"], explanation.found, run.metrics()
    written = [*report.save_figure(report.interpretability_curves(
        PERCENTILES, {name: explanation.interpretability[found]}), folder / "interpretability")]
    for stem, label, counts in (("success_pixels", "changed pixels k", numbers.changed_pixels),
                                ("success_patches", "patches k", numbers.patch_count)):
        budgets = np.arange(int(counts[found].max(initial=1)) + 1)
        rates = metrics.success_at_k(counts, found, budgets, attacked=run.attacked)
        written += report.save_figure(report.success_curves(budgets, {name: np.asarray(rates)},
                                                            xlabel=label), folder / stem)
    samples = {"changed pixels": numbers.changed_pixels, "clusters": numbers.num_clusters,
               "d_{2,0}": numbers.patch_count}
    return written + [*report.save_figure(report.distribution_plots(
        {metric: {name: values[found]} for metric, values in samples.items()}),
        folder / "distributions")]


def _explanation_rows(explanation):
    import numpy as np

    from gse_jax.evaluation import PERCENTILES

    found = explanation.found
    rows = [(f"interpretability score, {p}th percentile",
             f"{explanation.interpretability[found, i].mean():.3f}" if found.any() else "-")
            for i, p in enumerate(PERCENTILES)]
    for name, overlap in (("saliency", explanation.saliency_overlap),
                          (explanation.activation_kind, explanation.activation_overlap)):
        if overlap is not None and found.any():
            # A map that is the same everywhere, as Grad-CAM's may be, has no top 20 %.
            usable = found & (overlap.control > 0)
            score, control = overlap.score[usable], overlap.control[usable]
            left = f"; {np.sum(found & ~usable)} images without a map" if (found & ~usable).any() else ""
            rows.append((f"changed pixels in the top 20 % of {name}",
                         f"{score.mean():.3f} (same mask anywhere: {control.mean():.3f}; "
                         f"{(score > control + 1e-5).mean():.0%} of images above{left})" if usable.any() else f"-{left}"))
    return rows
