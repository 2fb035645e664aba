"""Write the tables of README, and of pages in `gse_jax/docs` from benchmarks/results/*.json.

    python benchmarks/readme_table.py [--check]     # --check only tells which tables are not those of the results
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from gse_jax import report

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
REFINEMENT = README.parent / "gse_jax" / "docs" / "refinement.md"
SPEED = REFINEMENT.parent / "speed.md"
TRAINING = REFINEMENT.parent / "training_and_tuning.md"


def parity():
    """Metrics on real images beside the published code's."""
    record = json.loads((RESULTS / "reference_parity.json").read_text())
    lines = ["| first 64 CIFAR-10 test images, authors' ResNet-20 | ASR | ACP | ANC | l2 | d_{2,0} "
             "| gradients per image | forward passes per image |", "|---|---|---|---|---|---|---|---|"]
    published = {"untargeted": (362, 724), "targeted": (521, 1042)}
    for row in record["rows"]:
        gradients, forwards = published[row["attack"]]
        lines.append(f"| {row['attack']}, published code | 1.000 | {row['ACP_published']:.2f} | "
                     f"{row['ANC_published']:.2f} | {row['l2_published']:.3f} | "
                     f"{row['d20_published']:.1f} | {gradients} | {forwards} |")
        lines.append(f"| {row['attack']}, gse_jax | {row['ASR']:.3f} | {row['ACP']:.2f} | "
                     f"{row['ANC']:.2f} | {row['l2']:.3f} | {row['d20']:.1f} | "
                     f"{row['evals_per_image']:.0f} | {row['forwards_per_image']:.0f} |")
    return [*lines, "", source(record, f"`benchmarks/reference_parity.py`, {row['images']} correctly "
                                       "classified images")]


def efficiency():
    """What the loop costs beside the bare model."""
    return [*_throughput(("untargeted", "untargeted_8_lanes", "targeted")), "", "Efficiency: gradient evaluations the attack "
            "used times the bare jitted value-and-gradient of all cores at its best batch size, over "
            "wall time, after compilation; of several runs the median, the lowest and the highest. The second efficiency "
            "is against the model as it runs in the attack, in a compiled loop with the gradients of convolutions "
            "rewritten. Both bare models are timed all along: where their times differ from row to row, the machine was "
            "faster or slower. 'Lanes' are those asked for, of all devices together (`--lanes` counts them per device); of few images a "
            "CPU works on fewer at a time. 'Not used' "
            "are the model's evaluations in idle lanes, and the last forward pass of "
            "each run, whose gradient nobody needs."]


def efficiency_gpu():
    """The same on a GPU."""
    return _throughput(("untargeted_gpu", "targeted_gpu", "untargeted_tf32_gpu"))


