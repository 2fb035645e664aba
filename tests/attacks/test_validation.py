"""Bad input is one clear line that names the argument and the fix, before anything compiles."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks.algorithm import Method
from tests.toy_model import linear_logits

RNG = np.random.default_rng(0)
PARAMS = (RNG.normal(size=(12 * 12 * 3, 5)).astype("f4"), np.zeros(5, "f4"))
X = RNG.uniform(0.2, 0.8, (4, 12, 12, 3)).astype("f4")
Y = np.asarray(linear_logits(PARAMS, jnp.asarray(X)).argmax(-1)).astype("i4")


def attack(x=X, y=Y, apply_fn=linear_logits, params=PARAMS, **options):
    return gse_jax.attack(params, apply_fn, x, y, **options)


NAN_IMAGE = X.copy()
NAN_IMAGE[2, 1, 1, 1] = np.nan
S, H = gse_jax.preset("gse", "cifar10", targeted=False)

CASES = {
    "nchw": (dict(x=X.transpose(0, 3, 1, 2)), ValueError, "x .*NCHW"),
    "no batch axis": (dict(x=X[0]), ValueError, r"x .*x\[None\]"),
    "two channels": (dict(x=X[..., :2]), ValueError, "x .*1 or 3 channels"),
    "too small": (dict(x=X[:, :7]), ValueError, "x .*8x8"),
    "uint8": (dict(x=(X * 255).astype("u1")), TypeError, "x .*uint8.*255"),
    "half precision": (dict(x=X.astype("f2")), TypeError, r"x .*float16; use x.astype\('float32'\)$"),
    "0 to 255": (dict(x=X * 255), ValueError, "x .*divide by 255"),
    "outside": (dict(x=X * 3), ValueError, "x .*bounds.*pass the bounds of your images"),
    "outside by more than rounding": (dict(x=X + (1.001 - X.max())), ValueError, "x .*bounds.*pass the bounds"),
    "below": (dict(x=X - 0.5), ValueError, "x .*bounds.*pass the bounds"),
    "nan pixel": (dict(x=NAN_IMAGE), ValueError, "x .*image 2"),
    "not an array": (dict(x="cat.png"), TypeError, "x "),
    "labels as a column": (dict(y=Y[:, None]), ValueError, r"y .*use y\[:, 0\]"),
    "one-hot": (dict(y=np.eye(5, dtype="f4")[Y]), ValueError, r"y .*argmax"),
    "float labels": (dict(y=Y.astype("f4")), TypeError, "y .*integer.*float32"),
    "label too large": (dict(y=Y + 7), ValueError, r"y .*\[0, 4\]"),
    "label one too large": (dict(y=0 * Y + 5), ValueError, r"y .*\[0, 4\]"),
    "label negative": (dict(y=Y - 9), ValueError, r"y .*\[0, 4\]"),
    "short y": (dict(y=Y[:3]), ValueError, "y .*4 images"),
    "short targets": (dict(targets=Y[:3]), ValueError, "targets .*4 images"),
    "target out of range": (dict(targets=Y + 5), ValueError, r"targets .*\[0, 4\]"),
    "float targets": (dict(targets=(Y + 1.0) % 5), TypeError, "targets .*integer"),
    "targets equal y": (dict(targets=Y), ValueError, "targets .*differ"),
    "tuple out": (dict(apply_fn=lambda p, x: (linear_logits(p, x), 0)), TypeError,
                  r"apply_fn .*tuple.*\[0\].*evaluation mode"),
    "dict out": (dict(apply_fn=lambda p, x: {"logits": linear_logits(p, x)}), TypeError,
                 r"apply_fn .*dict.*\['logits'\]"),
    "a function among the params": (dict(params={"dense": PARAMS, "activation": [jnp.tanh]}), TypeError,
                                    r"params\['activation'\]\[0\].*from_equinox"),
    "no derivative": (dict(apply_fn=lambda p, x: jax.pure_callback(
        linear_logits, jax.ShapeDtypeStruct((len(x), 5), x.dtype), p, x)), ValueError,
        "apply_fn cannot be differentiated: .*sparse_rs"),
    "no derivative backwards": (dict(apply_fn=lambda p, x: jax.lax.while_loop(
        lambda c: c.sum() < -1e9, lambda c: c, linear_logits(p, x))), ValueError,
        "apply_fn cannot be differentiated: .*sparse_rs"),
    "scalar out": (dict(apply_fn=lambda p, x: linear_logits(p, x).sum()), ValueError,
                   "apply_fn .*classes"),
    "one class": (dict(apply_fn=lambda p, x: linear_logits(p, x)[:, :1]), ValueError,
                  "apply_fn .*classes"),
    "batch dropped": (dict(apply_fn=lambda p, x: linear_logits(p, x)[:1]), ValueError,
                      "apply_fn .*classes"),
    "labels out": (dict(apply_fn=lambda p, x: linear_logits(p, x).argmax(-1, keepdims=True)
                        .repeat(2, 1)), TypeError, "apply_fn .*float"),
    "wrong order": (dict(params=linear_logits, apply_fn=PARAMS), TypeError, "apply_fn .*order"),
    "model fails": (dict(x=X[:, :9]), ValueError, "apply_fn.* failed"),
    "bounds swapped": (dict(bounds=(1.0, 0.0)), ValueError, "bounds"),
    "seed beyond 32 bits": (dict(key=2**32), ValueError, "key must be from 0 to"),
    "bounds equal": (dict(x=X * 0, bounds=(0.0, 0.0)), ValueError, "bounds must be .* low < high"),
    "bounds infinite": (dict(bounds=(0.0, np.inf)), ValueError, "bounds must be .* low < high"),
    "bounds scalar": (dict(bounds=1.0), ValueError, "bounds"),
    "method": (dict(method="gze"), ValueError, "method='gze'.*'gse'"),
    "lanes": (dict(lanes=0), ValueError, "lanes"),
    "key": (dict(key="seed"), TypeError, "key"),
    "settings type": (dict(settings=3), TypeError, "settings"),
    "hyperparams type": (dict(hyperparams={"mu": 1.0}), TypeError, "hyperparams"),
    "hyperparams vector": (dict(hyperparams=H._replace(mu=np.ones(2))), ValueError,
                           r"hyperparams\.mu.*vmap"),
    "no runs": (dict(settings=gse_jax.GSESettings(num_runs=0)), ValueError, "num_runs"),
    "even blur": (dict(settings=gse_jax.GSESettings(blur_size=4)), ValueError, "blur_size"),
    "patch": (dict(settings=gse_jax.GSESettings(patch_size=13)), ValueError, "patch_size"),
    "a list in the settings": (dict(method="gse_refined", settings=dataclasses.replace(
        gse_jax.preset("gse_refined", "cifar10", False)[0], scales=[3.0])), TypeError,
        r"settings\.scales .*tuple"),
    "step size": (dict(hyperparams=H._replace(step_size=-1.0)), ValueError, "step_size"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(name):
    options, error, pattern = CASES[name]
    with pytest.raises(error, match=pattern) as caught:
        attack(**options)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 400


def test_nothing_is_computed_before_the_checks():
    """The model is traced for its output shape, never run."""
    calls = []

    def counting(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return linear_logits(params, x)

    with pytest.raises(ValueError):
        attack(apply_fn=counting, y=Y + 7)
    jax.effects_barrier()
    assert not calls


def test_unknown_domain():
    with pytest.raises(ValueError, match="cifar11.*'cifar10'"):
        gse_jax.preset("gse", "cifar11", targeted=False)
    with pytest.raises(ValueError, match="method='gze'"):
        gse_jax.preset("gze", "cifar10", targeted=False)


def test_impossible_label_under_jit_is_non_finite_not_fooled():
    result = jax.jit(lambda y: attack(x=jnp.asarray(X), y=y))(jnp.asarray(Y).at[1].set(17))
    assert int(result.status[1]) == gse_jax.Status.NON_FINITE and not bool(result.success[1])
    assert (np.asarray(result.status)[[0, 2, 3]] == gse_jax.Status.FOUND).all()


def test_lists_and_numpy_are_accepted():
    a = attack(x=X.tolist(), y=Y.tolist())
    b = attack()
    np.testing.assert_array_equal(a.adversarials, b.adversarials)
    assert a.adversarials.dtype == jnp.float32 and a.status.dtype == jnp.int32


def test_bounds_are_those_that_the_images_can_hold():
    """2.2 in float32 lies above 2.2; images that touch it are inside."""
    low, high = -1.8, 2.2
    x = (X * 3).clip(low, high).astype("f4")
    x[0, 0, 0], x[0, 0, 1] = low, high
    assert float(x.max()) > high
    params = (PARAMS[0] / 3, PARAMS[1])
    y = np.asarray(linear_logits(params, jnp.asarray(x)).argmax(-1))
    calls = (lambda: gse_jax.attack(params, linear_logits, x, y + 7, bounds=(low, high)),
             lambda: gse_jax.refine(params, linear_logits, x, x, y + 7, bounds=(low, high)))
    for call in calls:
        with pytest.raises(ValueError, match="y .*classes"):  # past the images: nothing is compiled
            call()
    x[0, 0, 1] = np.nextafter(x[0, 0, 1], np.float32(np.inf))
    for call in calls:
        with pytest.raises(ValueError, match=r"x must lie inside bounds.*x.clip\(-1.79999995\d+, 2.20000004\d+\)"):
            call()


def test_settings_of_a_method_of_ones_own_may_be_a_named_tuple(monkeypatch):
    class Settings(NamedTuple):
        loss: str = "margin"
        scales: tuple | list = ()

    gse = gse_jax.attacks.METHODS["gse"]
    own = Method(lambda settings, *rest, **call: gse.bind(S, *rest, **call), lambda *_: (Settings(), H),
                 lambda *_: None)
    monkeypatch.setitem(gse_jax.attacks.METHODS, "own", own)
    with pytest.raises(TypeError, match=r"settings\.scales must be a tuple"):
        attack(method="own", settings=Settings(scales=[1.0]))
    with pytest.raises(ValueError, match="y "):  # past the settings: nothing is compiled
        attack(method="own", y=Y + 7)


@pytest.mark.parametrize("field", ["num_runs", "max_steps", "blur_size"])
@pytest.mark.parametrize("value", [12.5, 5.0, None, True, "3"])
def test_settings_that_count_are_whole_numbers(field, value):
    """A loop of 12.5 steps would never end."""
    with pytest.raises(ValueError, match=f"settings.{field}={value!r} must be a whole number >= 1"):
        attack(settings=dataclasses.replace(S, **{field: value}))


@pytest.mark.parametrize("method, field", [("sparse_rs", "alpha"), ("sigma_zero", "threshold")])
def test_fractions_end_at_one(method, field):
    _, hyperparams = gse_jax.preset(method, "cifar10")
    with pytest.raises(ValueError, match=f"hyperparams.{field}=5 must be <= 1"):
        attack(method=method, hyperparams=hyperparams._replace(**{field: 5.0}))


@pytest.mark.parametrize("method, field", [("sigma_zero", "max_steps"), ("gse_refined", "max_evals"),
                                           ("gse_refined", "search_runs"), ("pgd", "num_restarts")])
def test_so_are_those_of_other_methods(method, field):
    settings, _ = gse_jax.preset(method, "cifar10")
    with pytest.raises(ValueError, match=f"{field}=2.5 must be a whole number"):
        attack(method=method, settings=dataclasses.replace(settings, **{field: 2.5}))


@pytest.mark.parametrize("method, field", [
    ("pgd", "random_start"), ("pgd0", "sigma_map"), ("fwnucl", "stop_at_success"),
    ("strattack", "retrain_must_improve"), ("sparse_pgd", "unprojected")])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_switches_are_true_or_false(method, field, value):
    """Any text would be true."""
    settings, _ = gse_jax.preset(method, "cifar10")
    with pytest.raises(TypeError, match=f"settings.{field}={value!r} must be True or False"):
        attack(method=method, settings=dataclasses.replace(settings, **{field: value}))


class Tensor:  # of a library that NumPy does not know
    ndim, shape, dtype = 4, (4, 12, 12, 3), "torch.float32"


@pytest.mark.parametrize("name", ["x", "y", "targets"])
def test_tensors_of_other_libraries_are_named(name):
    expected = rf"{name} must be a NumPy or JAX array, got a .*Tensor; use numpy.asarray\({name}\)"
    with pytest.raises(TypeError, match=expected):
        attack(**{name: Tensor()})
    with pytest.raises(TypeError, match=expected):
        gse_jax.differentiable_attack(PARAMS, linear_logits, **({"x": X, "y": Y} | {name: Tensor()}))


def test_images_in_0_1_under_bounds_of_bytes_are_remarked_on():
    with pytest.warns(UserWarning, match=r"inside bounds=\(0, 255\); images in \[0, 1\] take"):
        attack(bounds=(0, 255), settings=dataclasses.replace(S, num_runs=1, max_steps=1, phase1_steps=1))


@pytest.mark.parametrize("options, error, words", [
    (dict(progress=True), TypeError, "progress must be a function .* got True"),
    (dict(method=["gse"]), ValueError, r"method=\['gse'\] is unknown"),
    (dict(hyperparams=H._replace(mu=None)), ValueError, "hyperparams.mu=None must be a number"),
    (dict(method="homotopy", hyperparams=gse_jax.preset("homotopy", "cifar10")[1]._replace(decrease=1.5)), ValueError,
     "decrease=1.5 must be <= 1"),
    (dict(method="gse_refined", settings=dataclasses.replace(gse_jax.preset("gse_refined", "cifar10")[0], scales=3.0)),
     ValueError, "settings.scales=3.0 must hold"),
])
def test_other_mistakes_are_named_too(options, error, words):
    with pytest.raises(error, match=words):
        attack(**options)


def test_a_stream_s_targets_come_in_its_batches():
    with pytest.raises(TypeError, match="targeted must be True or False, got ndarray"):
        gse_jax.attack_stream(PARAMS, linear_logits, [], image_shape=(12, 12, 3), targeted=Y)
