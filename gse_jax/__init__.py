"""Group-wise sparse, explainable adversarial attacks in JAX.

`gse_jax.attack(params, apply_fn, x, y)` attacks, `refine` makes what an attack found sparser,
`pareto` shows the trade-off; `metrics` measures; `models` and `data` bring real
classifiers and images; `report` draws; `differentiable` has attacks with derivatives. The rooms are
loaded when first used: importing gse_jax loads jax and numpy only.
"""

import importlib

from gse_jax.attacks import GSEHyperparams, GSESettings, attack, attack_stream, preset, refine
from gse_jax.devices import use_all_cpu_cores, use_compilation_cache
from gse_jax.types import AttackResult, Status

__version__ = "0.1.0"

_ROOMS = ("data", "differentiable", "evaluation", "metrics", "models", "ops", "report")
# Public calls of such rooms.
_LAZY = {"differentiable_attack": "differentiable", "implicit_attack": "differentiable",
         "pareto": "evaluation"}

__all__ = [
    "AttackResult",
    "GSEHyperparams",
    "GSESettings",
    "Status",
    "attack",
    "attack_stream",
    "data",
    "differentiable",
    "differentiable_attack",
    "evaluation",
    "implicit_attack",
    "metrics",
    "models",
    "ops",
    "pareto",
    "preset",
    "refine",
    "report",
    "use_all_cpu_cores",
    "use_compilation_cache",
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f"gse_jax.{_LAZY[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"gse_jax.{name}")
    raise AttributeError(f"module 'gse_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_ROOMS, *_LAZY])
