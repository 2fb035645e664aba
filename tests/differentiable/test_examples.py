"""The examples in reduced form: the benchmarks' `--smoke`, and the notebook's cells."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_differentiate_through_the_attack.ipynb"
SCRIPTS = ("adversarial_training", "hypergradient_tuning", "reverse_memory")


def run(arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmarks_run(script):
    assert run([f"benchmarks/{script}.py", "--smoke"]).strip()


@pytest.mark.slow
def test_notebook_runs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "larger groups" in run(["-c", code])


def test_notebook_is_well_formed_and_cites_the_paper():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
    text = "".join("".join(c["source"]) for c in notebook["cells"])
    assert "2311.17434" in text
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["outputs"] == [] and cell["execution_count"] is None
