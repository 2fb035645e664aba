"""What all benchmarks share: where results go, and on what they were measured."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import gse_jax

SHARED = Path(os.environ.get("GSE_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
_RESULTS = Path(__file__).parent / "results"  # whose tables are captioned CIFAR-10
_instead = False  # whether the digits stood in for it

# ImageNet's mean and standard deviation, for images in [-1, 1].
_SHIFTED = tuple([2.0 * value - offset for value in values] for values, offset in
                 (((0.485, 0.456, 0.406), 1.0), ((0.229, 0.224, 0.225), 0.0)))


def parser(description):
    """Arguments that every benchmark has."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    arguments.add_argument("--out", default=str(_RESULTS))
    return arguments


def write(name, args, rows):
    """Write the rows with machine, versions, commit and date; smoke results are not kept.

    Results of an accelerator go to files of their own: `<name>_gpu.json`.
    """
    folder = Path(args.out)
    digits = _instead or any(str(row.get("network", "")).startswith("digits") for row in rows)  # of a child process
    if digits and not args.smoke and folder.resolve() == _RESULTS.resolve():
        print("not written: these are the digits; --out FOLDER keeps them", file=sys.stderr)
        return
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "platform": jax.default_backend(), "devices": jax.local_device_count(),
               "device_kind": jax.devices()[0].device_kind}
    versions = {"gse_jax": gse_jax.__version__, "jax": jax.__version__,
                "python": platform.python_version(), "numpy": np.__version__}
    command = " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    command = command.replace(f" --out {args.out}", "")
    record = {"command": command, "commit": _commit(), "date": datetime.date.today().isoformat(),
              "machine": machine, "versions": versions, "load_average": os.getloadavg()[0], "rows": rows}
    content = json.dumps(record, indent=1) + "\n"
    if args.smoke:
        return
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if jax.default_backend() == "cpu" else f"_{jax.default_backend()}"
    (folder / f"{name}{suffix}.json").write_text(content, encoding="utf-8")


def _commit():
    """The commit that is measured, with a + where files differ from it; None outside a repository."""
    git = lambda *words: subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../gse_jax", ".", ":!results").stdout.strip()
    return head + "+" * bool(changed) if head else None


def use_one_accelerator():
    """Work on the first one alone, where there are several: what is read is read of it."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_device", jax.devices()[0])


def backend():
    """The platform, asked in another process: this one leaves the device to those that measure."""
    found = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"],
                           check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip()


def wait_for_devices():
    """Return when the devices are at nothing: an attack tells of a stretch when they have begun the next."""
    jax.block_until_ready(jax.live_arrays())


def show(row, file=None):
    """Print one row of the table."""
    print(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in row.items()), flush=True, file=file)


def network_and_images(count, network="authors"):
    """(params, apply_fn, x, y, bounds, name): a CIFAR-10 ResNet-20, else the digits'; for `--smoke` `_tiny`.

    "authors" is the paper's, "imagenet_norm" another one that normalises with ImageNet's means.
    """
    from gse_jax import data, models

    if "--smoke" in sys.argv:
        return _tiny(data.load("digits", limit=count).images)
    folder = SHARED / "data" / "cifar10"
    if folder.is_dir():
        file, normalize, name = {
            "authors": ("resnet20_gse_authors", (0.0, 1.0), "CIFAR-10, authors' ResNet-20"),
            "imagenet_norm": ("resnet20_imagenet_norm", _SHIFTED, "CIFAR-10, another ResNet-20"),
        }[network]
        apply_fn, params = models.load("resnet20", weights=folder / f"{file}.safetensors",
                                       normalize=normalize)
        file = np.load(folder / "test_0000_0399.npz")
        x, y = file["x"].astype("f4") / np.float32(127.5) - 1, file["y"].astype("i4")
        bounds = (-1.0, 1.0)
    else:
        global _instead
        _instead = True
        print(f"no CIFAR-10 images in {folder}: the digits instead (benchmarks/README.md)", file=sys.stderr)
        apply_fn, params = models.load("resnet20", weights="digits")
        x, y, *_ = data.load("digits")
        bounds, name = (0.0, 1.0), "digits, ResNet-20"
    x, y = x[:count], y[:count]
    with jax.default_matmul_precision("highest"):  # as the attack will see it
        correct = np.asarray(apply_fn(params, x).argmax(-1)) == y
    return params, apply_fn, x[correct], y[correct], bounds, name


def _tiny(x):
    """Two convolutions with random weights, which compile in no time; what they say are the labels."""
    generator = np.random.default_rng(0)
    params = [generator.standard_normal(shape).astype("f4") / 5 for shape in ((3, 3, 3, 8), (3, 3, 8, 8), (512, 10))]

    def apply_fn(params, x):
        *kernels, dense = params
        for kernel in kernels:
            x = jax.nn.relu(jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return x.reshape(len(x), -1) @ dense

    return params, apply_fn, x, np.asarray(apply_fn(params, x).argmax(-1)), (0.0, 1.0), "two convolutions"
