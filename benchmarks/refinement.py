"""GSE with refinement: its bars, its front against every rival, its ablation, and other attacks refined.

    python benchmarks/refinement.py [--num 64] [--parts front targeted network others ablation]

Needs the CIFAR-10 images and networks (folder named by GSE_JAX_SHARED); without them, and with
--smoke, the embedded digits. Means are over the correctly classified of the first `num` images.
"""

import dataclasses
import math
import time

import numpy as np

import gse_jax
import results_file
from gse_jax import metrics

CAPS = (math.inf, 3.0, 1.5, 1.0, 0.8, 0.65, 0.55, 0.45)
RIVALS = {"gse": [{}], "sigma_zero": [{"max_steps": 100}, {"max_steps": 300}, {"max_steps": 1000}],
          "sparse_pgd": [{"num_pixels": 10}, {"num_pixels": 20}], "gsmd": [{}]}
# StrAttack with the savings that are off by default: a third of the time.
OTHERS = {"strattack": {"test_interval": 2, "gradient_interval": 2, "retrain_patience": 20}, "fwnucl": {},
          "sparse_rs": {}}
# What is taken away from the default, one at a time.
ABLATION = {"as shipped": {}, "one walk (blur 3)": {"scales": (3.0,)},
            "three walks, all with blur 3": {"scales": (3.0,) * 3},
            "without relocate": {"moves": ("shrink", "thin")},
            "without thin": {"moves": ("shrink", "relocate")},
            "without shrink": {"moves": ("relocate", "thin")},
            "after GSE's whole search": {"search_runs": 10}}


class Case:
    """A model, images and a direction; measures attacks into rows."""

    def __init__(self, args, network="authors", targeted=False):
        """Load the network and the images."""
        self.model = results_file.network_and_images(2 if args.smoke else args.num, network)
        self.params, self.apply_fn, self.x, self.y, self.bounds, self.name = self.model
        classes = np.asarray(self.apply_fn(self.params, self.x[:1])).shape[-1]
        self.targets = (np.asarray(self.y) + 1) % classes if targeted else None
        self.targeted, self.smoke, self.rows = targeted, args.smoke, []
        self.patch_counts = []  # of each row's images, NaN where it did not succeed

    def attack(self, label, method="gse_refined", **changes):
        """Attack with changes to the preset, print and keep the row."""
        settings, hyperparams = gse_jax.preset(method, "cifar10", self.targeted)
        fields = {f.name for f in dataclasses.fields(settings)}
        if self.smoke:
            changes |= {k: v for k, v in (("max_evals", 12), ("max_steps", 3), ("num_runs", 2),
                                          ("num_boosted_runs", 0)) if k in fields}
        settings = dataclasses.replace(settings, **{k: v for k, v in changes.items() if k in fields})
        hyperparams = hyperparams._replace(**{k: v for k, v in changes.items() if k not in fields})
        start = time.perf_counter()
        result = gse_jax.attack(self.params, self.apply_fn, self.x, self.y, targets=self.targets,
                                method=method, settings=settings, hyperparams=hyperparams,
                                bounds=self.bounds)
        self.note(label, result, time.perf_counter() - start)
        return result

    def refine(self, label, result, **options):
        """Refine a result, print and keep the row."""
        start = time.perf_counter()
        refined = gse_jax.refine(self.params, self.apply_fn, self.x, result.adversarials, self.y,
                                 targets=self.targets, bounds=self.bounds, **options)
        self.note(label, refined, time.perf_counter() - start)

    def note(self, label, result, seconds):
        """Print and keep one row; success is judged by a fresh forward pass."""
        predicted = np.asarray(self.apply_fn(self.params, result.adversarials).argmax(-1))
        fooled = predicted == self.targets if self.targeted else predicted != np.asarray(self.y)
        numbers = metrics.image_metrics(self.x, result.adversarials, bounds=self.bounds)
        of = lambda values: float(np.mean(values[fooled])) if fooled.any() else math.nan
        self.patch_counts.append(np.where(fooled, numbers.patch_count, math.nan))
        self.rows.append({
            "model": self.name, "images": len(self.x), "targeted": self.targeted, "attack": label,
            "ASR": float(fooled.mean()), "ACP": of(numbers.changed_pixels),
            "ANC": of(numbers.num_clusters), "l2": of(numbers.l2), "d20": of(numbers.patch_count),
            "gradients": float(np.mean(result.gradient_evals)),
            "forwards": float(np.mean(result.forward_evals)),
            "seconds_per_image_with_compilation": seconds / len(self.x)})
        results_file.show(self.rows[-1])


def front(args):
    """The front over the cap on the l2 norm, and the rivals."""
    case = Case(args)
    for cap in CAPS[:2] if args.smoke else CAPS:
        case.attack("gse_refined" if cap == math.inf else f"gse_refined, l2 <= {cap:g}", max_l2=cap)
    for method, changes in RIVALS.items():
        for change in changes[:method == "gse"] if args.smoke else changes:
            words = ", ".join(f"{k} {v}" for k, v in change.items())
            case.attack(f"{method}, {words}" if words else method, method, **change)
    return case.rows


def targeted(args):
    """Label + 1."""
    case = Case(args, targeted=True)
    case.attack("gse", "gse")
    for cap in (math.inf,) if args.smoke else (math.inf, 1.25):
        case.attack("gse_refined" if cap == math.inf else f"gse_refined, l2 <= {cap:g}", max_l2=cap)
    return case.rows


def network(args):
    """The same settings on another network."""
    rows = []
    for direction in (False,) if args.smoke else (False, True):
        case = Case(args, "imagenet_norm", direction)
        case.attack("gse", "gse")
        case.attack("gse_refined")
        cap = 1.25 if direction else 0.9
        case.attack(f"gse_refined, l2 <= {cap:g}", max_l2=cap)
        rows += case.rows
    return rows


def others(args):
    """What refinement makes of the results of other attacks, free and at their own norms."""
    case = Case(args)
    for method in ("sparse_rs",) if args.smoke else OTHERS:
        result = case.attack(method, method, **OTHERS[method])
        case.refine(f"{method}, refined", result, max_evals=12 if args.smoke else 200)
    return case.rows


def ablation(args):
    """One change at a time."""
    case = Case(args)
    for label, changes in list(ABLATION.items())[:2 if args.smoke else None]:
        case.attack(label, **changes)
        difference = case.patch_counts[-1] - case.patch_counts[0]  # image by image: less noise than of two means
        difference = difference[np.isfinite(difference)]
        case.rows[-1] |= {"d20_more": float(difference.mean()), "d20_more_standard_error": float(
            difference.std(ddof=1) / math.sqrt(len(difference)))}
        results_file.show({k: v for k, v in case.rows[-1].items() if "d20_more" in k})
    return case.rows


PARTS = {part.__name__: part for part in (front, targeted, network, others, ablation)}


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=64)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = arguments.parse_args()
    gse_jax.use_all_cpu_cores()
    for part in args.parts[:1] if args.smoke else args.parts:
        print(f"-- {part}", flush=True)
        results_file.write(f"refinement_{part}", args, PARTS[part](args))


if __name__ == "__main__":
    main()
