"""The mechanical conventions of the code base, as tests."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gse_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Which rooms a room may import; what is not listed here is not allowed.
EDGES = {
    "types": set(),
    "devices": set(),
    "ops": {"ops", "types"},
    "attacks": {"attacks", "ops", "types", "devices"},
    "metrics": {"metrics", "ops", "types"},
    "differentiable": {"differentiable", "attacks", "metrics", "ops", "types", "devices"},
    "models": {"models", "data", "types"},
    "data": {"data", "types"},
    "report": {"report", "types"},
    "evaluation": {"evaluation", "attacks", "metrics", "models", "data", "ops", "types", "devices"},
    "cli": {"attacks", "data", "devices", "evaluation", "metrics", "models", "report", "types",
            "cli"},
}
BANNED_NAMES = {"eps", "epsilon", "n_iter", "num_steps_total", "max_iter", "iters", "x_adv",
                "adv_x", "lam", "lambda_", "num_iter", "niter", "nb_iter"}
LOOPS = {"attacks/loops.py"}
# Loops outside the drivers, each with its reason in a comment beside it.
LOOPS_ALLOWED = {"attacks/convolutions.py", "attacks/gse/search.py", "ops/bregman.py",
                 "ops/clusters.py", "ops/superpixels.py"}


def room(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def name(path):
    return str(path.relative_to(PACKAGE))


def public_functions(tree):
    """Public functions and classes, methods of public classes included."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef)
                            and not n.name.startswith("_"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    if name(path) == "__init__.py":
        return
    imported = set()
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gse_jax"):
            parts = node.module.split(".")
            imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gse_jax.")}
    rooms = {i for i in imported if (PACKAGE / i).is_dir() or (PACKAGE / f"{i}.py").exists()}
    assert rooms <= EDGES[room(path)], f"{name(path)} imports {rooms - EDGES[room(path)]}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.FunctionDef):
            nested = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            lines -= sum(n.end_lineno - n.lineno + 1 for n in nested)
            assert lines <= 60, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_words(path):
    tree, text = MODULES[path], path.read_text(encoding="utf-8")
    assert path.stem not in {"utils", "helpers", "misc", "common", "util", "tools"}
    assert ast.get_docstring(tree), f"{name(path)} has no module docstring"
    for node in public_functions(tree):
        assert ast.get_docstring(node), f"{name(path)}: {node.name} has no docstring"
    identifiers = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert all(i.isascii() for i in identifiers)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert not BANNED_NAMES & {a.arg for a in arguments}, f"{name(path)}: {node.name}"
    assert "PRNGKey(" not in text and "allow_pickle=True" not in text
    assert not re.search(r"^\s*(import|from) pickle", text, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_loops_live_in_the_drivers(path):
    calls = {node.attr for node in ast.walk(MODULES[path]) if isinstance(node, ast.Attribute)}
    if calls & {"while_loop", "fori_loop", "scan"}:
        assert name(path) in LOOPS | LOOPS_ALLOWED


def test_rooms_only_re_export():
    for path in PACKAGE.glob("*/__init__.py"):
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
        assert all(isinstance(node, allowed) for node in MODULES[path].body), name(path)
        assert any(isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
                   for node in MODULES[path].body), name(path)


def test_states_document_every_field():
    checked = 0
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(
                    getattr(base, "id", "") == "NamedTuple" for base in node.bases):
                if node.name.startswith("_") or node.name == "Outcome":  # AttackResult's fields
                    continue
                docstring = ast.get_docstring(node) or ""
                for field in (f.target.id for f in node.body if isinstance(f, ast.AnnAssign)):
                    assert re.search(rf"\b{field}\b", docstring), f"{name(path)}: {node.name}.{field}"
                    checked += 1
    assert checked > 30


@pytest.mark.parametrize("folder", ["ops", "attacks/gse"])
def test_formulas_cite_their_source(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem not in {"__init__", "neighbours"}:
            assert "References:" in path.read_text(encoding="utf-8"), name(path)


def test_version_is_in_the_changelog():
    import gse_jax

    changelog = (PACKAGE / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {gse_jax.__version__}" in changelog
