"""Write README's tables from benchmarks/results/*.json, between their markers.

    python benchmarks/readme_table.py
"""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"


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


def source(record, script):
    """One line that says what was measured where."""
    machine, versions = record["machine"], record["versions"]
    return (f"({script}; {machine['cores']} {machine['cpu']} cores, {machine['platform']}, "
            f"JAX {versions['jax']}, {record['date']}, load average {record['load_average']:.1f}.)")


def main():
    """Replace what stands between the markers."""
    text = README.read_text(encoding="utf-8")
    for name, lines in (("parity", parity()), ("efficiency", efficiency())):
        block = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end of {name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _: block, text,
                      flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
