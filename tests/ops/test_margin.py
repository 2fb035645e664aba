"""Margin and success test against hand-written formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.ops import is_adversarial, margin_loss


@pytest.mark.parametrize("targeted", [False, True])
def test_margin_equals_the_formula(targeted):
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits, label = rng.normal(size=7), int(rng.integers(7))
        other = max(z for i, z in enumerate(logits) if i != label)
        expected = max(0.0, other - logits[label] if targeted else logits[label] - other)
        value, gradient = jax.value_and_grad(margin_loss)(jnp.asarray(logits), label,
                                                          targeted=targeted)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        assert np.isclose(np.abs(gradient).sum(), 2.0 if expected > 0 else 0.0)
        assert bool(is_adversarial(jnp.asarray(logits), label, targeted=targeted)) == (
            (logits.argmax() == label) == targeted)


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_impossible_label_is_nan_and_never_clamped(label):
    assert np.isnan(margin_loss(jnp.asarray([1.0, 2.0, 3.0]), label, targeted=False))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_never_adversarial(poison):
    logits = jnp.asarray([1.0, poison, 0.0])
    for label in range(3):
        for targeted in (False, True):
            assert not is_adversarial(logits, label, targeted=targeted)


@pytest.mark.parametrize("targeted", [False, True])
def test_where_two_classes_tie_there_is_still_a_way_down(targeted):
    value, gradient = jax.value_and_grad(margin_loss)(jnp.asarray([3.0, 3.0, 1.0]), 0, targeted=targeted)
    assert value == 0.0 and np.sign(gradient).tolist() == ([-1, 1, 0] if targeted else [1, -1, 0])
