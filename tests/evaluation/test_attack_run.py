"""A run in memory: who is attacked, what is believed, what is kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import GSESettings, Status, metrics
from gse_jax.attacks.baselines.random_search import SparseRSSettings
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroSettings
from gse_jax.evaluation import explain, load_run, next_class, predict, run_attack, save_run
from gse_jax.evaluation.forward import Forward
from tests.toy_model import toy


@pytest.fixture(scope="module", params=[False, True], ids=["untargeted", "targeted"])
def run(request):
    params, apply_fn, x, y = toy()
    y = np.asarray(y).copy()
    y[1] = (y[1] + 1) % 5  # misclassified from the start
    targets = (y + 2) % 5 if request.param else None
    return run_attack(params, apply_fn, x, y, targets=targets, bounds=(-1.0, 1.0),
                      about={"class_names": list("abcde")})


def test_only_correctly_classified_images_are_attacked(run):
    params, apply_fn, x, _ = toy()
    assert run.status[1] == Status.ALREADY_MISCLASSIFIED and run.forward_evals[1] == 0
    np.testing.assert_array_equal(run.adversarials[1], x[1])
    attacked = np.arange(6) != 1
    assert (run.status[attacked] != Status.ALREADY_MISCLASSIFIED).all()
    predicted = np.asarray(apply_fn(params, jnp.asarray(run.adversarials)).argmax(-1))
    np.testing.assert_array_equal(run.predictions_after, predicted)
    wanted = predicted == run.targets if run.targets[0] >= 0 else predicted != run.y
    np.testing.assert_array_equal(run.success, wanted)
    numbers = run.summary()
    assert numbers.num_attacked == 5 and numbers.num_images == 6
    np.testing.assert_allclose(run.clean_accuracy, 5 / 6)


def test_a_run_survives_the_disk(run, tmp_path):
    path = save_run(run, tmp_path / "deep" / "adversarials.npz")
    for source in (path, path.parent):
        again = load_run(source)
        for name, value in run._asdict().items():
            if name == "about":
                assert again.about == value
            else:
                np.testing.assert_array_equal(getattr(again, name), value)
    assert [p.name for p in path.parent.iterdir()] == ["adversarials.npz"]  # no temporary left


def test_what_ran_can_be_run_again_and_is_json():
    params, apply_fn, x, y = toy()
    _, caps = gse_jax.preset("gse_refined", "cifar10", False)
    run = run_attack(params, apply_fn, x[:1], np.asarray(y[:1]), bounds=(-1.0, 1.0), method="sigma_zero", key=3)
    assert run.about["seed"] == 3 and run.about["gse_jax"] == gse_jax.__version__
    params_of = run_attack(params, apply_fn, x[:0], np.asarray(y[:0]), bounds=(-1.0, 1.0),
                           method="gse_refined", hyperparams=caps)
    json.loads(json.dumps(params_of.about, allow_nan=False))
    assert params_of.about["hyperparams"]["max_l2"] == "inf" and params_of.clean_accuracy is None


def test_a_success_that_a_fresh_pass_denies_is_none():
    """A model that rounds differently by batch size: 6 lanes are fooled, a batch of 5 is not."""
    params, apply_fn, x, y = toy()

    def fickle(params, images):
        shape_dependent = images.shape[0] <= 4  # the attack's lanes, four devices of up to two
        return apply_fn(params, images) if shape_dependent else apply_fn(
            params, jnp.repeat(x[:1], images.shape[0], 0)) * 0 + jnp.eye(5)[y[0]][None]

    same = np.flatnonzero(np.asarray(y) == int(y[0]))
    x5, y5 = jnp.repeat(x[same[:1]], 5, 0), np.repeat(np.asarray(y)[same[:1]], 5)
    options = dict(bounds=(-1.0, 1.0), lanes=4, method="sigma_zero")
    run = run_attack(params, fickle, x5, y5, settings=SigmaZeroSettings(max_steps=100), **options)
    np.testing.assert_array_equal(run.status, Status.NOT_FOUND)
    assert not run.success.any() and run.gradient_evals.all()
    np.testing.assert_array_equal(run.adversarials, x5)
    np.testing.assert_array_equal(run.predictions_after, run.predictions_before)
    assert not run.tradeoff.any()
    # Clean images that only the attack's batch misclassifies are no success either, and stay attacked.
    run = run_attack(params, lambda *a: -fickle(*a) if a[1].shape[0] <= 4 else fickle(*a), x5, y5,
                     settings=SigmaZeroSettings(max_steps=2), **options)
    np.testing.assert_array_equal(run.status, Status.NOT_FOUND)
    assert run.summary().asr_attacked == 0.0


def test_what_is_kept_of_an_attack_that_claims_too_much(monkeypatch):
    """The class is four times the first pixel. Kept, denied, not claimed, and wrongly called misclassified."""
    x = np.zeros((5, 8, 8, 1), np.float32)
    x[:, 0, 0, 0] = np.asarray([0, 1, 2, 3, 1]) / 4
    y, targets = np.asarray([4, 1, 2, 3, 1]), np.asarray([0, 2, 3, 4, 0])
    seen = []

    def claims(params, apply_fn, x, y, *, targets, **_):
        seen.append(targets.tolist())
        adversarials = x.copy()
        adversarials[:2, 0, 0, 0] = [2 / 4, 0.9 / 4][:len(x)]
        status = np.asarray([Status.FOUND, Status.FOUND, Status.NOT_FOUND, Status.ALREADY_MISCLASSIFIED][:len(x)])
        found = status == Status.FOUND
        return gse_jax.AttackResult(adversarials, found, status, 5 + found, 7 + found, np.float32(0.5) * found)

    def claims_of(params, apply_fn, x, y, chosen, *, targets, **options):
        return claims(params, apply_fn, x[chosen], y[chosen], targets=targets[chosen], **options)

    monkeypatch.setattr("gse_jax.evaluation.attack_run.attack", claims)
    monkeypatch.setattr("gse_jax.evaluation.attack_run.attack_chosen", claims_of)
    run = run_attack(None, lambda _, x: -jnp.square(4 * x[:, 0, 0, :] - jnp.arange(5, dtype=x.dtype)[None]), x, y,
                     targets=targets)
    assert seen == [[], [2, 3, 4, 0]]
    assert run.status.tolist() == [Status.ALREADY_MISCLASSIFIED, Status.FOUND, *[Status.NOT_FOUND] * 3]
    assert run.success.tolist() == [True, True, False, False, False]
    assert run.predictions_before.tolist() == [0, 1, 2, 3, 1] and run.predictions_after.tolist() == [0, 2, 2, 3, 1]
    unchanged = np.arange(5) != 1
    np.testing.assert_array_equal(run.adversarials[unchanged], x[unchanged])
    np.testing.assert_array_equal(run.confidences_after[unchanged], run.confidences_before[unchanged])
    assert run.tradeoff.tolist() == [0, 0.5, 0, 0, 0]
    assert run.gradient_evals.tolist() == [0, 6, 6, 5, 5] and run.forward_evals.tolist() == [0, 8, 8, 7, 7]


def test_random_numbers_do_not_depend_on_which_other_images_are_misclassified():
    params, apply_fn, x, y = toy()
    settings = SparseRSSettings(num_pixels=20, max_queries=10, num_restarts=1)
    options = dict(method="sparse_rs", settings=settings, bounds=(-1.0, 1.0), key=3)
    wrong = np.asarray(y) + np.asarray([1, 0, 0, -1, 0, 0])
    run = run_attack(params, apply_fn, x, wrong % 5, **options)
    np.testing.assert_array_equal(run.status[[0, 3]], Status.ALREADY_MISCLASSIFIED)
    whole = gse_jax.attack(params, apply_fn, x, y, **options)
    others = np.asarray([1, 2, 4, 5])
    np.testing.assert_array_equal(run.adversarials[others], whole.adversarials[others])
    assert run.found[others].any()


def test_the_fresh_pass_is_compiled_once_for_our_models_and_anew_for_functions():
    """A function may hold weights that have changed since."""
    from gse_jax import models

    ours, params = models.load("resnet20", weights="digits")
    assert Forward(params, ours, (32, 32, 3))._logits is Forward(params, ours, (32, 32, 3))._logits
    kernel = np.ones((192, 3), np.float32) * np.asarray([1.0, 2.0, 3.0], np.float32)
    x = np.ones((1, 8, 8, 3), np.float32)

    def model(_, x):
        return x.reshape(len(x), -1) @ kernel

    for expected in (2, 0):
        assert predict(None, model, x)[0] == expected
        kernel[...] = -kernel


def test_explanation_of_a_model_without_features(run):
    params, apply_fn, _, _ = toy()
    explanation = explain(run, params, apply_fn)
    assert explanation.activation is None and explanation.activation_overlap is None
    assert explanation.saliency.shape == run.x.shape[:3]
    scores = explanation.interpretability[explanation.found]
    assert np.isfinite(scores).all() and (np.diff(scores, axis=1) <= 1e-12).all()


def test_what_was_not_found_is_explained_towards_the_next_class(run):
    params, apply_fn, _, _ = toy()
    np.testing.assert_array_equal(explain(run, params, apply_fn).found, run.status == Status.FOUND)
    failed = run._replace(adversarials=run.x, predictions_after=run.predictions_before,
                          targets=np.full(6, -1, np.int32), status=np.full(6, Status.NOT_FOUND, np.int32))
    goals = np.where(np.arange(6) == 1, run.predictions_before, (run.y + 1) % 5)  # of the one that is misclassified
    expected = metrics.adversarial_saliency(params, apply_fn, jnp.asarray(run.x), run.y, goals).max(-1)
    np.testing.assert_allclose(explain(failed, params, apply_fn).saliency, expected, atol=1e-9)


def test_another_model_is_not_explained(run):
    params, apply_fn, _, _ = toy()
    with pytest.raises(ValueError, match="predicts as the run's did for . of .* clean images only"):
        explain(run, params, lambda params, x: -apply_fn(params, x))

    def as_before_on_clean_images(params, x):
        clean = jnp.any(jnp.all(x[:, None] == run.x[None], axis=(2, 3, 4)), axis=1)
        return apply_fn(params, x) * jnp.where(clean, 1.0, -1.0).astype(x.dtype)[:, None]

    with pytest.raises(ValueError, match="for . of . adversarial images only"):
        explain(run, params, as_before_on_clean_images)


def test_predict_equals_one_call_for_any_number():
    params, apply_fn, x, _ = toy()
    for count in (0, 1, 6):
        labels, confidences = predict(params, apply_fn, x[:count])
        assert labels.shape == confidences.shape == (count,)
        np.testing.assert_array_equal(labels, apply_fn(params, x[:count]).argmax(-1))


def test_images_are_kept_as_the_attack_saw_them():
    """In float32 where JAX has nothing wider; with other digits every pixel would count as changed."""
    with jax.enable_x64(False):
        x = np.full((1, 8, 8, 1), 0.1)
        run = run_attack(None, lambda _, x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1), x, np.int32([0]))
    assert run.x.dtype == run.adversarials.dtype == np.float32
    np.testing.assert_array_equal(run.adversarials, x.astype(np.float32))
    assert run.clean_accuracy == 0.0 and run.about["seed"] == 0  # of a key that was not given


def test_next_class_wraps():
    np.testing.assert_array_equal(next_class([0, 8, 9], 10), [1, 9, 0])


def test_an_image_without_finite_logits_is_told_as_such(tmp_path):
    """The argmax of a row of NaN is 0, which would be right for a label 0 and wrong for others."""
    params, apply_fn, x, y = toy()
    marked = x[np.asarray([0, 2]), 0, 0, 0]

    def broken(params, images):
        bad = (images[:, 0, 0, 0, None] == marked[None]).any(1)
        return jnp.where(bad[:, None], jnp.nan, apply_fn(params, images))

    bounds = np.float32(-1.0), np.float32(1.0)
    run = run_attack(params, broken, x, np.asarray(y) * (np.arange(6) != 2), bounds=bounds,
                     settings=GSESettings(num_runs=2, max_steps=5, phase1_steps=3))
    np.testing.assert_array_equal(run.status[[0, 2]], Status.NON_FINITE)
    np.testing.assert_array_equal(run.predictions_before[[0, 2]], -1)
    assert not run.success[[0, 2]].any()
    assert run.summary().num_non_finite == 2
    assert load_run(save_run(run, tmp_path / "run.npz")).about["bounds"] == [-1.0, 1.0]


@pytest.mark.parametrize("change, words", [
    (dict(x=np.zeros((6, 3, 20, 20))), "NCHW"), (dict(y=np.eye(5)[[0] * 6]), "argmax"),
    (dict(bounds=(0.0, 1.0)), "bounds"), (dict(y=np.full(6, -1)), r"y must lie in \[0, 4\]"),
    (dict(targets=np.full(6, 9)), "targets must lie"), (dict(lanes=0), "lanes must be"), (dict(key=-1), "key"),
    (dict(method="gze"), "gze"), (dict(hyperparams=gse_jax.GSEHyperparams(mu=-1.0)), "mu=-1"),
    (dict(ids=["one"]), "ids must name each of the 6 images, got 1")])
def test_bad_input_is_refused_before_the_model_is_asked(change, words):
    params, apply_fn, x, y = toy()

    def asked(params, images):
        if not isinstance(images, jax.core.Tracer) or images.shape[0] != 3:  # not the shape check's
            raise AssertionError
        return apply_fn(params, images)

    arguments = dict(x=x, y=np.asarray(y), bounds=(-1.0, 1.0)) | change
    with pytest.raises(ValueError, match=words):
        run_attack(params, asked, arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b[:0], lambda b: bytes(
    v ^ 255 if len(b) // 3 < i < len(b) // 2 else v for i, v in enumerate(b))])
def test_a_damaged_file_is_one_line(run, tmp_path, damage):
    path = save_run(run, tmp_path / "adversarials.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a run of gse-jax attack"):
        load_run(path)
