"""The arguments that all differentiable attacks share, checked and converted once."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import default_domain, preset, validation
from gse_jax.attacks.algorithm import Sample
from gse_jax.attacks.gse.settings import check
from gse_jax.ops import signed_margin


class Goal(NamedTuple):
    """The static part of what an attack wants; hashable.

    Attributes:
        targeted: direction.
        bounds: (low, high).
    """

    targeted: bool
    bounds: tuple[float, float]

    @property
    def scale(self) -> float:
        """Half the width of `bounds`: pixel units per unit of the perturbation."""
        return 0.5 * (self.bounds[1] - self.bounds[0])

    def labels(self, samples: Sample):
        """Return the class that the margin is about: the target, or the true label."""
        return samples.target if self.targeted else samples.y

    def gap(self, logits, label):
        """Return how far one image is from adversarial: logits [K] -> [], negative beyond."""
        return signed_margin(logits, label, targeted=self.targeted)


def problem(params, apply_fn, x, y, targets, bounds) -> tuple[Goal, Sample]:
    """Check images, labels and model, as `gse_jax.attack` does.

    Args:
        params, apply_fn, x, y, targets, bounds: as in `gse_jax.attack`.

    Returns:
        (goal, samples); every field of the samples has a leading axis N.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or range; in one line.
    """
    low, high = validation.check_bounds(bounds)
    targeted = targets is not None
    given = {"x": x, "y": y, **({"targets": targets} if targeted else {})}
    x, y, targets = validation.unsplit(tuple(
        jnp.asarray(validation.as_array(name, given[name])) if name in given else None
        for name in ("x", "y", "targets")))
    validation.check_problem(params, apply_fn, x, y, targets, (low, high))
    y = y.astype(jnp.int32)
    goal = targets.astype(jnp.int32) if targeted else jnp.full_like(y, -1)
    # Mapped, so that fields GSE does not use get a leading axis too.
    samples = jax.vmap(Sample)(x, y, goal, jnp.arange(x.shape[0], dtype=jnp.int32))
    return Goal(targeted, (low, high)), samples


def configuration(image_shape, targeted, num_steps, settings, hyperparams,
                  dtype) -> tuple[Any, Any]:
    """Fill in the preset and the number of steps.

    Args:
        image_shape: (H, W, C).
        targeted: direction.
        num_steps: static int >= 1, or None for `settings.max_steps`.
        settings: GSESettings or None.
        hyperparams: GSEHyperparams or None.
        dtype: of the hyperparameters.

    Returns:
        (settings, hyperparams), the latter arrays [].

    Raises:
        TypeError: for another type of either.
        ValueError: for a value out of range; in one line.
    """
    preset_settings, preset_hyperparams = preset("gse", default_domain(image_shape), targeted)
    settings = preset_settings if settings is None else settings
    hyperparams = preset_hyperparams if hyperparams is None else hyperparams
    check(settings, hyperparams, image_shape)
    if num_steps is not None:
        check_steps(num_steps)
        settings = dataclasses.replace(settings, max_steps=num_steps)
    return settings, jax.tree.map(lambda h: jnp.asarray(h, dtype), hyperparams)


def check_steps(num_steps) -> None:
    """Refuse a number of steps that is not a static positive integer.

    Args:
        num_steps: int.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, static under jit, "
                         f"got {num_steps!r}")