def _throughput(names):
    records = [json.loads((RESULTS / f"throughput_{name}.json").read_text()) for name in names]
    tuned = any("tuned_us" in row for record in records for row in record["rows"])
    more = ["bare model as the attack runs it", "efficiency against that"] if tuned else []
    columns = ["images", "attack", "lanes", "ASR", "images per second", "gradients per image",
               "bare model, microseconds per gradient", "efficiency", *more, "not used"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    sources = []
    for record in records:
        sources += ["", source(record, f"`{record['command']}`, the correctly classified of 400 CIFAR-10 test "
                                       "images, repeated, authors' ResNet-20")]
        for row in record["rows"]:
            precision = row.get("precision", "highest")
            word = row["attack"] + (f", `precision=\"{precision}\"`" if precision != "highest" else "")
            lanes = row["lanes"] if row["lanes"] == "default" else f"{int(row['lanes']) * row['devices']:,}"
            lines.append(f"| {row['images']:,} | {word} | {lanes} | {row['ASR']:.3f} | "
                         f"{row['images_per_second']:.{2 if row['images_per_second'] < 100 else 0}f} | "
                         f"{row['evals_per_image']:.0f} | {_microseconds(row['bare_us'])} | "
                         f"{row['efficiency']:.2f}{_spread(row, 'efficiency')} | {_tuned(row) if tuned else ''}"
                         f"{1 - row['efficiency'] / row['lanes_full']:.0%} |")
    return [*lines, *sources]


def _spread(row, name):
    if row.get("repeats", 1) == 1 or f"lowest_{name}" not in row:
        return ""
    return f" ({row[f'lowest_{name}']:.2f} to {row[f'highest_{name}']:.2f})"


def _tuned(row):
    if "tuned_us" not in row:  # measured before there was such a thing
        return "- | - | "
    return (f"{_microseconds(row['tuned_us'])} | {row['efficiency_tuned']:.2f}{_spread(row, 'efficiency_tuned')} | ")


def _microseconds(value):
    return f"{value:.{1 if value < 100 else 0}f}"


def start_gpu():
    """Seconds before the first result on a GPU, where the default attack has not been timed."""
    return _compile_time("compile_time_gpu", "16 images of 32 x 32")


def profile():
    """What a call on a GPU consists of."""
    parts = {"model": "model", "update of the images": "update", "schedule": "schedule",
             "other": "other", "nothing runs": "gaps"}
    return _table("profile_step_gpu", {
        "lanes": "{lanes:,}", "call, ms": "{ms_per_call:.2f}",
        **{f"{name}, ms": f"{{{part}_ms:.2f}}" for name, part in parts.items()}},
        "`benchmarks/profile_step.py`, CIFAR-10, authors' ResNet-20")


_LARGE_IMAGES = {"images": "{images}", "ASR": "{ASR:.3f}", "ACP": "{ACP:.0f}", "ANC": "{ANC:.1f}", "l2": "{l2:.2f}",
                 "d_{2,0}": "{d20:.0f}"}
_SMALL_IMAGES = {"ASR": "{ASR:.3f}", "ACP": "{ACP:.1f}", "ANC": "{ANC:.2f}", "l2": "{l2:.2f}", "d_{2,0}": "{d20:.1f}",
                 "gradients": "{gradients:.0f}", "forward passes": "{forwards:.0f}"}


def imagenet():
    """The ImageNet protocol at 224 x 224 pixels."""
    record = json.loads((RESULTS / "imagenet_panels.json").read_text())
    lines = _lines({"NIPS 2017 at 224 x 224, MobileNet, ImageNet preset": "{attack}", **_LARGE_IMAGES,
                    "gradients per image": "{evals_per_image:.0f}",
                    "seconds per image, with compilation": "{seconds_per_image_with_compilation:.1f}"},
                   [row for row in record["rows"] if "seconds_per_image_with_compilation" in row])
    overlap = record["rows"][0]
    error = overlap.get("CAM_overlap_standard_error")
    error = "" if error is None else f", standard error over images {error:.0%}"
    return [*lines, "", f"Of the changed pixels {overlap['CAM_overlap']:.0%} (untargeted{error}) lie in the top 20 % of the class activation map; of the same mask "
            f"placed anywhere {overlap['CAM_overlap_anywhere']:.0%}. That control does not know that maps and "
            "perturbations both tend to the middle of an image. Targets: label + 857.", "",
            source(record, f"`{record.get('command', 'benchmarks/imagenet_panels.py')}`")]


def _attacks(record, first, rows=None):
    rows = rows or record["rows"]
    paired = {"d_{2,0} above the first row (standard error)": "{d20_more:+.1f} ({d20_more_standard_error:.1f})"}
    return _lines({first: lambda r: f"{r['attack']}{', label + 1' if r['targeted'] else ''}", **_SMALL_IMAGES,
                   **(paired if "d20_more" in rows[0] else {})}, rows)


def refined():
    """The refined attack beside GSE and its rivals, for the README."""
    record = json.loads((RESULTS / "refinement_front.json").read_text())
    names = ("gse_refined", "gse_refined, l2 <= 1.5", "gse_refined, l2 <= 0.8", "gse", "sigma_zero, max_steps 300",
             "sparse_pgd, num_pixels 20", "gsmd")
    chosen = [row for row in record["rows"] if row["attack"] in names]
    return [*_attacks(record, "first 64 CIFAR-10 test images, authors' ResNet-20", chosen), "",
            source(record, "`benchmarks/refinement.py`, 55 correctly classified images")]


def draw_front():
    """Draw that page's figure."""
    numbers = {}
    for row in json.loads((RESULTS / "refinement_front.json").read_text())["rows"]:
        name = row["attack"].split(",")[0]
        numbers.setdefault(name, []).append([row[k] for k in ("ACP", "ANC", "l2", "d20", "ASR")])
    numbers = {name: np.asarray(values) for name, values in numbers.items()}
    figure = report.front_plot({name: v[:, :4] for name, v in numbers.items()},
                               {name: v[:, 4] == 1.0 for name, v in numbers.items()})
    figure.savefig(REFINEMENT.parent / "refinement_front.png", dpi=200, metadata={"Software": None})


def refinement():
    """Everything measured of the refinement, for its page; `draw_front` draws its figure."""
    heads = {"front": "Untargeted, first 64 CIFAR-10 test images, authors' ResNet-20",
             "targeted": "Targeted, the same images and network",
             "network": "Another ResNet-20, the same settings",
             "others": "Other attacks refined (200 gradients at most; StrAttack with its inexact savings on), authors' ResNet-20",
             "ablation": "One change at a time, authors' ResNet-20"}
    lines = []
    for part, head in heads.items():
        path = RESULTS / f"refinement_{part}.json"
        if path.exists():
            record = json.loads(path.read_text())
            if part == "front":
                lines += ["![d_{2,0}, changed pixels and clusters over the l2 norm](refinement_front.png)", ""]
            lines += [*_attacks(record, head), "",
                      source(record, f"`{record.get('command', f'benchmarks/refinement.py --parts {part}')}`"), ""]
    return [*lines, *_imagenet_refined()]


def training():
    """Networks trained on attacks, before two attacks."""
    record = json.loads((RESULTS / "adversarial_training.json").read_text())
    names = {"before": "before", "clean": "200 more steps, clean images", "as data": "200 more steps, adversarials taken as data",
             "through the attack": "200 more steps, gradient through the attack"}
    numbers = {"accuracy": "{accuracy:.2f}", "ASR": "{asr:.2f}", "ACP": "{acp:.1f}", "ANC": "{anc:.2f}", "l2": "{l2:.2f}",
               "d_{2,0} (standard error)": "{d20:.1f} ({d20_error:.1f})"}
    return [*_lines({"digits at 16 x 16 pixels, small network": lambda r: names[r["model"]], "attack": "`{attack}`", **numbers},
                    record["rows"]), "", source(record, "`benchmarks/adversarial_training.py`, 100 test images")]


def tuning():
    """Hyperparameters that hypergradients found."""
    return _table("hypergradient_tuning", {
        "network": "{model}", "hyperparameters": "{hyperparams}", "mu": "{mu:.3g}", "step size": "{step_size:.3g}",
        "ASR": "{asr:.2f}", "d_{2,0}, images found by all": "{d20_of_images_found_by_both:.1f}",
        "gradients per image": "{gradients_per_image:.0f}"}, "`benchmarks/hypergradient_tuning.py`")


def reverse_memory():
    """What reverse mode through the attack reserves."""
    return _table("reverse_memory", {
        "network": "{model}", "images": "{batch}", "steps": "{steps}", "memory reserved, MiB": "{temporary_mib:.0f}",
        "ratio": "{ratio:.2f}"}, "`benchmarks/reverse_memory.py`")


def _imagenet_refined():
    rows, sources = [], []
    for method, name in (("gse", "imagenet_panels"), ("gse_refined", "imagenet_panels_gse_refined")):
        record = json.loads((RESULTS / f"{name}.json").read_text())
        rows.append({**record["rows"][0], "method": method})
        sources.append(source(record, f"`{name}.json`: `benchmarks/imagenet_panels.py" + (
            " --method gse_refined`" if method == "gse_refined" else "`")))
    lines = _lines({"NIPS 2017 at 224 x 224, MobileNet, untargeted": "{method}", **_LARGE_IMAGES,
                    "gradients": "{evals_per_image:.0f}", "forward passes": "{forwards_per_image:.0f}"}, rows)
    return [*lines, "", sources[0], "", sources[1], ""]


def _lines(columns, rows):
    """A table with one column for each of `columns`: heading -> format of the row's fields, or row -> text."""
    text = lambda column, row: column.format(**row) if isinstance(column, str) else column(row)
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
            *(f"| {' | '.join(text(column, row) for column in columns.values())} |" for row in rows)]


