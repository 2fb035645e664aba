"""One table drives every attack of the registry through the engine's contract."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status
from gse_jax.attacks import METHODS
from gse_jax.attacks.algorithm import Evaluation, Method, Sample
from gse_jax.attacks.baselines.group_mirror_descent import GSMDSettings
from gse_jax.attacks.baselines.homotopy import HomotopySettings
from gse_jax.attacks.baselines.nuclear_frank_wolfe import FWnuclSettings
from gse_jax.attacks.baselines.perturbation_factorization import SAPFSettings
from gse_jax.attacks.baselines.projected_gradient_descent import PGDSettings
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0Settings
from gse_jax.attacks.baselines.random_search import SparseRSSettings
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroSettings
from gse_jax.attacks.baselines.sparse_frank_wolfe import SAIFSettings
from gse_jax.attacks.baselines.sparse_projected_gradient_descent import SparsePGDSettings
from gse_jax.attacks.baselines.structured_attack import StrAttackSettings
from gse_jax.attacks.refinement import GSERefinedSettings
from tests.toy_model import linear_logits, toy


class Row(NamedTuple):
    """One attack of the contract.

    Attributes:
        settings: short settings, so that the table runs quickly.
        planted: settings for the image of `backdoor`, None where its group is no perturbation of
            the method's kind.
        planted_hyperparams: what differs from the preset there: with the paper's mu = 1 GSE's l2
            term outweighs the backdoor's margin, so that no perturbation is a minimum, and the
            homotopy attack's radius is too small for the backdoor.
    """

    settings: Any
    planted: Any = None
    planted_hyperparams: dict[str, float] = {}


TABLE = {
    # As in `test_engine.py`: some programs are the same.
    "gse": Row(gse_jax.GSESettings(num_runs=6, max_steps=40, phase1_steps=20),
               planted=gse_jax.GSESettings(), planted_hyperparams={"mu": 0.1}),
    "gse_refined": Row(GSERefinedSettings(num_runs=4, max_steps=20, phase1_steps=8, max_evals=60),
                       planted=GSERefinedSettings(), planted_hyperparams={"mu": 0.1}),
    "pgd": Row(PGDSettings(max_steps=20, num_restarts=2)),
    "pgd l2": Row(PGDSettings(norm="l2", max_steps=20, random_start=False)),
    "sigma_zero": Row(SigmaZeroSettings(max_steps=40),
                      planted=SigmaZeroSettings(max_steps=200)),
    "pgd0": Row(PGD0Settings(num_pixels=12, max_steps=10, num_restarts=2),
                planted=PGD0Settings(num_pixels=8)),
    "pgd0 sigma": Row(PGD0Settings(num_pixels=50, max_steps=10, num_restarts=2, sigma_map=True)),
    "sparse_rs": Row(SparseRSSettings(num_pixels=20, max_queries=40, num_restarts=2),
                     planted=SparseRSSettings(num_pixels=8, max_queries=1000, num_restarts=20)),
    "sparse_rs patches": Row(SparseRSSettings(num_pixels=30, kind="patches", max_queries=60),
                             planted=SparseRSSettings(num_pixels=36, kind="patches",
                                                      max_queries=1000, num_restarts=10)),
    "sparse_rs frames": Row(SparseRSSettings(num_pixels=80, kind="frames", max_queries=60)),
    "sparse_pgd": Row(SparsePGDSettings(num_pixels=12, max_steps=20),
                      planted=SparsePGDSettings(num_pixels=8, max_steps=300)),
    "sparse_pgd patch": Row(SparsePGDSettings(num_pixels=30, max_steps=20, structure="patch",
                                              unprojected=False),
                            planted=SparsePGDSettings(num_pixels=16, max_steps=300, stride=2,
                                                      structure="patch", pattern=((1, 1),) * 2)),
    "sparse_pgd row": Row(SparsePGDSettings(num_pixels=40, max_steps=20, structure="row")),
    "saif": Row(SAIFSettings(num_pixels=12, max_steps=20),
                planted=SAIFSettings(num_pixels=8)),
    "fwnucl": Row(FWnuclSettings(max_steps=4, num_trials=2),
                  planted=FWnuclSettings(max_steps=20)),
    "strattack": Row(StrAttackSettings(num_searches=4, max_steps=12, num_retrainings=2,
                                       retrain_steps=6),
                     planted=StrAttackSettings(num_searches=5)),
    "gsmd": Row(GSMDSettings(max_steps=16, cells_per_axis=4),
                planted=GSMDSettings(max_steps=60, cells_per_axis=8)),
    "gsmd superpixels": Row(GSMDSettings(max_steps=16, cells_per_axis=4, groups="superpixels")),
    "homotopy": Row(HomotopySettings(num_segments=20, max_steps=4, max_rounds=8, num_new=30,
                                     tuning_steps=3),
                    planted=HomotopySettings(num_segments=40), planted_hyperparams={"radius": 1.0}),
    "homotopy entries": Row(HomotopySettings(groups="entries", max_steps=4, max_rounds=8,
                                             num_new=90, targeted_loss="cross_entropy"),
                            planted=HomotopySettings(groups="entries", num_new=20),
                            planted_hyperparams={"radius": 1.0}),
    "sapf": Row(SAPFSettings(num_pixels=40, num_searches=6, rounds=1, magnitude_steps=10,
                             selection_steps=6, num_segments=20),
                planted=SAPFSettings(num_pixels=8, num_searches=6, rounds=1, num_segments=40,
                                     selection_steps=600)),
}
# Variants of one method have rows of their own, "method variant".
#
# Every row compiles programs of its own, so the quick run takes each method once: variants, and for
# the compared methods the tests of what the engine does for all alike, are in the slow one.
ROWS = [pytest.param(row, marks=[pytest.mark.slow] if " " in row else []) for row in TABLE]
# One method of each kind: a gradient in every call, in some lanes, in some calls, in none.
QUICK = ("gse", "strattack")


def rows_of(quick):
    return [pytest.param(row, marks=[] if row in quick else [pytest.mark.slow]) for row in TABLE]


SOME_ROWS = rows_of(QUICK)
ENGINE_ROWS = rows_of(QUICK[:1])


def test_table_covers_the_registry():
    assert {row.split()[0] for row in TABLE} == METHODS.keys()
    # However it is read, a row is a Method, not yet where one would be imported from.
    assert all(isinstance(row, Method) for row in [*METHODS.copy().values(), *dict(METHODS).values()])


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("dtype, shape", [(jnp.float32, (20, 20, 3)), (jnp.float64, (8, 11, 1))])
def test_step_keeps_structure_shapes_and_dtypes(row, dtype, shape):
    method = row.split()[0]
    _, hyperparams = gse_jax.preset(method, "cifar10", targeted=False)
    hyperparams = jax.tree.map(lambda h: jnp.asarray(h, dtype), hyperparams)
    algorithm = METHODS[method].bind(TABLE[row].settings, hyperparams, targeted=False,
                                     bounds=(0.0, 1.0), key=jax.random.key(0))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    image = jax.ShapeDtypeStruct(shape, dtype)
    segments = METHODS[method].segment and METHODS[method].segment(TABLE[row].settings,
                                                                   np.zeros((1, *shape)))
    segments = None if segments is None else segments[0]
    state = jax.eval_shape(algorithm.init, Sample(image, scalar, scalar, scalar, segments))
    evaluation = Evaluation(jax.ShapeDtypeStruct((5,), dtype), jax.ShapeDtypeStruct((), dtype),
                            image)
    stepped = jax.eval_shape(algorithm.step, state, evaluation)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)
    assert describe(stepped) == describe(state)
    assert jax.eval_shape(algorithm.query, state).shape == shape
    outcome = jax.eval_shape(algorithm.finish, state)
    assert outcome.adversarials.shape == shape and outcome.adversarials.dtype == dtype


# Targeted in the quick run for one method only: each direction is a program of its own.
DIRECTIONS = ([pytest.param(*row.values, jnp.float32, False, marks=row.marks) for row in ROWS]
              + [pytest.param(*row.values, jnp.float32, True, marks=row.marks) for row in ENGINE_ROWS]
              + [pytest.param(row, jnp.float64, False, marks=pytest.mark.slow) for row in TABLE])


@pytest.mark.parametrize("row, dtype, targeted", DIRECTIONS)
def test_result_is_true(row, dtype, targeted):
    """Flags, bounds, dtypes, budgets and counts say what a fresh look at the images says."""
    method = row.split()[0]
    params, apply_fn, x, y = toy(dtype)
    y = y.at[1].set((y[1] + 1) % 5)  # one image is misclassified from the start
    targets = (y + 2) % 5 if targeted else None
    result = gse_jax.attack(params, apply_fn, x, y, targets=targets, method=method,
                            settings=TABLE[row].settings, bounds=(-1.0, 1.0), key=1)
    logits = apply_fn(params, result.adversarials)
    predicted = logits.argmax(-1).astype(jnp.int32)
    fooled = predicted == targets if targeted else predicted != y
    # Another batch rounds differently; homotopy ends 4e-7 from the boundary on one of these images.
    best, second = jnp.sort(logits, axis=-1)[:, :-3:-1].T
    clear = np.asarray((best - second > 2e-6) | (dtype == jnp.float64))
    assert clear.sum() >= 2
    np.testing.assert_array_equal(result.success[clear], fooled[clear])
    if not targeted:
        assert int(result.status[1]) == gse_jax.Status.ALREADY_MISCLASSIFIED
    assert result.adversarials.dtype == dtype and result.tradeoff.dtype == dtype
    assert float(jnp.abs(result.adversarials).max()) <= 1.0
    unchanged = ~np.asarray(result.success) | (
        np.asarray(result.status) == gse_jax.Status.ALREADY_MISCLASSIFIED)
    np.testing.assert_array_equal(result.adversarials[unchanged], x[unchanged])
    assert (np.asarray(result.gradient_evals) >= 0).all()
    assert (np.asarray(result.forward_evals) >= np.asarray(result.gradient_evals)).all()
    assert result.method == method and result.preset == "custom"
    changed = np.asarray((result.adversarials != x).any(-1).sum((1, 2)))
    assert (changed <= getattr(TABLE[row].settings, "num_pixels", changed.max())).all()


@pytest.mark.parametrize("row", ENGINE_ROWS)
@pytest.mark.parametrize("count", [0, pytest.param(1, marks=pytest.mark.slow), 5])
def test_any_number_of_images(row, count):
    method = row.split()[0]
    params, apply_fn, x, y = toy()
    result = gse_jax.attack(params, apply_fn, x[:count], y[:count], method=method,
                            settings=TABLE[row].settings, bounds=(-1.0, 1.0))
    assert result.adversarials.shape == (count, 20, 20, 3)
    assert all(a.shape[0] == count for a in jax.tree.leaves(result))


@pytest.mark.parametrize("method", METHODS)
def test_default_preset_follows_size_and_direction(method):
    def constant(params, x):
        return jnp.zeros((x.shape[0], 3), x.dtype) + params

    def attack(x, y, targets=None):
        return gse_jax.attack(jnp.float32(0.0), constant, x, y, targets=targets, method=method)

    settings, _ = gse_jax.preset(method, "imagenet")
    large = 65 if getattr(settings, "num_pixels", 0) <= 65 * 65 else 96  # room for the budget
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    # Traced, not run: a program per method would cost more than all other tests.
    for side, preset, labels in ((64, "cifar10 untargeted", [label]),
                                 (large, "imagenet targeted", [label] * 2)):
        x = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        assert jax.eval_shape(attack, x, *labels).preset == preset


def run(row, params, apply_fn, x, y, **options):
    """The row's attack; `lanes`, `targets` and others as for `gse_jax.attack`."""
    options = {"settings": TABLE[row].settings, "bounds": (-1.0, 1.0), "key": 3, **options}
    return gse_jax.attack(params, apply_fn, x, y, method=row.split()[0], **options)


