"""The front: what counts, what completes it, and what no other point beats."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import evaluation, metrics, report
from gse_jax.evaluation.cases import resolve
from gse_jax.evaluation.front import _completed, _front, _Point
from tests.toy_model import linear_logits, toy

BOUNDS = (-1.0, 1.0)


@pytest.fixture(scope="module")
def front():
    params, apply_fn, x, y = toy(np.float32)
    y = y.at[1].set((y[1] + 1) % 5)  # misclassified: not attacked
    caps, seen = (math.inf, 2.0, 0.02), []  # the last is too small for most
    points = gse_jax.pareto(params, apply_fn, x, y, methods=("gse_refined", "pgd"), max_l2=caps,
                            bounds=BOUNDS, on_front=seen.append)
    # Told after every point, so that a later failure takes nothing with it.
    assert [len(one.methods) for one in seen] == [1, 2, 3, 4] and len(seen[0].rows()) == 1
    np.testing.assert_array_equal(seen[2].means, points.means[:3])
    return x, points


def test_points_are_the_attacks_and_caps(front):
    _, points = front
    assert points.methods == ("gse_refined",) * 3 + ("pgd",)
    np.testing.assert_array_equal(points.max_l2, [math.inf, 2.0, 0.02, math.inf])
    np.testing.assert_array_equal(points.correct, points.attacked)
    assert not points.attacked[1] and points.attacked.sum() == 5
    assert not points.success[:, 1].any() and np.isnan(points.images[:, 1]).all()
    np.testing.assert_allclose(points.success_rate, points.success[:, points.attacked].mean(1))


def test_a_small_cap_is_completed_by_the_next_larger_one(front):
    _, points = front
    assert (points.success[2] >= points.success[1]).all()
    norms = points.images[..., 2]
    inside = norms[1] <= 2.0 * (1 + 1e-5)
    assert inside[points.success[1]].any()
    beyond = points.success[2] & ~(norms[2] <= 0.02 * (1 + 1e-5))
    assert beyond.any()
    np.testing.assert_array_equal(points.images[2][beyond], points.images[1][beyond])
    assert points.gradient_evals[2] > points.gradient_evals[1]  # both caps are paid for
    assert points.success_within[2] == (points.success[2] & ~beyond).sum() / 5 < points.success_rate[2]
    assert points.success_within[0] == points.success_rate[0]


def test_only_images_that_a_cap_misses_are_completed_and_paid_for_twice():
    every, spent = np.ones(3, bool), np.asarray([[1, 2]] * 3)
    point = _Point(every, every, np.asarray([True, False, False]), np.full((3, 4), 1.0), spent)
    larger = _Point(every, every, np.asarray([True, True, False]), np.full((3, 4), 2.0), 10 * spent)
    both = _completed(point, larger)
    assert both.success.tolist() == [True, True, False] and both.images[:, 0].tolist() == [1.0, 2.0, 1.0]
    assert both.spent.tolist() == [[1, 2], [11, 22], [1, 2]]


def test_an_attack_that_misses_images_beats_none():
    every, spent = np.ones(2, bool), np.asarray([[4, 6], [6, 8]])
    sparser = _Point(every, every, np.asarray([True, False]), np.asarray([[1.0] * 4, [np.nan] * 4]), spent)
    denser = _Point(every, every, every, np.full((2, 4), 2.0), spent)
    whole = _front([("a", math.inf, sparser), ("b", math.inf, denser)])
    assert whole.pareto.tolist() == [False, True] and whole.success_rate.tolist() == [0.5, 1.0]
    assert whole.image_pareto.tolist() == [[True, False], [False, True]]
    assert whole.gradient_evals.tolist() == [5.0, 5.0] and whole.forward_evals.tolist() == [7.0, 7.0]


def test_images_without_finite_logits_are_attacked_and_not_correct():
    marked, y = np.full((3, 8, 8, 1), 0.5, np.float32), np.int32([0, 1, 0])
    marked[0, 0, 0] = 0.0

    def model(_, x):
        score = jnp.where(x[:, 0, 0, 0] == 0.0, jnp.nan, x.mean((1, 2, 3)))
        return jnp.stack([score, score - 9], 1)

    point = gse_jax.pareto(None, model, marked, y, methods="pgd")
    assert point.correct.tolist() == [False, False, True] and point.attacked.tolist() == [True, False, True]


def test_means_and_fronts_are_those_of_the_images(front):
    _, points = front
    for g in range(4):
        of = points.success[g]
        np.testing.assert_allclose(points.means[g], points.images[g][of].mean(0))
    complete = points.success_rate == 1.0
    np.testing.assert_array_equal(points.pareto, metrics.pareto_set(points.means, complete))
    for i in np.flatnonzero(points.attacked):
        np.testing.assert_array_equal(points.image_pareto[:, i], metrics.pareto_set(
            points.images[:, i], points.success[:, i]))


def test_rows_and_figure(front, tmp_path):
    _, points = front
    rows = points.rows()
    assert [row["attack"] for row in rows] == ["gse_refined", "gse_refined, l2 <= 2",
                                               "gse_refined, l2 <= 0.02", "pgd"]
    assert rows[0]["d_{2,0}"] == points.means[0, 3]
    figure = report.front_plot({"gse_refined": points.means[:3], "pgd": points.means[3:]},
                               {"gse_refined": np.ones(3, bool), "pgd": np.zeros(1, bool)})
    panel = figure.axes[0]
    np.testing.assert_allclose(panel.lines[1].get_xydata()[0], points.means[3, [2, 3]])
    assert panel.lines[1].get_label() == "pgd (ASR < 1)"
    assert panel.lines[2].get_markerfacecolor() == "white"
    partly = report.front_plot({"gse_refined": points.means[:3]}, {
        "gse_refined": np.asarray([True, False, True])}).axes[0]
    assert partly.lines[0].get_label() == "gse_refined (hollow: ASR < 1)"
    np.testing.assert_allclose(partly.lines[1].get_xydata(), points.means[1:2, [2, 3]])
    curve = panel.lines[0].get_xdata()
    assert (np.diff(curve) >= 0).all()
    assert report.save_figure(figure, tmp_path / "front")[0].stat().st_size > 5000


@pytest.mark.parametrize("far", [1.03, 1.2, 2.0, 5.0, 8.0, 50.0])
def test_axes_have_several_labels_that_do_not_touch(far):
    for near in (0.76, 1.7, 54.7):
        points = np.asarray([[near] * 4, [near * far] * 4])
        figure = report.front_plot({"gse": points}, {"gse": [True, True]})
        figure.draw_without_rendering()
        for axes in figure.axes:
            places = [axes.transData.transform((tick, 1.0))[0] for tick in axes.get_xticks()
                      if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
            assert 2 <= len(places) <= 7 and np.diff(places).min() > 0.04 * figure.bbox.width / 3


def test_nothing_attacked_is_none():
    x = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    params = np.zeros((192, 3), np.float32), np.zeros(3, np.float32)
    points = gse_jax.pareto(params, linear_logits, x, [1, 1], methods="pgd")
    assert points.rows()[0] == {"attack": "pgd", "attacked": 0, "ASR": None, "ASR within the cap": None, "ACP": None,
                                "ANC": None, "l2": None, "d_{2,0}": None, "gradients": 0.0, "forwards": 0.0,
                                "on the front": "no"}


def test_an_attack_without_success_is_said_to_have_none():
    nothing = np.full((1, 4), np.nan)
    figure = report.front_plot({"fwnucl": nothing, "gse": np.float32([[20, 2, 0.7, 60]])},
                               {"fwnucl": [False], "gse": [True]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fwnucl (no success)", "gse"]


def test_wrong_arguments_are_refused_before_anything_runs():
    def broken(params, x):
        raise AssertionError("ran")

    x, y = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="method='nonsense' is unknown"):
        gse_jax.pareto((), broken, x, y, methods=("gse", "nonsense"))
    with pytest.raises(ValueError, match="max_l2=.*positive"):
        gse_jax.pareto((), broken, x, y, methods=("gse_refined",), max_l2=(1.0, 0.0))
    for caps in ("a", (1.0, math.nan), ()):
        with pytest.raises(ValueError, match="max_l2=.*positive"):
            gse_jax.pareto((), broken, x, y, methods="gse_refined", max_l2=caps)
    with pytest.raises(ValueError, match="method='nonsense' is unknown"):
        gse_jax.pareto((), broken, x, y, methods="nonsense", max_l2=1.0)
    with pytest.raises(ValueError, match="at least one"):
        gse_jax.pareto((), broken, x, y, methods=())
    with pytest.raises(ValueError, match="nothing to draw"):
        report.front_plot({}, {})


def test_gse_refined_in_a_plan():
    """Infinite caps and lists survive the fingerprint and the compiled program's key."""
    plan = evaluation.Plan(data="digits", model="resnet20", weights="digits", attacks=(
        evaluation.AttackPlan(method="gse_refined", settings={"scales": [2.0]},
                              hyperparams={"max_l2": 0.5}),
        evaluation.AttackPlan(method="gse_refined", name="free")))
    capped, free = resolve(plan, (32, 32, 3), 10, ["0"])
    assert hash(capped.settings) and capped.settings.scales == (2.0,)
    assert json.loads(json.dumps(capped.describe(), allow_nan=False))["hyperparams"]["max_l2"] == 0.5
    assert json.loads(json.dumps(free.describe(), allow_nan=False))["hyperparams"]["max_l2"] == "inf"


def test_caps_are_positive_whatever_the_methods():
    params, apply_fn, x, y = toy()
    for caps in ((-1.0,), (1.0, 0.0), ("1",)):
        with pytest.raises(ValueError, match="max_l2=.* must hold positive numbers"):
            gse_jax.pareto(params, apply_fn, x, y, methods=("pgd",), max_l2=caps, bounds=BOUNDS)
