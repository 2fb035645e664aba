"""Execute notebooks without Jupyter, as CI does: the code cells in order, warnings being errors.

    python notebooks/run.py [notebooks/00_quick_start.ipynb ...]
    python notebooks/run.py --write notebooks/0[0-4]*.ipynb      # keep text and pictures in them

Each notebook runs in a process of its own. Shown are what a cell prints, pictures of pyplot, and
a figure or another value on the cell's last line, as in Jupyter.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DPI = 160


def picture(figure):
    """A figure as an output of nbformat 4."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return {"data": {"image/png": base64.b64encode(buffer.getvalue()).decode(),
                     "text/plain": ["<Figure>"]}, "metadata": {}, "output_type": "display_data"}


def execute(source, name, scope):
    """Run one cell; return its outputs."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, outputs, value = io.StringIO(), [], None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), scope)
    if "matplotlib.pyplot" in sys.modules:
        pyplot = sys.modules["matplotlib.pyplot"]
        outputs += [picture(pyplot.figure(number)) for number in pyplot.get_fignums()]
        pyplot.close("all")
    if hasattr(value, "savefig"):
        outputs.append(picture(value))
    elif value is not None:
        print(repr(value), file=printed)
    text = printed.getvalue()
    if text:
        outputs.insert(0, {"name": "stdout", "output_type": "stream",
                           "text": text.splitlines(keepends=True)})
    return outputs


def run(path, write):
    """Run one notebook in this process."""
    warnings.simplefilter("error")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    scope = {"__name__": "__main__"}
    for number, cell in enumerate(code, 1):
        cell["outputs"] = execute("".join(cell["source"]), f"{path.name}, cell {number}", scope)
        cell["execution_count"] = number
        for output in cell["outputs"]:
            print("".join(output.get("text", "")), end="")
    if write:
        path.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")


def main():
    """Run each notebook in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return run(args.paths[0], args.write)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        # Several notebooks compile the same attack: one pays for all.
        environment = os.environ | {
            "MPLBACKEND": "agg", "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        for notebook in args.paths or sorted(Path(__file__).parent.glob("*.ipynb")):
            begin, spent = time.perf_counter(), sum(os.times()[2:4])
            subprocess.run([sys.executable, __file__, "--here", *["--write"] * args.write,
                            notebook], check=True, env=environment)
            print(f"{notebook.name}: {time.perf_counter() - begin:.0f} s, "
                  f"{sum(os.times()[2:4]) - spent:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
