"""Side by side with PyTorch attacks: the same network, weights and images, in turn, as ratios.

    pip install torch safetensors adv-lib torchattacks foolbox      # whichever you want to compare with
    python benchmarks/versus.py [--num 16] [--only adv_lib.str_attack]
    python benchmarks/versus.py --attack my_attack.py:attack=gse
    python benchmarks/versus.py --published GSE     # git clone https://github.com/wagnermoritz/GSE

Peers that are not installed are left out and named. `--attack FILE:FUNCTION=METHOD` runs
FUNCTION(model, images [N, C, H, W] in [0, 1], labels) -> adversarial images against our METHOD.
`--published FOLDER` runs GSE from the repository of its authors, with the same settings as ours, untargeted
and targeted at label + 1 (it imports torchvision and scikit-image).
Both attack the same correctly classified images in [0, 1], both on all cores; theirs in one batch
of `--batch`. Ours is compiled before; theirs has a first call on one image. Each pair runs
`--repeats` times in turn, short ones up to ten times, and the ratio is that of the medians. With a
GPU both are on it, multiplying in float32. A run with `--only` or `--attack` is written where `--out` says,
and nowhere without it; `--published` has a file of its own.
"""

import functools
import importlib.util
import time
from pathlib import Path

import numpy as np

import results_file

ENOUGH = 30.0  # seconds of pairs, where they are short
METRICS = ("ASR", "ACP", "ANC", "l2", "d20")


def adv_lib(module, function, **options):
    """A function of adv-lib, loaded past the package's own imports, which need torchvision."""
    spec = importlib.util.find_spec("adv_lib")
    if spec is None:
        raise ImportError("adv_lib")
    file = Path(spec.submodule_search_locations[0]) / "attacks" / f"{module}.py"
    return functools.partial(from_file(file, function), **options)


def from_file(file, function):
    """A function of a Python file."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def torchattacks(name, **options):
    """An attack of torchattacks."""
    import torchattacks as library

    return lambda model, x, y: getattr(library, name)(model, **options)(x, y)


def foolbox_pgd():
    """Foolbox's PGD with the settings of ours."""
    import foolbox

    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=40, random_start=True)
    return lambda model, x, y: attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y,
                                      epsilons=8 / 255)[1]


def published(folder, targeted):
    """GSE from its authors' repository, which takes images in [-1, 1], with the settings of our preset."""
    import torch

    import gse_jax

    attack = from_file(Path(folder) / "attacks.py", "GSEAttack")
    settings, hyperparams = gse_jax.preset("gse", "cifar10", targeted=targeted)
    to_unit_range = type("ToUnitRange", (torch.nn.Module,), {"forward": lambda self, x: (x + 1) / 2})

    def run(model, x, labels):
        network, shifted = torch.nn.Sequential(to_unit_range(), model), 2 * x - 1
        found = attack(network, targeted=targeted, mu=hyperparams.mu, q=hyperparams.q,
                       sigma=hyperparams.step_size, k_hat=settings.phase1_steps)(shifted, labels)
        return torch.where(found == shifted, x, to_unit_range()(found))  # what it left alone is not rounded

    return run


def peers():
    """Name -> (our method, changes of our settings, function that returns theirs)."""
    return {
        # Theirs retrains for 400 steps, whatever max_iterations is.
        "adv_lib.str_attack": ("strattack", {"retrain_steps": 400}, lambda: adv_lib(
            "structured_adversarial_attack", "str_attack", initial_const=0.25,
            binary_search_steps=8, max_iterations=200)),
        "adv_lib.sigma_zero": ("sigma_zero", {"max_steps": 100}, lambda: adv_lib(
            "sigma_zero", "sigma_zero", num_steps=100)),
        "torchattacks.SparseFool": ("sigma_zero", {"max_steps": 100}, lambda: torchattacks(
            "SparseFool")),
        "torchattacks.Pixle": ("sparse_rs", {}, lambda: torchattacks("Pixle")),
        "foolbox.LinfPGD": ("pgd", {"max_steps": 40}, foolbox_pgd),
    }


def measured(run, x, fools, apply_fn, params):
    """Seconds per image and the metrics of one run."""
    from gse_jax import metrics

    start = time.perf_counter()
    adversarials = run()
    seconds = (time.perf_counter() - start) / len(x)
    fooled = fools(np.asarray(apply_fn(params, adversarials).argmax(-1)))
    numbers = metrics.image_metrics(x, adversarials)
    means = [float(values[fooled].mean()) if fooled.any() else float("nan") for values in
             (numbers.changed_pixels, numbers.num_clusters, numbers.l2, numbers.patch_count)]
    return seconds, dict(zip(METRICS, (float(fooled.mean()), *means)))


def to_torch(x):
    """Images as PyTorch wants them, on its device."""
    import torch

    images = torch.from_numpy(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))))
    return images.to("cuda" if torch.cuda.is_available() else "cpu")


