"""Attacks as differentiable functions: hypergradients, sweeps, adversarial training."""

from gse_jax.differentiable.boundary import BoundaryResult, implicit_attack
from gse_jax.differentiable.measures import half_quasinorm, smooth_patch_count
from gse_jax.differentiable.sweeps import Sweep, hyperparam_grid, sweep
from gse_jax.differentiable.unrolled import DifferentiableResult, differentiable_attack

__all__ = [
    "BoundaryResult",
    "DifferentiableResult",
    "Sweep",
    "differentiable_attack",
    "half_quasinorm",
    "hyperparam_grid",
    "implicit_attack",
    "smooth_patch_count",
    "sweep",
]
