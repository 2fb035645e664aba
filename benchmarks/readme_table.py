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
    record = json.loads((RESULTS / "efficiency_1_device.json").read_text())
    row = min(record["rows"], key=lambda r: r["ratio_with_idle_lanes"])
    return [f"On one CPU device with {row['lanes']} lanes the whole attack takes "
            f"{row['ratio_with_idle_lanes']:.2f} times what the bare jitted value-and-gradient of the "
            f"same batch takes for the evaluations that its lanes made, {row['ratio']:.2f} times "
            "without counting lanes that were idle in the tail.", "",
            source(record, "`benchmarks/efficiency.py`, better of two runs")]


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