def compare(name, method, changes, theirs, model, case, args, targets=None):
    """One row: theirs and ours in turn."""
    import dataclasses

    import torch

    import gse_jax

    params, apply_fn, x, y = case
    settings, _ = gse_jax.preset(method, "cifar10", targeted=targets is not None)
    settings = dataclasses.replace(settings, **changes)
    images = to_torch(x)
    wanted = y if targets is None else targets
    labels = torch.from_numpy(np.asarray(wanted, np.int64)).to(images.device)
    fools = wanted.__ne__ if targets is None else wanted.__eq__

    def run_theirs(count=None):
        parts = [theirs(model, images[i:i + args.batch], labels[i:i + args.batch]).detach()
                 for i in range(0, count or len(x), args.batch)]
        return torch.cat(parts).cpu().numpy().transpose(0, 2, 3, 1)

    def run_ours():
        result = gse_jax.attack(params, apply_fn, x, y, targets=targets, method=method, settings=settings, key=0)
        gradients.append(float(np.mean(result.gradient_evals)))
        return np.asarray(result.adversarials)

    gradients = []  # per image, of each of our runs
    run_ours()
    theirs(model, images[:1], labels[:1])
    pairs, end = [], time.perf_counter() + (0.0 if args.smoke else ENOUGH)
    while len(pairs) < args.repeats or (time.perf_counter() < end and len(pairs) < 10):
        pairs.append([measured(run, x, fools, apply_fn, params) for run in (run_theirs, run_ours)])
    all_seconds = np.asarray([[s for s, _ in pair] for pair in pairs])
    seconds, ratios = np.median(all_seconds, axis=0), all_seconds[:, 0] / all_seconds[:, 1]
    row = {"peer": name, "method": method, "images": len(x),
           "theirs_seconds_per_image": float(seconds[0]),
           "ours_seconds_per_image": float(seconds[1]), "ratio": float(seconds[0] / seconds[1]),
           "lowest_ratio": float(ratios.min()), "highest_ratio": float(ratios.max()), "pairs": len(pairs),
           "ours_gradients": gradients[-1]}
    for word, (_, values) in zip(("theirs", "ours"), pairs[-1]):
        row |= {f"{word}_{metric}": value for metric, value in values.items()}
    return row


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=16)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=2, help="at least")
    arguments.add_argument("--only", nargs="*", help="names of peers")
    arguments.add_argument("--attack", metavar="FILE:FUNCTION=METHOD", help="a PyTorch attack")
    arguments.add_argument("--published", metavar="FOLDER", help="a clone of the GSE authors' repository")
    args = arguments.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed, so there is no peer to compare with")
        return
    import jax
    import torch
    from safetensors.torch import load_file

    import gse_jax
    import torch_resnet
    from gse_jax import data, models

    gse_jax.use_all_cpu_cores()
    folder = results_file.SHARED / "data" / "cifar10"
    weights = folder / "resnet20_gse_authors.safetensors"
    if not weights.is_file():
        print(f"{weights} is not there; nothing is compared")
        return
    apply_fn, params = models.load("resnet20", weights=weights, normalize=(0.5, 0.5))
    images = data.load(f"npz:{folder / 'test_0000_0399.npz'}", limit=2 * args.num)
    right = np.asarray(apply_fn(params, images.images).argmax(-1)) == images.labels
    x, y = (a[right][:2 if args.smoke else args.num] for a in (images.images, images.labels))
    torch.backends.cudnn.allow_tf32 = False  # as ours
    jax.config.update("jax_default_matmul_precision", "highest")
    network = torch_resnet.load(load_file(weights)).to(to_torch(images.images[:1]).device)

    def model(images):
        return network((images - 0.5) / 0.5)

    # A module, for peers that ask for `.eval()` or parameters.
    model = type("Normalised", (torch.nn.Module,), {"forward": staticmethod(model)})()
    model.network = network
    # Some peers restore the mode they find; training mode would normalise with statistics of the batch.
    model.eval()
    difference = np.abs(np.asarray(apply_fn(params, x)) - model(
        to_torch(x)).detach().cpu().numpy()).max()
    assert difference < 1e-3, f"the two networks differ by {difference}"
    chosen = peers()
    if args.attack:
        file, _, rest = args.attack.rpartition(":")
        function, _, method = rest.partition("=")
        chosen = {args.attack: (method or "gse", {}, lambda: from_file(file, function))}
    targets = {}
    if args.published:
        chosen = {f"published GSE, {word}": ("gse", {}, functools.partial(published, args.published, targeted))
                  for word, targeted in (("untargeted", False), ("targeted, label + 1", True))}
        targets = {"published GSE, targeted, label + 1": (y + 1) % 10}
    rows = []
    for name, (method, changes, make) in chosen.items():
        if args.only and name not in args.only:
            continue
        try:
            theirs = make()
        except ImportError as error:
            print(f"{name} left out: {error}")
            continue
        rows.append(compare(name, method, changes, theirs, model, (params, apply_fn, x, y), args, targets.get(name)))
        rows[-1]["torch"] = torch.__version__
        results_file.show(rows[-1])
    if args.published or not (args.only or args.attack) or args.out != arguments.get_default("out"):  # the page has all peers
        results_file.write("versus_published" if args.published else "versus", args, rows)


if __name__ == "__main__":
    main()
