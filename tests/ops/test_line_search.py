"""Brent's line search against SciPy's, against closed forms, and what it must never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from gse_jax.ops import advance_line_search, line_search, start_line_search

ADVANCE = jax.jit(advance_line_search)


def search(loss, num_trials, guess=0.3819660112501051, right=1.0):
    """(search after each evaluation, trials, values)."""
    state, states, trials, values = start_line_search(jnp.asarray(guess), right), [], [], []
    for _ in range(num_trials):
        trials.append(float(state.trial))
        values.append(float(loss(trials[-1])))
        state = ADVANCE(state, jnp.asarray(values[-1]))
        states.append(state)
    return states, trials, values


FUNCTIONS = {
    "parabola": lambda t: (t - 0.137) ** 2,
    "steep": lambda t: np.exp(8.0 * t) - 12.0 * t,
    "kink": lambda t: abs(t - 0.731) + 0.1 * t,
    "falling": lambda t: -t,
    "rising": lambda t: t,
    "two valleys": lambda t: np.cos(11.0 * t) + 0.3 * t,
    "wave": lambda t: np.sin(3.0 + 4.0 * t) * np.exp(-t),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("guess", [0.3819660112501051, 0.01, 0.9])
def test_the_interval_holds_the_best_point_and_shrinks(name, guess):
    states, trials, values = search(FUNCTIONS[name], 30, guess)
    left, right = 0.0, 1.0
    for i, state in enumerate(states):
        assert left <= float(state.left) <= float(state.best) <= float(state.right) <= right
        left, right = float(state.left), float(state.right)
        assert float(state.best_loss) == min(values[:i + 1])
        assert float(state.best_loss) == FUNCTIONS[name](float(state.best))
    assert 0.0 <= min(trials) and max(trials) <= 1.0
    assert right - left < 2e-2


@pytest.mark.parametrize("name", ["parabola", "steep", "kink", "wave", "falling", "rising"])
def test_the_minimum_is_found(name):
    """All of these have one valley in [0, 1]."""
    states, _, _ = search(FUNCTIONS[name], 30)
    grid = np.linspace(0.0, 1.0, 200001)
    best = grid[np.argmin([FUNCTIONS[name](t) for t in grid])]
    np.testing.assert_allclose(states[-1].best, best, atol=2e-4)


def test_a_parabola_takes_few_evaluations_where_golden_sections_take_many():
    states, _, _ = search(FUNCTIONS["parabola"], 6)
    np.testing.assert_allclose(states[-1].best, 0.137, atol=1e-4)  # six sections leave 0.056


@pytest.mark.parametrize("name", ["parabola", "steep", "wave", "two valleys"])
def test_trials_are_those_of_scipy(name):
    """The same algorithm: until the tolerances, which differ, matter."""
    theirs = []
    optimize.minimize_scalar(lambda t: theirs.append(t) or FUNCTIONS[name](t), bounds=(0.0, 1.0),
                             method="bounded", options={"xatol": 1e-9})
    _, trials, _ = search(FUNCTIONS[name], 4)
    np.testing.assert_allclose(trials, theirs[:4], rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 3, 11])  # where no tolerance matters
def test_trials_are_those_of_scipy_for_any_values(seed):
    """Whole numbers in turn, of no function: ties, and parabolas that lead outside or too far."""
    values, theirs = np.random.default_rng(seed).normal(size=10).round(), []
    optimize.minimize_scalar(lambda t: theirs.append(t) or values[len(theirs) - 1], bounds=(0.0, 1.0),
                             method="bounded", options={"xatol": 1e-9, "maxiter": 10})
    _, trials, _ = search(lambda t, values=iter(values): next(values), 10)
    np.testing.assert_allclose(trials, theirs, rtol=1e-9)


@pytest.mark.parametrize("minimum", [0.001, 0.137, 0.999])  # at the left border, inside, at the right one
def test_with_scipy_s_tolerances_all_trials_are_scipy_s(minimum, monkeypatch):
    theirs, tolerance = [], 3e-3
    loss = lambda t: (t - minimum) ** 2
    optimize.minimize_scalar(lambda t: theirs.append(t) or loss(t), bounds=(0.0, 1.0), method="bounded",
                             options={"xatol": tolerance})
    monkeypatch.setattr(line_search, "_RELATIVE", np.sqrt(2.2e-16))
    monkeypatch.setattr(line_search, "_ABSOLUTE", tolerance / 3.0)
    state, trials = start_line_search(jnp.asarray(0.3819660112501051)), []
    for _ in theirs:
        trials.append(float(state.trial))
        state = advance_line_search(state, jnp.asarray(loss(trials[-1])))
    np.testing.assert_allclose(trials, theirs, rtol=1e-12)


def test_a_flat_function_and_a_nan_stay_inside():
    for loss in (lambda t: 1.0, lambda t: np.nan):
        states, trials, _ = search(loss, 12)
        assert np.isfinite(trials).all() and 0.0 <= min(trials) and max(trials) <= 1.0
        assert np.isfinite(float(states[-1].best))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_shorter_interval_is_the_same_search_in_other_units(name):
    loss, right = FUNCTIONS[name], 0.125
    states, trials, _ = search(loss, 8)
    short, short_trials, _ = search(lambda t: loss(t / right), 8, right * 0.3819660112501051, right)
    np.testing.assert_allclose(np.asarray(short_trials) / right, trials, atol=1e-4)
    np.testing.assert_allclose(short[-1].right / right, states[-1].right, atol=1e-4)


def test_float32_stays_float32():
    state = ADVANCE(start_line_search(jnp.asarray(0.3, jnp.float32)), jnp.asarray(1.0, jnp.float32))
    assert {str(v.dtype) for v in state} == {"float32", "int32"}


def test_two_points_make_a_golden_section_whatever_rounding_does():
    """No parabola goes through two points; a compiler that fuses p and q leaves noise in them."""
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=3)
        _, trials, _ = search(lambda t, values=iter(values): next(values), 3)
        left, right = (0.3819660112501051, 1.0) if values[1] <= values[0] else (0.0, trials[1])
        best = trials[1] if values[1] <= values[0] else trials[0]
        larger = right - best if best < 0.5 * (left + right) else left - best
        np.testing.assert_allclose(trials[2], best + 0.3819660112501051 * larger, rtol=1e-12)
