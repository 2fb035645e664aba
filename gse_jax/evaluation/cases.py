"""The cases of a plan, with every setting resolved: what each record belongs to.

Cases of one attack that differ only in their target share a stream of the lane engine, so that
lanes stay full from one target to the next.
"""

import csv
import dataclasses
import json
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gse_jax.attacks import default_domain
from gse_jax.attacks.registry import find_method
from gse_jax.evaluation.plan import AttackPlan, Plan, as_tuple


class Case(NamedTuple):
    """One row of the final table.

    Attributes:
        name: e.g. "gse/untargeted", "gse/targeted+1", "gse/targeted_file".
        offset: k of target = (label + k) modulo the classes; 0 where not used.
        targets: sample id -> target, from a target file; None otherwise.
    """

    name: str
    offset: int
    targets: dict[str, int] | None

    def target(self, sample_id: str, label: int, num_classes: int) -> int:
        """Return the class to aim at, or -1 in an untargeted case.

        Args:
            sample_id: the sample.
            label: its true label.
            num_classes: K.

        Returns:
            Class index or -1.

        Raises:
            ValueError: if the file names no target, one out of range or the label itself.
        """
        if self.targets is None:
            return (label + self.offset) % num_classes if self.offset else -1
        target = self.targets.get(sample_id)
        if target is None:
            raise ValueError(f"target_file names no target for sample {sample_id!r}")
        if not 0 <= target < num_classes or target == label:
            raise ValueError(f"target_file gives sample {sample_id!r} (label {label}) the target "
                             f"{target}, expected another class in [0, {num_classes - 1}]")
        return target


class Group(NamedTuple):
    """One attack with its cases; picklable.

    Attributes:
        method: name of the attack.
        settings: its static configuration.
        hyperparams: its traced configuration, floats.
        preset: domain of the preset it started from.
        targeted: direction.
        cases: at least one.
    """

    method: str
    settings: Any
    hyperparams: Any
    preset: str
    targeted: bool
    cases: tuple[Case, ...]

    def describe(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, for fingerprint and manifest."""
        return {"method": self.method, "preset": self.preset, "targeted": self.targeted,
                "settings": dataclasses.asdict(self.settings),
                "hyperparams": plain(self.hyperparams)}


def plain(hyperparams) -> dict[str, float | str]:
    """Return hyperparameters as JSON values, which know no infinity: a cap that is none is "inf"."""
    return {name: float(value) if math.isfinite(value) else str(float(value))
            for name, value in hyperparams._asdict().items()}


def resolve(plan: Plan, image_shape, num_classes: int, ids) -> tuple[Group, ...]:
    """Turn the attacks of a plan into groups of cases.

    Args:
        plan: the plan.
        image_shape: (H, W, C).
        num_classes: K.
        ids: sample ids, in order; a .npy target file has one target for each.

    Returns:
        One group per attack of the plan.

    Raises:
        ValueError: for an unknown method, preset or field, an offset that is a multiple of K, a
            bad target file, or two cases of one name.
        FileNotFoundError: if there is no such target file.
        ImportError: if scikit-image is missing for a method with superpixels.
    """
    groups = tuple(_group(attack, image_shape, num_classes, ids) for attack in plan.attacks)
    names = [case.name for group in groups for case in group.cases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"plan: two attacks give the case {twice!r}; set `name` of one of them")
    return groups


def _group(attack: AttackPlan, image_shape, num_classes, ids) -> Group:
    method = find_method(attack.method)
    domain = attack.preset or default_domain(image_shape)
    settings, hyperparams = method.preset(domain, attack.targeted)
    known = {field.name for field in dataclasses.fields(settings)}
    _check_names("settings", attack.settings, known, attack.method)
    _check_names("hyperparams", attack.hyperparams, hyperparams._fields, attack.method)
    settings = dataclasses.replace(settings, **{  # hashable: TOML knows no tuples
        name: as_tuple(value) for name, value in attack.settings.items()})
    hyperparams = hyperparams._replace(**{k: float(v) for k, v in attack.hyperparams.items()})
    method.check(settings, hyperparams, tuple(image_shape))
    if method.segment is not None:
        # Without images: whether scikit-image is there, if these settings need it.
        method.segment(settings, np.zeros((0, *image_shape), np.float32))
    name = attack.name or attack.method
    cases: tuple[Case, ...]
    if attack.target_file:
        cases = (Case(f"{name}/targeted_file", 0, _read_targets(Path(attack.target_file), ids)),)
    elif attack.offsets:
        for offset in attack.offsets:
            if offset % num_classes == 0:
                raise ValueError(f"plan: offset {offset} makes the target the label itself for "
                                 f"{num_classes} classes")
        if len({k % num_classes for k in attack.offsets}) < len(attack.offsets):
            raise ValueError(f"plan: offsets {list(attack.offsets)} aim twice at the same of {num_classes} "
                             "classes")
        cases = tuple(Case(f"{name}/targeted+{k}", k, None) for k in attack.offsets)
    else:
        cases = (Case(f"{name}/untargeted", 0, None),)
    return Group(attack.method, settings, hyperparams, domain, attack.targeted, cases)


def _check_names(what, given, known, method):
    for name in given:
        if name not in known:
            raise ValueError(f"plan: {what}.{name} is unknown to method {method!r}; "
                             f"use one of {', '.join(sorted(known))}")


def _read_targets(path: Path, ids) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"plan: there is no target_file {path}")
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                array = np.load(file, allow_pickle=False)
            if array.shape != (len(ids),) or array.dtype.kind not in "iu":
                raise ValueError(f"holds {array.dtype} {list(array.shape)}, expected integers "
                                 f"[{len(ids)}], one per sample")
            return dict(zip(ids, array.tolist(), strict=True))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text).items()
        elif path.suffix == ".csv":
            rows = [row for row in csv.reader(text.splitlines()) if row]
            # A first row whose target is no number is a header.
            rows = rows[1:] if rows and not rows[0][-1].strip().isdigit() else rows
        else:
            raise ValueError("must end with .json, .csv or .npy")
        return {str(sample): _whole(target) for sample, target in rows}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"plan: target_file {path} {error}") from None


def _whole(target) -> int:
    """A class as JSON or CSV has it; 3.9 and true are none."""
    if isinstance(target, (float, bool)):
        raise ValueError(f"holds the target {target!r}, expected an integer")
    return int(target)
