"""What commands show: the table of a run, and its picture."""

import json
import tempfile
from pathlib import Path

NUM_PANELS = 6


def folder(path):
    """Make the folder of the results and see that it can be written to, before anything is computed.

    Raises OSError.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as probe:
        probe.write(bytes(4096))
    return path


def clean_accuracy(correct, total):
    """Return how many images the model is right about, as text: only those are attacked."""
    return f"clean accuracy {share(correct, total)}; only correctly classified images are attacked"


def share(hits, total):
    """Return a share with its counts."""
    return f"{hits / total:.1%} ({hits} of {total})" if total else "- (of 0)"


def table(run):
    """Return the run's (name, value) rows."""
    numbers = run.summary()

    def mean(statistic, digits):
        return "-" if statistic.mean is None else f"{statistic.mean:.{digits}f}"

    total, attacked, seconds = numbers.num_images, numbers.num_attacked, run.about["seconds"]
    return [
        ("clean accuracy", share(round((run.clean_accuracy or 0) * total), total)),
        ("attack success rate, of correctly classified" + " or not finite" * (numbers.num_non_finite > 0),
         share(numbers.num_found, numbers.num_attacked)),
        ("attack success rate, of all images", share(int(run.success.sum()), total)),
        ("changed pixels (ACP)", mean(numbers.changed_pixels, 2)),
        ("clusters of changed pixels (ANC)", mean(numbers.num_clusters, 2)),
        ("l2 norm, images in [-1, 1]", mean(numbers.l2, 3)),
        ("8x8 patches touched (d_{2,0})", mean(numbers.patch_count, 2)),
        ("gradient evaluations per image", mean(numbers.gradient_evals, 1)),
        ("attacked images per second, compilation included",
         f"{attacked / seconds:.2f} ({attacked} in {seconds:.1f} s)" if attacked else "-"),
    ]


def print_table(rows, title="result"):
    """Print (name, value) rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def write_json(path, values):
    """Write values as a JSON file; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def draw_panel(run, stem, count, heat_maps=None):
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