def same(a, b):
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_array_equal(a.gradient_evals, b.gradient_evals)
    np.testing.assert_array_equal(a.forward_evals, b.forward_evals)
    np.testing.assert_allclose(a.adversarials, b.adversarials, atol=1e-7)


@functools.cache
def on_four_devices(row):
    """The row's attack on the toy images in two lanes per device."""
    return run(row, *toy(), lanes=6)


@pytest.mark.parametrize("row", ENGINE_ROWS)
def test_lanes_devices_and_neighbours_do_not_matter(row):
    params, apply_fn, x, y = toy()
    expected = run(row, params, apply_fn, x, y, lanes=1)
    same(on_four_devices(row), expected)
    # The keys of random attacks follow the place in the batch, so neighbours change, not places.
    others = run(row, params, apply_fn, jnp.concatenate([x[:3], x[:2]]),
                 jnp.concatenate([y[:3], y[:2]]), lanes=1)
    first = lambda result: jax.tree.map(lambda a: a[:3], result)
    same(first(others), first(expected))


@pytest.mark.parametrize("num_images, shape", [
    pytest.param(1, (9, 9, 1), marks=pytest.mark.slow), (3, (9, 14, 3)),
    pytest.param(8, (12, 11, 3), marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ENGINE_ROWS)
def test_odd_shapes_and_batches_on_a_linear_model(row, num_images, shape):
    """Images next to the boundary: every attack crosses it, inside its bounds."""
    rng = np.random.default_rng(num_images)
    kernel = jnp.asarray(rng.normal(size=(int(np.prod(shape)), 4)))
    params = (kernel, -0.5 * kernel.sum(0))  # the gray image has equal logits
    x = jnp.asarray(rng.uniform(0.4, 0.6, (80, *shape)))
    top = jnp.sort(linear_logits(params, x))
    x = x[jnp.argsort(top[:, -1] - top[:, -2])[:num_images]]
    y = linear_logits(params, x).argmax(-1).astype(jnp.int32)
    result = run(row, params, linear_logits, x, y, bounds=(0.0, 1.0))
    np.testing.assert_array_equal(result.status, Status.FOUND)
    assert float(result.adversarials.min()) >= 0.0 and float(result.adversarials.max()) <= 1.0
    fooled = linear_logits(params, result.adversarials).argmax(-1)
    assert (np.asarray(fooled) != np.asarray(y)).all()


@pytest.mark.parametrize("row", SOME_ROWS)
def test_already_misclassified_costs_one_evaluation(row):
    params, apply_fn, x, y = toy()
    for targets in (None, y) if row == "gse" else (None,):  # each direction is a program of its own
        result = run(row, params, apply_fn, x, (y + 1) % 5, targets=targets, lanes=6)
        np.testing.assert_array_equal(result.status, Status.ALREADY_MISCLASSIFIED)
        np.testing.assert_array_equal(result.success, True)
        np.testing.assert_array_equal(result.adversarials, x)
        np.testing.assert_array_equal(result.forward_evals, 1)
        if row == "gse":
            np.testing.assert_array_equal(result.gradient_evals, 0)


@pytest.mark.parametrize("row", ENGINE_ROWS)
def test_a_poisoned_image_ends_as_non_finite_and_disturbs_no_neighbour(row):
    params, apply_fn, x, y = toy()

    def poisoned(params, images):
        bad = images[:, 0, 0, 0] == x[2, 0, 0, 0]
        return jnp.where(bad[:, None], jnp.nan, apply_fn(params, images))

    result, expected = run(row, params, poisoned, x, y, lanes=6), on_four_devices(row)
    assert int(result.status[2]) == Status.NON_FINITE and not bool(result.success[2])
    np.testing.assert_array_equal(result.adversarials[2], x[2])
    keep = np.asarray([0, 1, 3, 4, 5])
    same(*(jax.tree.map(lambda a: a[keep], r) for r in (result, expected)))


@pytest.mark.parametrize("row", [pytest.param("fwnucl", marks=pytest.mark.slow), "strattack"])
def test_a_gradient_that_is_not_finite_is_noticed_where_the_logits_are(row):
    """Those two do not hand every gradient to their step as it is."""
    params, apply_fn, x, y = toy()

    def steep(params, images):  # the root's slope at 0 is infinite in one pixel, its value is 0
        return apply_fn(params, images) + jnp.sqrt(0.0 * images[:, :1, 0, 0])

    result = run(row, params, steep, x, y, lanes=6)
    np.testing.assert_array_equal(result.status, Status.NON_FINITE)
    np.testing.assert_array_equal(result.adversarials, x)


@pytest.mark.parametrize("row", ENGINE_ROWS)
def test_nan_away_from_the_clean_image_is_no_success(row):
    params, apply_fn, x, y = toy()

    def breaks_when_touched(params, images):
        touched = jnp.abs(images[:, None] - x[None]).max((2, 3, 4)).min(1) > 0
        return jnp.where(touched[:, None], jnp.nan, apply_fn(params, images))

    result = run(row, params, breaks_when_touched, x, y, lanes=1)
    np.testing.assert_array_equal(result.status, Status.NON_FINITE)
    np.testing.assert_array_equal(result.success, False)
    np.testing.assert_array_equal(result.adversarials, x)


@pytest.mark.parametrize("row", ENGINE_ROWS)
def test_hyperparameters_and_values_never_compile_anew(row):
    params, apply_fn, x, y = toy()
    traces = []

    def counted(params, images):
        traces.append(images.shape)
        return apply_fn(params, images)

    settings = TABLE[row].settings
    _, hyperparams = gse_jax.preset(row.split()[0], "cifar10", False)
    for scale in (1.0, 1.1):
        swept = jax.tree.map(lambda h: scale * h, hyperparams)
        run(row, params, counted, scale * 0.5 * x, y, lanes=4, settings=settings,
            hyperparams=swept)
        if scale == 1.0:
            first = len(traces)
    assert len(traces) == first >= 2  # the shape check, and the program


def backdoor(num_images=3, size=16):
    """A model whose class 1 needs the four pixels of one group to turn bright, no others."""
    group = np.zeros((size, size, 3), np.float64)
    group[6:8, 10:12] = 1.0
    rng = np.random.default_rng(0)
    kernel = np.stack([np.zeros(group.size), group.reshape(-1)], 1)
    params = (jnp.asarray(kernel), jnp.asarray([0.0, -4.0]))
    x = jnp.asarray(rng.uniform(-0.5, -0.2, (num_images, size, size, 3)))
    return params, x, jnp.zeros(num_images, jnp.int32), group[..., 0] > 0


@pytest.mark.parametrize("row", [
    pytest.param(row, marks=[] if row == "gse" else [pytest.mark.slow])
    for row in TABLE if TABLE[row].planted is not None])
def test_a_planted_backdoor_is_found(row):
    params, x, y, group = backdoor()
    # The clean group is 12 values of about -0.35 and must come above 4: two white pixels give 3.9.
    _, hyperparams = gse_jax.preset(row.split()[0], "cifar10", False)
    if TABLE[row].planted_hyperparams:
        hyperparams = hyperparams._replace(**TABLE[row].planted_hyperparams)
    result = run(row, params, linear_logits, x, y, settings=TABLE[row].planted,
                 hyperparams=hyperparams)
    np.testing.assert_array_equal(result.status, Status.FOUND)
    changed = np.asarray((result.adversarials != x).any(-1))
    assert (changed[:, group].sum(1) >= 2).all()
    assert (changed.sum((1, 2)) <= getattr(TABLE[row].planted, "num_pixels", 256)).all()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gse"])
def test_wrong_configurations_are_refused_in_one_line(method):
    of_gse = method == "gse_refined"
    for domain in ("cifar10", "imagenet", "imagenet_robust" if of_gse else "original"):
        for targeted in (False, True):
            settings, hyperparams = gse_jax.preset(method, domain, targeted)
            METHODS[method].check(settings, hyperparams, (224, 224, 3))
    with pytest.raises(ValueError, match="mnist"):
        gse_jax.preset(method, "mnist")
    for wrong in ((gse_jax.GSESettings(), hyperparams), (settings, gse_jax.GSEHyperparams())):
        with pytest.raises(TypeError, match=f"preset.'{method}'"):
            METHODS[method].check(*wrong, (32, 32, 3))
    if hyperparams:
        negative = hyperparams._replace(**{hyperparams._fields[0]: -1.0})
        with pytest.raises(ValueError, match=hyperparams._fields[0]):
            METHODS[method].check(settings, negative, (224, 224, 3))


# Settings and hyperparameters of every preset, in the order of their fields.
BOTH, SQUARE = ("untargeted", "targeted"), ((1,) * 3,) * 3
PRESETS = [
    ("pgd", "original", BOTH, ("linf", 20, 1, True), (8 / 255, 2 / 255)),
    ("pgd", "cifar10 imagenet", BOTH, ("linf", 200, 1, True), (0.025, 0.0025)),
    ("sigma_zero", "original", BOTH, (100,), (1.0, 1e-3, 0.3, 0.01)),
    ("sigma_zero", "cifar10 imagenet", BOTH, (1000,), (1.0, 1e-3, 0.3, 0.01)),
    ("pgd0", "original", BOTH, (5, 100, 5, False), (120000 / 255, 0.8)),
    ("pgd0", "cifar10", BOTH, (90, 200, 5, False), (60000 / 255, 0.8)),
    ("pgd0", "imagenet", BOTH, (6600, 200, 5, False), (60000 / 255, 0.8)),
    ("sparse_rs", "original", BOTH[:1], (150, "l0", 10_000, 1), (0.3,)),
    ("sparse_rs", "original", BOTH[1:], (150, "l0", 100_000, 1), (0.1,)),
    ("sparse_rs", "cifar10", BOTH, (90, "l0", 10_000, 10), (0.8,)),
    ("sparse_rs", "imagenet", BOTH, (6600, "l0", 10_000, 10), (0.8,)),
    ("sparse_pgd", "original", BOTH, (10, 30, True, 3, "pixel", SQUARE, 1), (1.0, 0.25, 0.25)),
    ("sparse_pgd", "cifar10", BOTH, (20, 300, True, 3, "pixel", SQUARE, 1), (1.0, 0.25, 0.25)),
    ("sparse_pgd", "imagenet", BOTH, (200, 300, True, 3, "pixel", SQUARE, 1), (1.0, 0.25, 0.25)),
    ("saif", "original cifar10", BOTH[:1], (25, 200, 1), (0.5,)),
    ("saif", "original cifar10", BOTH[1:], (50, 200, 1), (0.5,)),
    ("saif", "imagenet", BOTH[:1], (50, 200, 1), (0.5,)),
    ("saif", "imagenet", BOTH[1:], (500, 200, 1), (0.5,)),
    ("fwnucl", "original cifar10", BOTH, (200, 4, 4, False), (5.0,)),
    ("fwnucl", "imagenet", BOTH, (200, 4, 32, False), (5.0,)),
    ("strattack", "original", BOTH, (8, 1000, 1000, 8, 400, 2, False, 0, 1, 1), (1.0, 0.5, 1.5, 3.75, 1.25, 1.0)),
    ("strattack", "cifar10", BOTH, (8, 200, 0, 8, 200, 2, True, 0, 1, 1), (0.25, 1.0, 2.0, 1.0, 5.0, 1.0)),
    ("strattack", "imagenet", BOTH, (8, 200, 0, 8, 200, 8, True, 0, 1, 1), (2.5, 1.0, 2.0, 1.0, 5.0, 1.0)),
    ("gsmd", "original imagenet", BOTH[:1], (200, 15, "cells"), (20.0, 0.1, 1.0)),
    ("gsmd", "original imagenet", BOTH[1:], (200, 15, "cells"), (2.0, 0.1, 1.0)),
    ("gsmd", "cifar10", BOTH, (200, 8, "cells"), (5.0, 0.1, 1.0)),
    ("homotopy", "original", BOTH, ("entries", 100, 100, 600, 200, 10, 200, 500, 6, "cross_entropy", 1.0),
     (0.05, 0.98, 3.0, 1e-2, 1e-4, 0.8)),
    ("homotopy", "cifar10", BOTH, ("superpixels", 100, 100, 200, 1, 1, 50, 100, 6, "margin", 2.0),
     (0.1, 0.9, 0.1, 1e-3, 1e-5, 0.96)),
    ("homotopy", "imagenet", BOTH, ("superpixels", 500, 100, 600, 1, 1, 50, 500, 13, "margin", 2.0),
     (0.1, 0.98, 0.01, 0.1, 1e-3, 0.8)),
    ("sapf", "original", BOTH, (66, 6, 1, 2000, 2000, 150, 1.0), (1e-3, 1e-3, 0.1)),
    ("sapf", "cifar10", BOTH, (88, 10, 10, 200, 200, 150, 2.0), (1e-3, 10.0, 0.1)),
    ("sapf", "imagenet", BOTH, (6333, 10, 10, 200, 200, 350, 2.0), (0.01, 10.0, 0.1)),
]


def test_presets_of_the_compared_methods():
    seen = []
    for method, domains, directions, settings, hyperparams in PRESETS:
        for domain in domains.split():
            for direction in directions:
                seen.append((method, domain, direction))
                found = gse_jax.preset(method, domain, direction == "targeted")
                assert (dataclasses.astuple(found[0]), tuple(found[1])) == (settings, hyperparams), seen[-1]
    assert len(set(seen)) == len(seen) == 6 * (len(METHODS) - 2)  # all but "gse" and "gse_refined"


@pytest.mark.parametrize("method, change, words", [
    ("saif", {"halvings": 25}, "settings.halvings=25 must be at most 24"),
    ("sparse_pgd", {"pattern": ((2, 0), (0, -1))}, "rows of 0 and 1"),
    ("sparse_pgd", {"pattern": ((1, 1), (1,))}, "of one length"),
    ("sparse_pgd", {"pattern": ((0, 0),)}, "with a 1"), ("sparse_pgd", {"pattern": (1, 1)}, "rows of 0 and 1"),
    ("gse_refined", {"scales": (1.0, 0.0)}, "must hold positive numbers"),
    ("gse_refined", {"scales": ()}, "must hold positive numbers"),
    ("gse_refined", {"patience": 1.5}, "patience=1.5 must be > 0 and <= 1"),
    ("gse_refined", {"overshoot": 0.0}, "overshoot=0 must")])
def test_impossible_settings_are_refused_in_one_line(method, change, words):
    settings, hyperparams = gse_jax.preset(method, "cifar10")
    if set(change) <= set(hyperparams._fields):
        hyperparams = hyperparams._replace(**change)
    else:
        settings = dataclasses.replace(settings, **change)
    with pytest.raises(ValueError, match=words) as error:
        METHODS[method].check(settings, hyperparams, (32, 32, 3))
    assert "\n" not in str(error.value)


def root_of_a_pixel(params, x):
    """Class 1 where the first pixel is black, where the derivative of the root is infinite."""
    return jnp.stack([params * jnp.sqrt(x[:, 0, 0, 0]), 0.05 + 0.0 * x[:, 0, 0, 0]], 1)


@pytest.mark.parametrize("method", ["gse", "pgd"])
def test_an_adversarial_image_without_a_gradient_is_a_success(method):
    x = np.full((1, 8, 8, 1), 0.25)
    x[0, 0, 0, 0] = 0.02
    result = gse_jax.attack(10.0, root_of_a_pixel, x, np.zeros(1, int), method=method)
    given = x.copy()
    given[0, 0, 0, 0] = 0.0
    wrong = gse_jax.attack(10.0, root_of_a_pixel, given, np.zeros(1, int), method=method)
    assert result.status[0] == Status.FOUND and wrong.status[0] == Status.ALREADY_MISCLASSIFIED
    assert root_of_a_pixel(10.0, result.adversarials)[0].argmax() == 1


def test_refine_keeps_a_given_image_without_a_gradient():
    x = np.full((1, 8, 8, 1), 0.25)
    given = x.copy()
    given[0, 0, 0, 0] = 0.0
    result = gse_jax.refine(10.0, root_of_a_pixel, x, given, np.zeros(1, int))
    assert result.status[0] == Status.FOUND
    np.testing.assert_array_equal(result.adversarials, given)
    wrong = gse_jax.refine(10.0, root_of_a_pixel, given, given, np.zeros(1, int))
    assert wrong.status[0] == Status.ALREADY_MISCLASSIFIED


def test_several_keys_are_refused():
    x, y = np.full((1, 8, 8, 1), 0.25), np.zeros(1, int)
    with pytest.raises(ValueError, match=r"key must be one key.*shape \[4\]"):
        gse_jax.attack(10.0, root_of_a_pixel, x, y, method="sparse_rs", settings=SparseRSSettings(num_pixels=4),
                       key=jax.random.split(jax.random.key(0), 4))
