"""Write the tables of README and of `docs/refinement.md` from benchmarks/results/*.json.

    python benchmarks/readme_table.py
"""

import json
import re
from pathlib import Path

import numpy as np

from gse_jax import report

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
REFINEMENT = README.parent / "gse_jax" / "docs" / "refinement.md"


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
    lines = ["| images | attack | images per second | gradients per image | efficiency | of which lanes "
             "idle in the tail |", "|---|---|---|---|---|---|"]
    for word in ("untargeted", "targeted"):
        record = json.loads((RESULTS / f"throughput_cpu_{word}.json").read_text())
        lines += [f"| {row['images']} | {word} | {row['images_per_second']:.2f} | "
                  f"{row['evals_per_image']:.0f} | {row['efficiency']:.2f} | "
                  f"{1 - row['efficiency'] / row['lanes_full']:.0%} |"
                  for row in record["rows"] if row["lanes"] == "default"]
    return [*lines, "", "Efficiency: gradient evaluations the attack used times the bare jitted "
            "value-and-gradient of all cores at its best batch size, over wall time, after "
            "compilation. 'Idle' includes the last forward pass of each run, whose gradient is not "
            "used.", "", source(record, "`benchmarks/throughput.py`, CIFAR-10, authors' ResNet-20")]


def imagenet():
    """The ImageNet protocol at 224 x 224 pixels."""
    record = json.loads((RESULTS / "imagenet_panels.json").read_text())
    lines = ["| NIPS 2017 at 224 x 224, MobileNet, ImageNet preset | images | ASR | ACP | ANC | l2 | "
             "d_{2,0} | gradients per image | seconds per image, with compilation |", "|---|---|---|---|---|---|---|---|---|"]
    for row in record["rows"]:
        if "seconds_per_image_with_compilation" in row:
            lines.append(
                f"| {row['attack']} | {row['images']} | {row['ASR']:.3f} | {row['ACP']:.0f} | "
                f"{row['ANC']:.1f} | {row['l2']:.2f} | {row['d20']:.0f} | "
                f"{row['evals_per_image']:.0f} | {row['seconds_per_image_with_compilation']:.0f} |")
    overlap = record["rows"][0]
    return [*lines, "", f"Of the changed pixels {overlap['CAM_overlap']:.0%} (untargeted) lie in the top "
            f"20 % of the class activation map; of the same mask anywhere "
            f"{overlap['CAM_overlap_anywhere']:.0%}. Targets: label + 857.", "",
            source(record, "`benchmarks/imagenet_panels.py`")]


def _attacks(record, first, rows=None):
    lines = [f"| {first} | ASR | ACP | ANC | l2 | d_{{2,0}} | gradients | forward passes |",
             "|---|---|---|---|---|---|---|---|"]
    return lines + [f"| {row['attack']}{', label + 1' if row['targeted'] else ''} | {row['ASR']:.3f} | "
                    f"{row['ACP']:.1f} | {row['ANC']:.2f} | {row['l2']:.2f} | {row['d20']:.1f} | "
                    f"{row['gradients']:.0f} | {row['forwards']:.0f} |" for row in rows or record["rows"]]


def refined():
    """The refined attack beside GSE and its rivals, for the README."""
    record = json.loads((RESULTS / "refinement_front.json").read_text())
    chosen = [row for row in record["rows"] if "l2 <=" not in row["attack"]
              or row["attack"].endswith((" 0.8", " 1.5"))]
    return [*_attacks(record, "first 64 CIFAR-10 test images, authors' ResNet-20", chosen), "",
            source(record, "`benchmarks/refinement.py`, 55 correctly classified images")]


def draw_front(rows):
    """Draw the page's figure."""
    numbers = {}
    for row in rows:
        name = row["attack"].split(",")[0]
        numbers.setdefault(name, []).append([row[k] for k in ("ACP", "ANC", "l2", "d20", "ASR")])
    numbers = {name: np.asarray(values) for name, values in numbers.items()}
    figure = report.front_plot({name: v[:, :4] for name, v in numbers.items()},
                               {name: v[:, 4] == 1.0 for name, v in numbers.items()})
    figure.savefig(REFINEMENT.parent / "refinement_front.png", dpi=200, metadata={"Software": None})


def refinement():
    """Everything measured of the refinement, for its page."""
    heads = {"front": "Untargeted, first 64 CIFAR-10 test images, authors' ResNet-20",
             "targeted": "Targeted, the same images and network",
             "network": "Another ResNet-20, the same settings",
             "others": "Other attacks refined (200 gradients at most), authors' ResNet-20",
             "ablation": "One change at a time, authors' ResNet-20"}
    lines = []
    for part, head in heads.items():
        path = RESULTS / f"refinement_{part}.json"
        if path.exists():
            record = json.loads(path.read_text())
            if part == "front":
                draw_front(record["rows"])
                lines += ["![d_{2,0}, changed pixels and clusters over the l2 norm](refinement_front.png)", ""]
            lines += [*_attacks(record, head), "",
                      source(record, f"`benchmarks/refinement.py --parts {part}`"), ""]
    return lines


def source(record, script):
    """One line that says what was measured where."""
    machine, versions = record["machine"], record["versions"]
    return (f"({script}; {machine['cores']} {machine['cpu']} cores, {machine['platform']}, "
            f"JAX {versions['jax']}, {record['date']}, load average {record['load_average']:.1f}.)")


def main():
    """Replace what stands between the markers."""
    for page, table in ((README, parity), (README, imagenet), (README, refined),
                        (README, efficiency), (REFINEMENT, refinement)):
        name = table.__name__
        block = f"<!-- {name} -->\n" + "\n".join(table()) + f"\n<!-- end of {name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _: block,
                      page.read_text(encoding="utf-8"), flags=re.DOTALL)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
