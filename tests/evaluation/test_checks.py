"""Pre-flight checks: every fault gives its sentence, sound models give none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import data, models
from gse_jax.evaluation import normalisation
from gse_jax.evaluation.checks import Finding, check
from gse_jax.evaluation.checks_data import check_accuracy, check_range
from gse_jax.evaluation.checks_model import check_output

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RNG = np.random.default_rng(0)
CLASSES, COUNT = 4, 40


def images(channels=3):
    """Blobs whose brightest quadrant is the label, in [0, 1]."""
    y = np.arange(COUNT, dtype=np.int32) % CLASSES
    x = RNG.uniform(0, 0.6, (COUNT, 8, 8, channels))
    for image, label in zip(x, y, strict=True):
        rows, columns = 4 * (label // 2), 4 * (label % 2)
        image[rows:rows + 4, columns:columns + 4] += 0.4
    return x.astype(np.float32), y


X, Y = images()


def quadrants(params, x):
    """The real, sound model of these tests: brightness of each quadrant, 12 logits per unit."""
    means = x.reshape(len(x), 2, 4, 2, 4, -1).mean((2, 4, 5)).reshape(len(x), CLASSES)
    return params["scale"] * (means - 0.5)


PARAMS = {"scale": jnp.float32(12.0)}


def run(apply_fn=quadrants, x=X, y=Y, params=PARAMS, **arguments):
    return check(params, apply_fn, x, y, **arguments)


def serious(findings):
    return [f for f in findings if f.severity != "info"]


def only(findings, name, severity):
    """The one finding that is not "info" and its message."""
    (found,) = serious(findings)
    assert (found.name, found.severity) == (name, severity), found
    assert found.message.endswith(".") and found.fix.endswith(".")
    return found


def named(findings, name):
    (found,) = [f for f in findings if f.name == name]
    assert found.message.endswith(".") and (found.fix.endswith(".") or found.severity == "info")
    return found


def test_a_sound_model_gives_its_accuracy_and_nothing_else():
    findings = run(expected_accuracy=1.0, targets=(Y + 1) % CLASSES)
    assert findings == [Finding("accuracy", "info", "Clean accuracy is 100.0% (40 of 40; chance is "
                                "25.0%), expected 100.0%.", "")]


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_give_no_false_alarm(count):
    assert not serious(run(x=X[:count], y=Y[:count]))
    assert not serious(run(lambda p, x: quadrants(p, x)[:, ::-1], x=X[:1], y=3 - Y[:1]))


def test_log_probabilities_and_double_precision_are_fine():
    assert not serious(run(lambda p, x: jax.nn.log_softmax(quadrants(p, x))))
    params = {"scale": jnp.float64(12.0)}
    assert not serious(run(params=params, x=X.astype(np.float64)))


# Accuracy.


def test_accuracy_far_from_the_expected_one_is_told():
    y = np.where(np.arange(COUNT) % 4 == 0, (Y + 1) % CLASSES, Y)  # Class 0 is mislabelled.
    found = only(run(y=y, expected_accuracy=0.98), "accuracy", "warning")
    assert "75.0% (30 of 40; chance is 25.0%), expected 98.0%" in found.message
    assert "standard errors below" in found.message
    above = only(run(expected_accuracy=0.4), "accuracy", "warning")
    assert "standard errors above" in above.message and "test images" in above.fix
    assert not serious(run(y=y, expected_accuracy=0.8))  # 0.8 standard errors away.


def test_guessing_is_an_error_from_twenty_images_on():
    y = RNG.permutation(Y)
    found = only(run(y=y), "accuracy", "error")
    assert "no better than guessing" in found.message
    assert only(run(x=X[:4], y=(Y[:4] + 1) % 4), "accuracy", "warning")


def test_shifted_labels_are_recognised():
    found = only(run(y=(Y + 1) % CLASSES), "accuracy", "error")
    assert "y is the prediction +1 for 100.0%; pass (y - 1) % 4." in found.fix
    found = only(run(y=(Y - 1) % CLASSES), "accuracy", "error")
    assert "y is the prediction -1 for 100.0%; pass (y + 1) % 4." in found.fix


def test_sixty_percent_of_two_classes_may_be_guessing():
    said = {right: check_accuracy(np.zeros(20, int), np.arange(20) // right, 2, None)[0] for right in (12, 17)}
    assert said[12].severity == "error" and said[17].severity == "info"


@pytest.mark.parametrize("low, high, bounds, warned", [
    (0.0, 0.2, (0.0, 1.0), True), (0.0, 0.3, (0.0, 1.0), False), (0.0, 1.0, (-1.0, 1.0), True),
    (-0.1, 1.0, (-1.0, 1.0), False)])
def test_ranges_that_leave_most_of_the_bounds_alone(low, high, bounds, warned):
    x = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 8, 8, 1)
    assert [found.severity for found in check_range(x, bounds)] == ["warning"] * warned


@pytest.mark.parametrize("share, warned", [(0.7, False), (1.0, True)])
def test_a_class_that_is_predicted_for_most_images_is_no_constant_model(share, warned):
    logits = 5.0 * np.eye(CLASSES)[np.where(np.arange(COUNT) < share * COUNT, 0, Y)] + RNG.random((COUNT, CLASSES))
    assert [found.name for found in check_output(None, logits, X, Y)] == ["constant"] * warned


@pytest.mark.parametrize("count, won, better", [
    (20, 3, False), (40, 9, False), (40, 10, True), (1000, 12, False), (1000, 30, True)])
def test_a_normalisation_is_better_only_where_chance_does_not_explain_it(count, won, better):
    y, x = np.arange(count) % 10, np.arange(count, dtype=float).reshape(-1, 1, 1, 1)

    def logits(x, affine):  # the last `won` images are right with the candidate only
        index = x.reshape(-1).astype(int)
        return np.eye(10)[np.where((affine is None) & (index >= count - won), index + 1, index) % 10]

    option = normalisation.Candidate("", "", np.ones(1), np.ones(1))
    verdict = normalisation.better_normalisation(logits, x, y, [option])
    assert verdict == (normalisation.Verdict(option, 1 - won / count, 1.0, count) if better else None)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (2.0, -1.0), (255.0, 0.0)])
def test_a_normalisation_that_replaces_another_undoes_it(scale, shift):
    u, rules = np.linspace(0.0, 1.0, 5)[:, None], (normalisation._UNIT, normalisation._HALF, normalisation._STATISTICS)
    options, replaced = normalisation.candidates((scale, shift), 3, "u"), 0
    for inside in (normalisation._HALF, normalisation._STATISTICS):
        for wanted in rules:
            for option in options:
                if option.what == f"the {inside.noun} that apply_fn seems to do is replaced by {wanted.noun}":
                    passed = option.scale * (scale * u + shift) + option.shift
                    found = ((passed - shift) / scale - inside.mean) / inside.std
                    np.testing.assert_allclose(found, (u - wanted.mean) / wanted.std * np.ones(3), atol=1e-9)
                    replaced += 1
    assert replaced >= 2


def test_accuracy_in_percent_is_refused():
    with pytest.raises(ValueError, match=r"expected_accuracy must lie in \[0, 1\], got 90.66; "):
        run(expected_accuracy=90.66)
    with pytest.raises(ValueError, match="bounds must be"):
        run(bounds=(1, 0))


# Images and bounds.


@pytest.mark.parametrize(
    ("x", "bounds", "severity", "words", "fix"),
    [
        (255 * X, (0.0, 1.0), "error", "look like 8-bit images (0-255)", "x / 255"),
        (2 * X - 1, (0.0, 1.0), "error", "look like images in [-1, 1]", "bounds=(-1., 1.)"),
        ((X - 0.45) / 0.225, (0.0, 1.0), "error", "normalised by a mean and std", "inside apply"),
        (1e4 * X, (0.0, 1.0), "error", "no usual image range", "bounds=(lowest, highest)"),
        (X, (0.0, 255.0), "warning", "0.4% of bounds=(0, 255)", "bounds=(0., 1.)"),
        (X / 255, (0.0, 1.0), "warning", "0.4% of bounds=(0, 1)", "scaled twice"),
        (X, (-1.0, 1.0), "warning", "never go below 0", "bounds=(0., 1.)"),
    ],
)
def test_images_that_do_not_fit_their_bounds(x, bounds, severity, words, fix):
    found = named(run(x=x.astype(np.float32), bounds=bounds), "bounds")
    assert found.severity == severity and words in found.message and fix in found.fix
    assert "The images span" in found.message


def test_other_ranges_are_fine_with_their_bounds():
    eight_bit = run(lambda p, x: quadrants(p, x / 255), x=255 * X, bounds=(0.0, 255.0))
    assert not serious(eight_bit)
    assert not serious(run(lambda p, x: quadrants(p, (x + 1) / 2), x=2 * X - 1, bounds=(-1, 1)))


def test_broken_images_are_counted_and_left_out():
    x = X.copy()
    x[[3, 7], 0, 0, 0] = np.nan, np.inf
    found = only(run(x=x), "images", "warning")
    assert "2 of 40 (5.0%) images hold NaN" in found.message and "image 3" in found.message
    assert only(run(x=np.full_like(X, np.nan)), "images", "error")


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        ({"x": X.transpose(0, 3, 1, 2)}, "images", "NHWC"),
        ({"x": X.astype(np.float16)}, "images", "float32 or float64"),
        ({"x": (255 * X).astype(np.uint8)}, "images", "uint8"),
        ({"x": X[:0], "y": Y[:0]}, "images", "no image"),
        ({"y": np.eye(CLASSES)[Y]}, "labels", "class indices"),
        ({"y": Y.astype(float)}, "labels", "integer"),
        ({"y": Y + 1}, "labels", "got 4"),
        ({"targets": Y}, "targets", "differ"),
        ({"targets": Y[:3]}, "targets", "one entry per image"),
        ({"apply_fn": lambda p, x: p["absent"]}, "model", "KeyError"),
        ({"apply_fn": lambda p, x: (quadrants(p, x), x)}, "model", "tuple"),
    ],
)
def test_what_attack_would_refuse_is_an_error_with_a_fix(arguments, name, words):
    found = only(run(**arguments), name, "error")
    assert words in found.message and len(found.fix) > 10


@pytest.mark.parametrize("keep", [lambda z: z[:, :1], lambda z: z[:, 0], lambda z: z[:, :0]])
def test_fewer_than_two_classes(keep):
    found = only(run(lambda p, x: keep(quadrants(p, x))), "classes", "error")
    assert "at least 2 classes" in found.message


def test_targets_that_are_predicted_already_are_mentioned():
    y = np.where(np.arange(COUNT) < 4, (Y + 1) % CLASSES, Y)
    findings = run(y=y, targets=np.where(np.arange(COUNT) < 4, Y, (Y + 1) % CLASSES))
    assert not serious(findings)
    assert named(findings, "targets").message.startswith("4 of 40 (10.0%) clean images")


# Normalisation.


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_for_another_range(channels):
    x, y = images(channels)

    def signed(params, x):  # Weights for [-1, 1]: elsewhere the sharp bump forgets its place.
        z = quadrants(params, x * 0.5 + 0.5)
        return jnp.where(x.min((1, 2, 3))[:, None] < -0.8, z, -z)

    found = only([f for f in run(signed, x, y) if f.name != "accuracy"], "normalisation", "warning")
    assert found.message == ("Clean accuracy is 0.0% as passed and 100.0% when the images are "
                             "scaled to [-1, 1] (on 40 images).")
    assert "(x - 0.5) / 0.5" in found.fix and "normalize=(0.5, 0.5)" in found.fix


@pytest.fixture(scope="module")
def cifar(shared):
    archive = np.load(shared / "data/cifar10/test_0000_0399.npz")
    x, y = archive["x"].astype(np.float32) / 255, archive["y"].astype(np.int32)

    def checked(weights, normalize, images=x, **arguments):
        apply_fn, params = models.load(
            "resnet20", weights=shared / f"data/cifar10/{weights}.safetensors", normalize=normalize)
        return check(params, apply_fn, images[:100], y[:100], **arguments)

    checked.x = x
    return checked


@pytest.mark.slow
def test_real_network_with_its_own_normalisation(cifar):
    assert not serious(cifar("resnet20_gse_authors", (0.5, 0.5), expected_accuracy=0.9066))


@pytest.mark.slow  # with other networks it is quick, above
@pytest.mark.parametrize(
    ("weights", "normalize", "words", "fix"),
    [
        ("resnet20_gse_authors", IMAGENET, "when the normalisation with the ImageNet (or a similar)"
         " mean and std that apply_fn seems to do is replaced by scaling to [-1, 1]",
         "normalize=(0.5, 0.5)"),
        pytest.param("resnet20_imagenet_norm", (0.0, 1.0), "when the images are normalised with the "
                     "ImageNet (or a similar) mean and std", f"normalize={IMAGENET}"),
    ],
)
def test_real_network_with_a_wrong_normalisation(cifar, weights, normalize, words, fix):
    findings = cifar(weights, normalize, expected_accuracy=0.9066)
    found = named(findings, "normalisation")
    assert found.severity == "warning" and words in found.message and fix in found.fix
    assert named(findings, "accuracy").severity == "warning"
    assert {f.name for f in serious(findings)} == {"accuracy", "normalisation"}


@pytest.mark.slow
def test_real_network_fed_with_eight_bit_images(cifar):
    findings = cifar("resnet20_gse_authors", (0.5, 0.5), 255 * cifar.x)
    assert named(findings, "bounds").severity == "error"
    assert "when the images are scaled to [0, 1]" in named(findings, "normalisation").message
    assert "x / 255" in named(findings, "normalisation").fix


@pytest.mark.slow  # `gse-jax check` looks at it in the quick run
def test_embedded_model_gives_no_false_alarm():
    apply_fn, params = models.load("resnet20", weights="digits")
    digits = data.load("digits")
    assert not serious(check(params, apply_fn, digits.images[::3], digits.labels[::3],
                             expected_accuracy=0.989,
                             targets=(digits.labels[::3] + 1) % 10))


# What a row depends on.


class BatchNormNet(nn.Module):
    """A small Linen network with BatchNorm and dropout, as people write them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), dtype=x.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=x.dtype)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(CLASSES, dtype=x.dtype)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def linen():
    """The network, and labels that it gets right in evaluation mode."""
    with jax.numpy_dtype_promotion("standard"):
        net = BatchNormNet()
        variables = net.init(jax.random.key(1), X, train=False)
        y = net.apply(variables, X, train=False).argmax(-1)
    return net, variables, np.asarray(y, np.int32)


