"""What the notebooks hold; `notebooks/run.py` itself executes them in CI."""

import ast
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TITLES = ("00_quick_start", "01_gse_step_by_step", "02_compare_attacks", "03_explain_a_decision",
          "04_scale_out", "05_differentiate_through_the_attack")


def test_numbered_and_small_enough_for_a_code_host():
    assert tuple(path.stem for path in NOTEBOOKS) == TITLES
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_well_formed(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert all(output["output_type"] in ("stream", "display_data")
                       for output in cell["outputs"])
    words = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert "arXiv 2311.17434" in words or path.stem == "04_scale_out"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_are_kept(path):
    """A reader on a code host sees them without running anything."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    pictures = [output["data"]["image/png"] for cell in cells for output in cell.get("outputs", ())
                if "image/png" in output.get("data", ())]
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def execute(path, *sources, options=()):
    cells = [{"cell_type": "code", "id": str(i), "metadata": {}, "execution_count": None,
              "outputs": [], "source": source} for i, source in enumerate(sources)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4,
                                "nbformat_minor": 5}))
    done = subprocess.run([sys.executable, FOLDER / "run.py", *options, path], capture_output=True,
                          text=True, env=os.environ)
    return done, json.loads(path.read_text())["cells"]


def test_the_runner_keeps_text_and_pictures(tmp_path):
    done, cells = execute(
        tmp_path / "a.ipynb", "a = 3\nprint('first')\na + 4",
        "import matplotlib.pyplot as plt\nplt.plot([0, a])\nplt.show()",
        "from matplotlib.figure import Figure\nFigure()", "a;\nb = a", options=["--write"])
    assert done.returncode == 0 and "first\n7\n" in done.stdout
    assert "".join(cells[0]["outputs"][0]["text"]) == "first\n7\n"
    for cell in cells[1:3]:
        assert [output["output_type"] for output in cell["outputs"]][-1] == "display_data"
    assert cells[3]["outputs"] == [] and cells[3]["execution_count"] == 4


@pytest.mark.parametrize("bad", ["1 / 0", "assert False", "import warnings\nwarnings.warn('x')"])
def test_the_runner_fails_with_a_cell_and_leaves_the_file(tmp_path, bad):
    done, cells = execute(tmp_path / "a.ipynb", "print('fine')", bad, options=["--write"])
    assert done.returncode != 0 and "a.ipynb, cell 2" in done.stderr
    assert all(cell["outputs"] == [] for cell in cells)
