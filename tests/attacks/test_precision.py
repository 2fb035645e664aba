"""The precision of the loop, and the check after a coarse one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status
from gse_jax.attacks import api
from gse_jax.attacks.algorithm import Outcome
from gse_jax.attacks.precision import confirmed
from gse_jax.attacks.refinement import within_caps
from gse_jax.evaluation.forward import Forward
from gse_jax.metrics import adversarial_saliency, grad_cam
from tests.toy_model import linear_logits, toy

SHORT = gse_jax.GSESettings(num_runs=1, max_steps=3, phase1_steps=2)


@pytest.mark.parametrize("precision, shown", [("highest", "HIGHEST"), ("tf32", "HIGH"),
                                              ("bf16", "DEFAULT")])
def test_the_loop_multiplies_as_asked(precision, shown):
    params, apply_fn, x, y = toy(jnp.float32)
    text = str(jax.make_jaxpr(lambda x: gse_jax.attack(
        params, apply_fn, x, y, bounds=(-1.0, 1.0), settings=SHORT, precision=precision))(x))
    inside = text[text.index("while"):]
    convolutions = inside.count("canonical_convolution[")
    assert convolutions >= 4  # two layers, forward and backward
    assert inside.count(f"Precision.{shown}") >= 2 * convolutions


ASKED = {
    "evaluate": lambda p, f, x, y: Forward(p, f, x.shape[1:])._logits(p, x),
    "differentiable_attack": lambda p, f, x, y: gse_jax.differentiable_attack(
        p, f, x, y, tradeoff=1e-3, bounds=(-1.0, 1.0), num_steps=2).adversarials,
    "implicit_attack": lambda p, f, x, y: gse_jax.implicit_attack(
        p, f, x, y, adversarials=0.9 * x, bounds=(-1.0, 1.0)).adversarials,
    "adversarial_saliency": lambda p, f, x, y: adversarial_saliency(p, f, x, y, (y + 1) % 5),
    "grad_cam": lambda p, f, x, y: grad_cam(p, lambda p, x: (f(p, x), x), x, y),
}


@pytest.mark.parametrize("name", ASKED)
def test_wherever_else_the_model_is_asked_it_multiplies_in_float32(name):
    params, apply_fn, x, y = toy(jnp.float32)
    text = str(jax.make_jaxpr(lambda x: ASKED[name](params, apply_fn, x, y))(x))
    layers = re.findall(r"(?:canonical_convolution|conv_general_dilated)\[.*?\]", text, re.DOTALL)
    assert len(layers) >= 2 and all("Precision.HIGHEST" in layer for layer in layers)


def first_pixel_model():
    """Class 1 where the first pixel is above one half."""
    kernel = np.zeros((64, 2))
    kernel[0, 1] = 1.0
    return kernel, np.asarray([0.5, 0.0])


def test_what_does_not_hold_in_float32_is_not_found():
    x = np.zeros((3, 8, 8, 1))
    claimed = x.copy()
    claimed[0, 0, 0, 0] = 1.0  # does fool the model; the second does not
    outcome = Outcome(claimed, np.asarray([True, True, False]),
                      np.asarray([Status.FOUND, Status.FOUND, Status.NOT_FOUND], np.int32),
                      np.full(3, 5, np.int32), np.full(3, 6, np.int32), np.ones(3))
    claimed[1, 0, 1, 0] = 1.0
    checked = confirmed(first_pixel_model(), linear_logits, outcome, x, np.zeros(3, int), None)
    np.testing.assert_array_equal(checked.success, [True, False, False])
    np.testing.assert_array_equal(checked.status, [Status.FOUND, *[Status.NOT_FOUND] * 2])
    np.testing.assert_array_equal(checked.adversarials[0], claimed[0])
    np.testing.assert_array_equal(checked.adversarials[1:], x[1:])
    np.testing.assert_array_equal(checked.forward_evals, 7)
    np.testing.assert_array_equal(checked.tradeoff, [1.0, 0.0, 1.0])  # none where it was taken back


def test_a_clean_image_that_only_the_coarse_loop_misclassified_is_no_success():
    x = np.zeros((1, 8, 8, 1))
    outcome = Outcome(x, np.asarray([True]), np.asarray([Status.ALREADY_MISCLASSIFIED], np.int32),
                      *np.ones((2, 1), np.int32), np.zeros(1))
    model = np.zeros((64, 2)), np.asarray([0.5, 0.0])
    for y, right in ((0, True), (1, False)):
        checked = confirmed(model, linear_logits, outcome, x, np.full(1, y), None)
        assert bool(checked.success[0]) != right
        assert checked.status[0] == (Status.NOT_FOUND if right else Status.ALREADY_MISCLASSIFIED)


def test_the_check_knows_targets_batches_and_other_outcomes():
    """Each of 70 images should become the class it is not; every third does not."""
    kernel = np.zeros((64, 2))
    kernel[0, 1] = 1.0  # class 1 where the first pixel is bright
    y = np.arange(70) // 64
    claimed = np.zeros((70, 8, 8, 1))
    holds = np.arange(70) % 3 > 0
    claimed[:, 0, 0, 0] = np.where(holds, 1 - y, y)
    status = np.full(70, Status.FOUND, np.int32)
    status[3] = Status.NON_FINITE
    outcome = Outcome(claimed, status == Status.FOUND, status, *np.ones((3, 70), np.int32))
    arguments = (kernel, np.asarray([0.5, 0.0])), linear_logits, outcome, np.zeros((70, 8, 8, 1))
    checked = confirmed(*arguments, y, 1 - y)
    np.testing.assert_array_equal(checked.success, holds)
    assert int(checked.status[3]) == Status.NON_FINITE
    shown = str(jax.make_jaxpr(lambda o, x: confirmed(*arguments[:2], o, x, y, 1 - y))(*arguments[2:]))
    assert "Precision.HIGHEST" in shown and "Precision.DEFAULT" not in shown
    assert shown.count("dot_general") == 1  # whatever the number of images


def test_the_check_compiles_once_for_any_number_of_images():
    shapes = []

    def model(params, x):
        shapes.append(x.shape)
        return linear_logits(params, x)

    kernel = np.zeros((64, 2)), np.zeros(2)
    for count in (1, 3, 65):
        outcome = Outcome(np.zeros((count, 8, 8, 1)), np.ones(count, bool),
                          *np.ones((3, count), np.int32), np.ones(count))
        confirmed(kernel, model, outcome, np.zeros((count, 8, 8, 1)), np.zeros(count, int), None)
    assert len(shapes) == 1


@pytest.mark.parametrize("method", ["gse", pytest.param("homotopy", marks=pytest.mark.slow)])
def test_an_attack_sees_the_logits_that_a_bfloat16_model_returns(method):
    random = np.random.default_rng(0)
    params = (random.normal(size=(432, 24)).astype("f4") / 10, random.normal(size=(24, 4)).astype("f4"))

    def apply_fn(params, x):
        first, second = (jnp.asarray(p, jnp.bfloat16) for p in params)
        return jnp.tanh((x.reshape(len(x), -1) - 0.5).astype(jnp.bfloat16) @ first) @ second

    x = random.uniform(0.2, 0.8, (32, 12, 12, 3)).astype("f4")
    y = np.asarray(apply_fn(params, x).argmax(-1), np.int32)
    result = gse_jax.attack(params, apply_fn, x, y, method=method, key=0)
    assert int(result.success.sum()) >= 30
    for call in (apply_fn, jax.jit(apply_fn)):
        fooled = np.asarray(call(params, result.adversarials).argmax(-1)) != y
        np.testing.assert_array_equal(fooled, result.success)


def test_a_coarse_loop_is_checked_and_an_unknown_precision_refused():
    params, apply_fn, x, y = toy()
    results = [gse_jax.attack(params, apply_fn, x, y, bounds=(-1.0, 1.0), settings=SHORT, lanes=6,
                              precision=precision) for precision in ("highest", "tf32")]
    # The CPU multiplies in float64 whatever is asked, so only the extra pass differs.
    np.testing.assert_array_equal(results[0].adversarials, results[1].adversarials)
    np.testing.assert_array_equal(results[1].forward_evals, results[0].forward_evals + 1)
    with pytest.raises(ValueError, match="precision must be one of highest, tf32, bf16, got 'fp8'"):
        gse_jax.attack(params, apply_fn, x, y, bounds=(-1.0, 1.0), precision="fp8")


def test_the_last_look_takes_no_more_images_than_lanes_and_fewer_where_memory_runs_out(monkeypatch):
    x = np.zeros((5, 8, 8, 1))
    outcome = Outcome(x, np.ones(5, bool), np.full(5, Status.ALREADY_MISCLASSIFIED, np.int32),
                      *np.ones((2, 5), np.int32), np.zeros(5))
    model, sizes = (np.zeros((64, 2)), np.asarray([0.0, 1.0])), []

    def build(apply_fn, targeted):
        def holds(params, images, wanted):
            sizes.append(len(images))
            if len(images) > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
            return np.ones(len(images), bool)

        return holds

    monkeypatch.setattr("gse_jax.attacks.precision._holds", build)
    checked = confirmed(model, linear_logits, outcome, x, np.zeros(5, int), None, lanes=8)
    assert checked.success.all() and sizes == [8, 4, 2, 2, 2]


def test_a_given_image_that_holds_is_kept_where_the_refined_one_does_not():
    x = np.zeros((3, 8, 8, 1))
    starts = np.zeros_like(x)
    starts[[0, 2], 0, 0, 0] = 1.0  # fool the model; the second does not
    said = np.asarray([Status.FOUND, Status.FOUND, Status.ALREADY_MISCLASSIFIED], np.int32)
    outcome = Outcome(0.3 * starts, np.ones(3, bool), said, *np.ones((2, 3), np.int32), np.zeros(3))
    checked = confirmed(first_pixel_model(), linear_logits, outcome, x, np.zeros(3, int), None, starts)
    np.testing.assert_array_equal(checked.success, [True, False, True])
    np.testing.assert_array_equal(checked.status, [Status.FOUND, Status.NOT_FOUND, Status.FOUND])
    np.testing.assert_array_equal(checked.adversarials, starts)


def test_logits_with_more_digits_than_the_images_do_not_tie():
    x = np.full((1, 8, 8, 1), 0.5, np.float32)
    apart = jnp.asarray(1e-12, jnp.float64)

    def model(params, x):
        one = 0.0 * x.mean((1, 2, 3)).astype(jnp.float64) + 1.0
        return jnp.stack([one, one + params], 1)

    result = gse_jax.attack(apart, model, x, np.ones(1, int), settings=SHORT)
    assert model(apart, x).argmax() == 1 and result.status[0] == Status.NOT_FOUND


def test_what_refine_gives_back_keeps_its_caps():
    x = np.zeros((2, 8, 8, 1))
    starts = x.copy()
    starts[0, 0, 0, 0], starts[1, 0, :4, 0] = 1.0, 1.0  # of l2 norm 2 and 4 in units of half the range
    caps = gse_jax.preset("gse_refined", "cifar10")[1]._replace(max_l2=3.0)
    kept = within_caps(starts, x, caps, (0.0, 1.0))
    assert isinstance(kept, np.ndarray)
    np.testing.assert_array_equal(kept, np.stack([starts[0], x[1]]))


def test_the_last_look_is_at_given_images_that_keep_the_caps(monkeypatch):
    """A refined image that does not hold is replaced by the given one, but by none beyond the caps."""
    x = np.zeros((2, 8, 8, 1))
    starts, seen = x.copy(), []
    starts[0, 0, 0, 0], starts[1, 0, :4, 0] = 1.0, 1.0  # of l2 norm 1 and 2
    outcome = Outcome(starts, *(np.zeros(2, kind) for kind in (bool, np.int32, np.int32, np.int32, float)))
    monkeypatch.setattr(api, "run", lambda *_: outcome)
    monkeypatch.setattr(api, "confirmed", lambda *arguments: seen.append(arguments[4:7]) or outcome)
    for targets in (None, [1, 2]):
        gse_jax.refine((np.ones((64, 3)), np.zeros(3)), linear_logits, x, starts, [0, 1], targets=targets, max_l2=1.5,
                       precision="tf32")
        y, goals, given = seen.pop()
        assert y.tolist() == [0, 1] and (goals if goals is None else goals.tolist()) == targets
        np.testing.assert_array_equal(given, np.stack([starts[0], x[1]]))