def lenient(apply_fn):
    """Flax mixes dtypes in BatchNorm and dropout, which the strict session forbids."""

    def wrapped(params, x):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return apply_fn(params, x)

    return wrapped


def test_training_mode_mixes_the_rows(linen):
    net, variables, y = linen
    key = jax.random.key(0)

    def training(params, x):
        return net.apply(params, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

    def evaluation(params, x):
        return net.apply(params, x, train=False)

    mixed = named(run(lenient(training), y=y, params=variables), "batch")
    assert mixed.severity == "warning"
    assert "change with its batch mates" in mixed.message and "predictions flip" in mixed.message
    assert "use_running_average=True" in mixed.fix
    assert not {"batch", "random"} & {f.name for f in run(lenient(evaluation), y=y,
                                                          params=variables)}


@pytest.mark.parametrize("wrong", [
    lambda z: z - z.mean(0, keepdims=True),  # Mates.
    lambda z: z + jnp.arange(len(z), dtype=z.dtype)[:, None] * jnp.eye(1, CLASSES, dtype=z.dtype),
    lambda z: z * (len(z) / 10),  # The number of rows.
])
def test_dependence_on_mates_place_and_batch_size(wrong):
    found = named(run(lambda p, x: wrong(quadrants(p, x))), "batch")
    assert "of a row's spread" in found.message


def test_one_image_shows_a_mixing_model_as_well():
    assert named(run(lambda p, x: quadrants(p, x - x.mean(0, keepdims=True) + 0.4), x=X[:1],
                     y=Y[:1]), "batch")


def noisy(params, x):
    def noise(x):
        return np.random.normal(0, 0.2, x.shape).astype(x.dtype)

    drawn = jax.pure_callback(noise, jax.ShapeDtypeStruct(x.shape, x.dtype),
                              jax.lax.stop_gradient(x))
    return quadrants(params, x + drawn)


def frozen_noise(params, x):
    return quadrants(params, x + np.random.normal(0, 0.2, x.shape).astype(np.float32))


@pytest.mark.parametrize(("apply_fn", "words"), [(noisy, "Two calls with the same images differ"),
                                                 (frozen_noise, "Two traces of apply_fn differ")])
def test_random_models(apply_fn, words):
    found = named(run(apply_fn), "random")
    assert found.severity == "warning" and found.message.startswith(words)
    assert "predictions flip" in found.message
    assert "batch" not in {f.name for f in run(apply_fn)}


# What the model gives.


def test_probabilities_in_place_of_logits():
    found = only(run(lambda p, x: jax.nn.softmax(quadrants(p, x))), "probabilities", "warning")
    assert "sum to 1" in found.message and "softmax" in found.fix


def test_saturated_logits_are_gradient_masking():
    found = only(run(params={"scale": jnp.float32(3000.0)}), "saturated", "warning")
    assert "more than 80 apart for 40 of 40" in found.message and "divided by" in found.fix


def test_the_advice_for_some_saturated_images_is_about_those():
    def model(params, x):
        logits = quadrants(params, x)
        return jnp.where(jnp.arange(len(x))[:, None] % 5 == 0, 3000.0, 1.0) * logits

    found = next(f for f in run(model) if f.name == "saturated")
    assert "for 8 of 40" in found.message and "divided by 0" not in found.fix


def test_saturated_probabilities_have_no_gradient():
    findings = run(lambda p, x: jax.nn.softmax(1e4 * quadrants(p, x)))
    assert {f.name for f in serious(findings)} == {"probabilities", "gradients"}
    assert "exactly zero for" in named(findings, "gradients").message


@pytest.mark.parametrize(("step", "severity", "count"), [
    (lambda x: jnp.round(x * 8) / 8, "error", 40),
    (lambda x: jnp.where((x[:, 0, 0, :1] < 0.3)[..., None, None], jax.lax.stop_gradient(x), x),
     "warning", int((X[:, 0, 0, 0] < 0.3).sum())),
])
def test_zero_gradients(step, severity, count):
    found = only(run(lambda p, x: quadrants(p, step(x))), "gradients", severity)
    assert f"exactly zero for {count} of 40" in found.message and "stop_gradient" in found.fix


def test_non_finite_gradients_with_finite_logits():
    x = X.copy()
    x[5] = 0.0  # The gradient of the norm at 0 is NaN.
    findings = run(lambda p, x: quadrants(p, x) + 0 * jnp.sqrt((x**2).sum((1, 2, 3)))[:, None], x)
    found = only(findings, "gradients", "warning")
    assert "NaN or infinite for 1 of 40 (2.5%)" in found.message and "sqrt" in found.fix


def test_non_finite_logits():
    bad = X[6].sum()
    findings = run(lambda p, x: quadrants(p, x) + jnp.where(
        jnp.abs(x.sum((1, 2, 3)) - bad) < 1e-3, jnp.nan, 0.0).astype(x.dtype)[:, None])
    found = only(findings, "logits", "warning")
    assert "1 of 40 (2.5%) images (first: image 6)" in found.message
    # So are its gradients, which is no second fault.
    only(run(lambda p, x: quadrants(p, x) * jnp.where(jnp.abs(x.sum((1, 2, 3)) - bad) < 1e-3, jnp.nan, 1.0).astype(
        x.dtype)[:, None]), "logits", "warning")
    assert named(run(lambda p, x: quadrants(p, x) * jnp.inf), "logits").severity == "error"


def test_a_model_that_cannot_be_differentiated():
    def loop(params, x):
        return jax.lax.while_loop(lambda z: jnp.isnan(z).any(), jnp.tanh, quadrants(params, x))

    found = only(run(loop), "gradients", "error")
    assert "cannot be differentiated: ValueError" in found.message and "lax.scan" in found.fix


@pytest.mark.parametrize("count", [COUNT, 1])
def test_dead_and_constant_models(count):
    zero = {"scale": jnp.float32(0.0)}
    found = named(run(params=zero, x=X[:count], y=Y[:count]), "constant")
    assert found.severity == "error"
    assert f"the same logits for all {count} images" in found.message


def test_a_model_that_always_says_the_same_class():
    shift = np.float32([[0, 0, 50, 0]])
    found = named(run(lambda p, x: quadrants(p, x) + shift), "constant")
    assert found.severity == "warning"
    assert "predicts class 2 for 40 of 40 (100.0%) images" in found.message
