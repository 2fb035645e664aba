"""The pages' code runs, their commands parse, their links lead somewhere."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gse_jax.cli.main import _parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "gse_jax" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# What the README's snippets take for granted. No JAX array: they choose the devices first.
README_STARTS_WITH = """
import jax
import numpy as np

x = np.random.default_rng(0).uniform(0.2, 0.8, (3, 16, 16, 3)).astype(np.float32)
params = np.random.default_rng(1).standard_normal((768, 10)).astype(np.float32)
y = ((x - 0.5).reshape(3, -1) @ params).argmax(-1)


def apply_fn(params, x):
    return jax.nn.softplus((x - 0.5).reshape(x.shape[0], -1) @ params)
"""
BLOCK = re.compile(r"(?:<!-- not run where .*?: (?P<needs>.*?) -->\n)?"
                   r"```python\n(?P<code>.*?)```", re.DOTALL)


def code_of(path, without=()):
    """The page's Python, one program; blocks that need a missing package, or have such a word, left out."""
    parts = []
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        needs = (match["needs"] or "").split(", ")
        if all(not name or importlib.util.find_spec(name) for name in needs) and not any(
                word in match["code"] for word in without):
            parts.append(match["code"])
    return "\n".join(parts)


@pytest.mark.parametrize("path, without", [
    pytest.param(ROOT / "README.md", ("differentiable", "refine"), id="README, what compiles fast"),
    *(pytest.param(p, (), marks=pytest.mark.slow, id=p.stem) for p in (ROOT / "README.md", *PAGES) if code_of(p))])
def test_code_of_the_page_runs(path, without):
    start = README_STARTS_WITH if path.parent == ROOT else ""
    if path.stem == "your_own_model":
        pytest.importorskip("equinox")
        pytest.importorskip("haiku")
    done = subprocess.run([sys.executable, "-W", "error", "-c", start + code_of(path, without)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_commands_of_the_page_are_valid(path, capsys):
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] == "gse-jax":
                try:
                    _parser().parse_args(words[1:])
                except SystemExit:
                    pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_links_and_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:gse_jax|benchmarks|notebooks|tests)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name


def test_questions_that_the_page_on_gse_must_answer():
    headings = re.findall(r"^## (.*)$", (DOCS / "how_gse_works.md").read_text(), re.MULTILINE)
    for words in ("regulariser and Nesterov", "prox of the half-quasinorm", "grows groups",
                  "without a constraint", "speed comes from", "on a grid", "which pixels move"):
        assert any(words in heading for heading in headings), words


def test_tables_are_those_of_the_results():
    """Whoever measures anew writes the pages anew."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
