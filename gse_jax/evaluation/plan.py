"""What to evaluate: data x model x attacks x protocol, as one frozen value or one file.

A plan file is TOML or JSON with the fields of `Plan`:

    data = "digits"
    model = "resnet20"
    weights = "digits"
    normalize = "half"            # or "imagenet", "none", [mean, std]
    limit = 100

    [[attacks]]
    method = "gse"

    [[attacks]]
    method = "gse"
    offsets = [1, 3, 9]           # targeted: label + 1, + 3, + 9, modulo the number of classes
    settings = { num_runs = 5 }   # changes to the preset
"""

import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class AttackPlan:
    """One attack of a plan; untargeted unless `offsets` or `target_file` is given.

    Attributes:
        method: name of the attack, a key of `gse_jax.attacks.METHODS`.
        name: what the records call it; needed where one method comes twice with other settings.
            Empty takes `method`.
        offsets: one targeted case per entry k, with target (label + k) modulo the classes.
        target_file: a .json object or a two-column .csv of sample id and target, or a .npy array
            with one target per sample in the order of the data.
        preset: domain of the preset, e.g. "imagenet_robust"; empty follows the image size.
        settings: changes to the preset's settings, by field.
        hyperparams: changes to the preset's hyperparameters, by field.
    """

    method: str = "gse"
    name: str = ""
    offsets: tuple[int, ...] = ()
    target_file: str = ""
    preset: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hyperparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def targeted(self) -> bool:
        """Whether the attack aims at targets."""
        return bool(self.offsets) or bool(self.target_file)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole evaluation, except for where and on what machine it runs.

    Attributes:
        data: a source of `gse_jax.data.load`; ignored where `evaluate` is handed data.
        model: a name of `gse_jax.models.load`; ignored where `evaluate` is handed a model.
        weights: weights for it.
        normalize: "half", "imagenet", "none" or (mean, std) for it; None for its default.
        attacks: at least one.
        limit: keep the first so many images; None keeps all.
        data_dir: folder for `gse_jax.data.load`; empty for its default.
        bounds: (lowest, highest) pixel value of the images, as in `gse_jax.attack`.
        seed: of attacks that draw random numbers; every sample has its own key.
        expected_accuracy: clean accuracy that the model should have, for the pre-flight checks.
        lanes: images worked on at a time; None for a default. Changes speed, not results (up to the
            model's own rounding).
    """

    data: str = ""
    model: str = ""
    weights: str = ""
    normalize: str | tuple[Any, Any] | None = None
    attacks: tuple[AttackPlan, ...] = (AttackPlan(),)
    limit: int | None = None
    data_dir: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    expected_accuracy: float | None = None
    lanes: int | None = None

    def __post_init__(self):
        """Refuse what cannot be run, in one line; numbers of NumPy become Python's, for the manifest."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if not isinstance(self.attacks, (tuple, list)) or not all(isinstance(one, AttackPlan) for one in self.attacks):
            raise TypeError(f"plan: attacks must be a tuple of AttackPlan, got {self.attacks!r}")
        if not self.attacks:
            raise ValueError("plan: attacks is empty, expected at least one")
        if not 0 <= self.seed < 2**32:  # JAX takes no more bits into a key
            raise ValueError(f"plan: seed must be from 0 to 2**32 - 1, got {self.seed}")
        if isinstance(self.normalize, str):
            _check_normalization(self.normalize)
        for attack in self.attacks:
            _check_attack(attack)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `Plan.from_dict` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Build a plan from plain values, as read from a file.

        Args:
            values: the fields of `Plan`; `attacks` is a list of the fields of `AttackPlan`.

        Returns:
            Plan.

        Raises:
            ValueError: for an unknown field or an impossible value, in one line.
            TypeError: for a value of another type.
        """
        values = dict(values)
        attacks = values.pop("attacks", [{}])
        if not isinstance(attacks, (list, tuple)):
            raise TypeError(f"plan: attacks must be a list of tables ([[attacks]] in TOML), "
                            f"got {type(attacks).__name__}")
        attacks = tuple(AttackPlan(**_checked(AttackPlan, entry, f"attacks[{i}]"))
                        for i, entry in enumerate(attacks))
        return cls(**_checked(cls, values, ""), attacks=attacks)


def load_plan(path) -> Plan:
    """Read a plan file.

    Args:
        path: a .toml or .json file with the fields of `Plan`. Relative paths in it are relative to
            the working directory.

    Returns:
        Plan.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither, or holds an unknown field or an impossible value.
        TypeError: for a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"plan: there is no file {path}; expected a .toml or .json plan")
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"plan: {path} must end with .toml or .json, got {path.suffix!r}")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except ValueError as error:  # Both readers' errors, and text that is no UTF-8.
        raise ValueError(f"plan: {path} cannot be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(values, dict):
        raise TypeError(f"plan: {path} must hold one object, got {type(values).__name__}")
    return Plan.from_dict(values)


# Field -> (types, what is expected). Lists become tuples, so that plans compare equal.
_TEXT = (str, "text")
_FIELDS = {
    "data": _TEXT, "model": _TEXT, "weights": _TEXT, "data_dir": _TEXT, "method": _TEXT,
    "name": _TEXT, "target_file": _TEXT, "preset": _TEXT,
    "normalize": ((str, list, tuple, type(None)), "half, imagenet, none or [mean, std]"),
    "limit": ((int, type(None)), "an integer of at least 1"),
    "bounds": ((list, tuple), "[lowest, highest]"),
    "seed": (int, "an integer"),
    "expected_accuracy": ((int, float, type(None)), "a number between 0 and 1"),
    "lanes": ((int, type(None)), "a positive integer"),
    "offsets": ((list, tuple), "a list of integers"),
    "settings": (Mapping, "a table"),
    "hyperparams": (Mapping, "a table"),
}


def _checked(kind, values, where):
    """Return the values of one table with lists as tuples, or refuse them."""
    place = f"plan: {where + '.' if where else ''}"
    if not isinstance(values, Mapping):
        raise TypeError(f"plan: {where} must be a table, got {type(values).__name__}")
    known = [field.name for field in dataclasses.fields(kind)]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{place}{name} is unknown; use one of {', '.join(known)}")
        types, expected = _FIELDS[name]
        if not isinstance(value, types) or isinstance(value, bool):
            raise TypeError(f"{place}{name} must be {expected}, got {value!r}")
    return {name: as_tuple(value) for name, value in values.items()}


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        value = tuple(sorted(value))
    if isinstance(value, (range, np.ndarray)):
        value = tuple(value)
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if isinstance(value, AttackPlan):
        return dataclasses.replace(value, **{field.name: _plain(getattr(value, field.name))
                                             for field in dataclasses.fields(value)})
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def as_tuple(value):
    """Return lists, and those inside them, as tuples; anything else as it is."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _check_normalization(name: str):
    from gse_jax.models import NORMALIZATIONS  # Flax takes a second to import.

    if name not in NORMALIZATIONS:
        raise ValueError(f"plan: normalize = {name!r} is unknown; use {', '.join(NORMALIZATIONS)} "
                         "or [mean, std]")


def _check_attack(attack: AttackPlan):
    if not isinstance(attack.offsets, (tuple, list)):
        raise TypeError(f"plan: offsets must be a tuple of integers, got {attack.offsets!r}")
    if attack.offsets and attack.target_file:
        raise ValueError("plan: an attack has offsets and target_file, expected one of them")
    for offset in attack.offsets:
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 1:
            raise ValueError(f"plan: offsets must be integers of at least 1, got {offset!r}")
    if len(set(attack.offsets)) != len(attack.offsets):
        raise ValueError(f"plan: offsets {list(attack.offsets)} name one twice")
    for name, value in attack.hyperparams.items():
        if (isinstance(value, bool) or not isinstance(value, (int, float))
                or not abs(value) < sys.float_info.max):
            raise TypeError(f"plan: hyperparams.{name} must be a finite number, got {value!r}")
