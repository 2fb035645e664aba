"""The paper's table: many attacks on the same images.

References:
    arXiv 2311.17434, section 5 (tables 1 to 4).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gse_jax import metrics
from gse_jax.attacks import METHODS, default_domain, preset
from gse_jax.evaluation.attack_run import AttackRun, run_attack

_DOMAINS = ("gse_paper", "original", "cifar10", "imagenet", "imagenet_robust")
BUDGETS = (8, 16, 24, 50)  # pixels at which success rates are compared


class Comparison(NamedTuple):
    """One attack of a comparison.

    Attributes:
        method: name of the attack.
        runs: one AttackRun, or one for each offset.
        rows: table rows, plain dictionaries: one, or best / average / worst over the offsets.
    """

    method: str
    runs: tuple[AttackRun, ...]
    rows: tuple[dict[str, Any], ...]


def compare(params, apply_fn, x, y, *, methods: Sequence[str], offsets: Sequence[int] = (),
            domain: str | None = None, bounds=(0.0, 1.0), key=None, lanes: int | None = None,
            num_classes: int | None = None, budgets: Sequence[int] = BUDGETS, ids=None, about=None,
            progress: Callable[[str], Any] | None = None) -> Iterator[Comparison]:
    """Run several attacks on the same images, one after the other.

    Args:
        params, apply_fn, y, bounds, key, lanes: as in `gse_jax.attack`.
        x: as in `gse_jax.attack`; misclassified images are not attacked.
        methods: names of attacks, or one.
        offsets: targeted at label + k modulo the classes for each k; empty for untargeted.
        domain: preset of all attacks that know it, e.g. "original"; None or "gse_paper", and for
            the others, the settings of the paper's comparison at the image size.
        num_classes: K; needed with `offsets`.
        budgets: pixels k at which ASR@k is given.
        ids, about: as in `run_attack`.
        progress: name of the attack that begins -> the `progress` function of `gse_jax.attack`.

    Yields:
        Comparison, in the order of `methods`. The seconds in a row include compilation.

    Raises:
        ValueError: for an unknown method or domain, or offsets that aim at the label or twice at the
            same class; before anything runs.
        ImportError: if scikit-image is missing for a method with superpixels, likewise.
    """
    methods = (methods,) if isinstance(methods, str) else methods
    configurations = configurations_of(methods, domain, np.shape(x)[1:], bool(offsets))
    if offsets:
        if num_classes is None:
            raise ValueError("num_classes is missing; targets are label + offset modulo the classes")
        classes = [offset % num_classes for offset in offsets]
        if 0 in classes or len(set(classes)) < len(classes):
            raise ValueError(f"offsets={tuple(offsets)} must differ modulo {num_classes} classes, and "
                             "none may be a multiple of it")
    y = np.asarray(y)
    for method in methods:
        settings, hyperparams = configurations[method]
        show = progress(method) if progress else None
        options = dict(method=method, settings=settings, hyperparams=hyperparams, bounds=bounds,
                       key=key, lanes=lanes, ids=ids, about=about, progress=show)
        if offsets:
            runs = tuple(run_attack(params, apply_fn, x, y, **options, targets=(
                (y + offset) % num_classes).astype(np.int32)) for offset in offsets)
            yield Comparison(method, runs, _targeted_rows(method, runs))
        else:
            run = run_attack(params, apply_fn, x, y, **options)
            yield Comparison(method, (run,), (_row(method, run, budgets),))


def configurations_of(methods: Sequence[str], domain: str | None, image_shape,
                      targeted: bool) -> dict[str, tuple[Any, Any]]:
    """Return (settings, hyperparams) of many attacks on the same images.

    Args:
        methods: names of attacks.
        domain: as in `compare`.
        image_shape: (H, W, C).
        targeted: direction.

    Returns:
        Method name -> (settings, hyperparams).

    Raises:
        ValueError: for an unknown method or domain, or an attack that cannot take such images.
        ImportError: if scikit-image is missing for a method with superpixels.
    """
    if domain not in (None, *_DOMAINS):
        raise ValueError(f"domain={domain!r} is unknown; use one of "
                         f"{', '.join(map(repr, _DOMAINS))}")
    found = {}
    for method in methods:
        # An unknown name is an error; an attack without this preset takes its default.
        found[method] = preset(method, default_domain(image_shape), targeted)
        if domain not in (None, "gse_paper"):
            with contextlib.suppress(ValueError):
                found[method] = preset(method, domain, targeted)
        METHODS[method].check(*found[method], tuple(image_shape))
        if METHODS[method].segment is not None:
            # Without images: whether scikit-image is there, if these settings need it.
            METHODS[method].segment(found[method][0], np.zeros((0, *image_shape), np.float32))
    return found


def _row(method, run, budgets):
    numbers = run.summary()
    rates = np.asarray(metrics.success_at_k(run.metrics().changed_pixels, run.found, np.asarray(budgets),
                                            attacked=run.attacked))
    return {"attack": method, "attacked": numbers.num_attacked, "ASR": numbers.asr_attacked,
            **{name: getattr(numbers, field).mean for name, field in metrics.SPARSITY.items()},
            "gradients": numbers.gradient_evals.mean, "forwards": numbers.forward_evals.mean,
            "s/image": run.about["seconds"] / max(numbers.num_attacked, 1),
            **{f"ASR@{k}": float(rate) if numbers.num_attacked else None for k, rate in zip(budgets, rates)}}


def _targeted_rows(method, runs):
    measured = [run.metrics() for run in runs]
    found, attacked = (np.stack([getattr(run, name) for run in runs]) for name in ("found", "attacked"))
    cases = {name: metrics.targeted_protocol(np.stack([getattr(m, field) for m in measured]),
                                             found, attacked=attacked)
             for name, field in metrics.SPARSITY.items()}
    pairs = max(int(attacked.sum()), 1)
    spent = {name: sum(int(getattr(run, field).sum()) for run in runs) / pairs
             for name, field in (("gradients", "gradient_evals"), ("forwards", "forward_evals"))}
    seconds = sum(run.about["seconds"] for run in runs) / pairs
    return tuple({"attack": method, "over targets": kind, "attacked": getattr(cases["ACP"], kind).total,
                  "ASR": getattr(cases["ACP"], kind).success_rate,
                  **{name: getattr(case, kind).metric.mean for name, case in cases.items()},
                  **spent, "s/image": seconds} for kind in ("best", "average", "worst"))