def _table(name, columns, script):
    """The same of a file of results, with its source."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return [*_lines(columns, record["rows"]), "",
            source(record, script.format(command=f"`{record.get('command')}`"))]


def giving_up():
    """What the unsafe option saves and costs."""
    return _table("giving_up", {
        "first 64 CIFAR-10 test images, authors' ResNet-20":
            lambda r: "targeted, label + 1" if r["targeted"] else "untargeted",
        "give_up_window": "{give_up_window}", **_SMALL_IMAGES}, "`benchmarks/giving_up.py`")


def scaling_small():
    """Cost of an image over their number and over devices."""
    return scaling("small", {})


_BARE = {"the same in gradients of the bare model": "{bare_gradients_per_image:.1f}"}


def scaling_real():
    """The same with ResNet-20 in a short attack, beside the bare model."""
    return scaling("real", _BARE)


def scaling_full():
    """The same in the default attack."""
    return scaling("full", _BARE)


def scaling(part, more):
    """Cost of an image over their number and over devices, with more columns."""
    return _table(f"scaling_{part}", {
        "network": "{network}", "images": "{images:,}", "CPU devices": "{devices}",
        "microseconds per image": "{us_per_image:.0f}", **more, "gradients per image": "{evals_per_image:.1f}",
        "memory added, MiB": "{more_mib:.0f}"},
        f"`benchmarks/scaling.py --parts {part}`")


def versus():
    """Side by side with PyTorch attacks."""
    return _versus("versus", "{command}, 16 CIFAR-10 images in [0, 1], authors' ResNet-20; theirs / ours")


def versus_published():
    """Side by side with the published code of GSE."""
    return _versus("versus_published", "{command}, correctly classified CIFAR-10 test images in [0, 1], authors' "
                   "ResNet-20; theirs / ours")


def versus_gpu():
    """The same on a GPU."""
    return _versus("versus_gpu", "{command}, 128 CIFAR-10 images in [0, 1], authors' ResNet-20; theirs / ours")


def _versus(name, script):
    both = lambda key, form: f"{{theirs_{key}:{form}}} / {{ours_{key}:{form}}}"
    return _table(name, {
        "theirs": "{peer}", "ours": "`{method}`", "images": "{images}",
        "seconds per image": both("seconds_per_image", ".3g"),
        "ratio (lowest, highest of the pairs)": lambda r: f"{r['ratio']:.1f} " + (
            f"({r['lowest_ratio']:.1f}, {r['highest_ratio']:.1f})" if r["pairs"] > 1 else "(one pair)"),
        "our gradients": "{ours_gradients:.1f}", "ASR": both("ASR", ".2f"), "ACP": both("ACP", ".1f"),
        "ANC": both("ANC", ".2f"), "l2": both("l2", ".2f"), "d_{2,0}": both("d20", ".1f")}, script)


def lanes():
    """Efficiency over lanes."""
    return _lanes("throughput_untargeted_lanes", "{command}, CIFAR-10, authors' ResNet-20")


def many_lanes():
    """The same with lanes for hundreds of images, in a short attack."""
    return _lanes("throughput_untargeted_lanes_6_runs", "{command}, CIFAR-10, authors' ResNet-20")


def _lanes(name, script):
    return _table(name, {
        "lanes per device": lambda r: f"{int(r['lanes']):,}", "images": "{images:,}",
        "images per second": "{images_per_second:.2f}", "gradients per image": "{evals_per_image:.1f}",
        "bare model, microseconds per gradient": lambda r: _microseconds(r["bare_us"]),
        "efficiency": lambda r: f"{r['efficiency']:.2f}{_spread(r, 'efficiency')}",
        "with evaluations not used": "{lanes_full:.2f}"}, script)


def tail():
    """What the order in the tail brings on an accelerator."""
    words = {"none": "as they come", "runs": "most of the search ahead first (ours)",
             "known": "longest first, were they known"}
    return _table("tail_accelerator", {
        "images": "{images:,}", "order": lambda r: words[r["order"]],
        "calls of 64 / 256 / 1,024 lanes":
            lambda r: " / ".join(str(r["calls"].get(w, 0)) for w in ("64", "256", "1024")),
        "longest image, calls": "{longest}", "efficiency": "{efficiency:.2f}"},
        "{command}: runs of 99 CIFAR-10 images replayed at an H200's times")


def memory():
    """Peak memory of the host."""
    return _memory("memory", "`benchmarks/memory.py`; the peak is above that of a process with JAX "
                             "started")


def memory_gpu():
    """Peak memory of a GPU."""
    return _memory("memory_gpu", "`benchmarks/memory.py`; memory of the device")


def _memory(name, script):
    return _table(name, {
        "images": "{images:,}", "lanes": "{lanes}", "pixels": "{side} x {side}", "peak, MiB": "{peak_mib:.0f}",
        "images and results, MiB": "{images_mib:.0f}"}, script)


def compile_for_tpu():
    """What the compiler for a TPU says of every attack."""
    return _table("compile_for_tpu", {
        "attack": "`{method}`", "chips": "{devices} {chip}", "lanes per device": "{lanes:,}",
        "lanes, queue and parked images, MiB": "{arguments_mib:.0f}", "temporaries, MiB": "{temporaries_mib:,.0f}",
        "exchanges between devices": "{collectives}", "transfers to the host": "{host_transfers}"},
        "{command}, images of 32 x 32, two convolutions as the model; compiled, not run")


def compile_time():
    """Seconds before the first result."""
    return _compile_time("compile_time", "16 images of 32 x 32 on two CPU devices", 24)


def _compile_time(name, images, count=None):
    columns, script = ["import", "first call", "second call", "cached"], (
        f"`benchmarks/compile_time.py`, ResNet-20, {images}; `cached` is the first call of another process with "
        "`gse_jax.use_compilation_cache`")
    if count is not None:
        columns += ["whole", "whole cached"]
        script += (f"; `whole` is what the first call of the default attack on {count} images takes more than the second")
    return _table(name, {f"{name}, s": f"{{{name}:.2f}}" for name in columns}, script)


def source(record, script):
    """One line that says what was measured where."""
    machine, versions = record["machine"], record["versions"]
    where = "cpu" if machine["platform"] == "cpu" else machine["device_kind"]
    commit = f"commit {record['commit']}, " if record.get("commit") else ""
    return (f"({script}; {machine['cores']} {machine['cpu']} cores, {where}, "
            f"JAX {versions['jax']}, {commit}{record['date']}, load average {record['load_average']:.1f}.)")


def main(check=False):
    """Replace what stands between the markers; with `check` exit with the names of what would change."""
    tables = ((README, parity), (README, imagenet), (README, refined), (README, versus_published), (README, efficiency),
              (README, efficiency_gpu), (SPEED, profile), (SPEED, memory_gpu), (REFINEMENT, refinement),
              (SPEED, giving_up), (SPEED, scaling_small), (SPEED, scaling_real), (SPEED, scaling_full),
              (SPEED, memory), (SPEED, lanes), (SPEED, many_lanes), (SPEED, tail), (SPEED, versus), (SPEED, versus_gpu),
              (SPEED, compile_for_tpu), (SPEED, compile_time), (SPEED, start_gpu), (TRAINING, training), (TRAINING, tuning),
              (TRAINING, reverse_memory))
    blocks = [(page, table.__name__, "\n".join(table())) for page, table in tables]  # all, or nothing
    stale = []
    for page, name, block in blocks:
        text = page.read_text(encoding="utf-8")
        new, found = re.subn(rf"<!-- {name} -->.*?<!-- end of {name} -->",
                             lambda _: f"<!-- {name} -->\n{block}\n<!-- end of {name} -->", text, flags=re.DOTALL)
        assert found == 1, f"{page} has no place for the table {name}"
        if new != text:
            stale.append(f"{page.name}: {name}")
            if not check:
                page.write_text(new, encoding="utf-8")
    if not check:
        draw_front()
    elif stale:
        sys.exit("not the tables of benchmarks/results: " + ", ".join(stale))


if __name__ == "__main__":
    main(check="--check" in sys.argv)
