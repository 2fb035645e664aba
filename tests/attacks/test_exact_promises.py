"""What the attacks promise of single images: caps kept, gradients followed, no success that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status
from gse_jax.attacks import METHODS
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.baselines.record import is_success, note, start_record
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroSettings
from gse_jax.attacks.baselines.sparse_projected_gradient_descent import SparsePGDSettings, climbing_loss
from gse_jax.attacks.baselines.structured_attack import StrAttackSettings
from gse_jax.attacks.gse import GSE
from gse_jax.attacks.gse.search import is_boosted
from gse_jax.attacks.refinement.descent import last_digit, step_to_boundary
from gse_jax.attacks.segmentation import slic_segments
from gse_jax.metrics import changed_mask
from tests.toy_model import linear_logits, states_over


def two_classes(seed, count):
    """Images of 8 bits and, for each, a linear model of two classes that a change of all values by 1 leads `reach` down."""
    rng = np.random.default_rng(seed)
    kernel = 0.1 * rng.normal(size=16 * 16 * 3).astype("f4")
    images = np.round(rng.uniform(0.3, 0.7, (count, 16, 16, 3)) * 255).astype("f4") / np.float32(255)
    kernels = np.stack([kernel, np.zeros_like(kernel)], 1)
    return kernels, images, float(np.abs(kernel).sum())


def leading_by(margin, kernels, image):
    """Parameters of `linear_logits` with class 0 ahead by this much at the image."""
    return kernels, np.float32([margin - image.reshape(-1) @ kernels[:, 0], 0.0])


def test_steps_reach_the_boundary_with_most_of_the_image_on_its_cap():
    """Values on a cap are a rounding beside it, once the image is made of them, and must not take part again."""
    kernels, images, reach = two_classes(0, 4)
    unit, cap = np.float32(0.5), np.float32(2 * 8 / 255)
    for x in images:
        gradient, image = kernels[:, 0].reshape(x.shape) * unit, x
        needed = 0.9 * cap * unit * reach  # most of what the cap allows

        def margin(image):
            return needed + ((image - x) / unit * gradient).sum()

        for _ in range(8):  # as many as the refinement takes
            w = step_to_boundary((image - x) / unit, gradient, margin(image), np.ones((16, 16), bool), -cap, cap, np.inf,
                                 np.float32(0.001), last_digit(x, 0.0, 1.0))
            image = np.asarray(x + unit * w)
        assert margin(image) < 0.0 and np.abs(image - x).max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("radius, status", [(0.1, Status.FOUND), (0.01, Status.NOT_FOUND)])
def test_strattack_keeps_its_radius(radius, status):
    """In units of images of range width 2, so that values move by half of it here."""
    kernels, images, reach = two_classes(1, 2)
    settings = StrAttackSettings(num_searches=4, max_steps=60, num_retrainings=2)
    hyperparams = gse_jax.preset("strattack", "cifar10")[1]._replace(radius=radius, c=10.0)
    for image in images:
        result = gse_jax.attack(leading_by(0.02 * reach, kernels, image), linear_logits, image[None], np.int32([0]),
                                method="strattack", settings=settings, hyperparams=hyperparams)
        assert int(result.status[0]) == status
        assert np.abs(np.asarray(result.adversarials[0]) - image).max() <= radius / 2 + 1e-6


def test_superpixels_of_grey_images_follow_the_image():
    row, column = np.mgrid[:32, :32]
    disc = ((row - 15) ** 2 + (column - 16) ** 2 < 64).astype("f4")[None, ..., None]
    grey, colour = slic_segments(disc, 60), slic_segments(np.repeat(disc, 3, -1), 60)
    np.testing.assert_array_equal(grey, colour)
    inside = disc[0, ..., 0] > 0.5
    assert not set(grey[0][inside]) & set(grey[0][~inside])


def test_targeted_sparse_pgd_climbs_over_whichever_class_leads():
    sample = Sample(jnp.zeros((8, 8, 1)), jnp.int32(0), jnp.int32(1), jnp.int32(0))
    gradient = jax.grad(lambda z: climbing_loss(z, sample, True))
    assert gradient(jnp.asarray([2.0, 1.9, 0.0])).tolist() == [-1, 1, 0]  # the label leads, hardly
    assert gradient(jnp.asarray([1.0, 0.5, 3.0])).tolist() == [0, 1, -1]  # the label is beaten, by the third


@pytest.mark.parametrize("structure, size", [("row", (1, 13)), ("column", (12, 1)), ("patch", (2, 3))])
def test_structured_sparse_pgd_changes_no_more_blocks_than_its_budget_holds(structure, size):
    """Three blocks, of a budget that lacks one pixel for a fourth; the patches are tiles, so that they can be counted."""
    area = size[0] * size[1]
    settings = SparsePGDSettings(4 * area - 1, max_steps=12, structure=structure, stride=1, patience=2)
    if structure == "patch":
        settings = dataclasses.replace(settings, pattern=((1,) * 3,) * 2, stride=3)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 12, 13, 3)))
    hyperparams = jax.tree.map(jnp.asarray, gse_jax.preset("sparse_pgd", "cifar10")[1])
    attack = METHODS["sparse_pgd"].bind(settings, hyperparams, targeted=False, bounds=(0.0, 1.0), key=jax.random.key(0))
    samples = Sample(x, jnp.zeros(2, jnp.int32), jnp.full(2, -1, jnp.int32), jnp.arange(2, dtype=jnp.int32))
    model = lambda x: jnp.stack([9.0 + jnp.sin(20.0 * x).mean((1, 2, 3)), x.mean((1, 2, 3))], 1)
    step = settings.stride if structure == "patch" else 1
    masks = set()
    for state in states_over(attack, model, samples, 12):
        changed = np.asarray((jax.vmap(attack.query)(state) != x).any(-1))
        for image in changed:
            corners = [(r, c) for r in range(0, 13 - size[0], step) for c in range(0, 14 - size[1], step)
                       if image[r:r + size[0], c:c + size[1]].any()]
            assert len(corners) == 3
            assert sum(image[r:r + size[0], c:c + size[1]].sum() for r, c in corners) == image.sum() <= 3 * area
        masks.add(changed.tobytes())
    assert len(masks) > 2  # the blocks move


def test_a_prediction_that_turns_at_the_clean_image_is_no_success():
    x = jnp.full((8, 8, 3), 0.5, jnp.float32)
    sample = Sample(x, jnp.int32(0), jnp.int32(-1), jnp.int32(0))
    said = lambda logits: Evaluation(jnp.asarray(logits, jnp.float32), jnp.float32(0.1), jnp.ones_like(x))
    right, wrong = said([1.0, 0.9]), said([0.9, 1.0])
    record = note(start_record(sample), sample, right, x, jnp.float32(0), jnp.zeros((), bool), targeted=False)
    assert not is_success(record, sample, wrong, x, False) and is_success(record, sample, wrong, 0.9 * x, False)
    again = note(record, sample, wrong, x, jnp.float32(0), jnp.ones((), bool), targeted=False)
    assert int(again.status) == Status.NOT_FOUND
    moved = note(record, sample, wrong, 0.9 * x, jnp.float32(0), jnp.ones((), bool), targeted=False)
    assert int(moved.status) == Status.FOUND
    # Nor does a model that breaks later take a success away.
    going = note(record, sample, wrong, 0.9 * x, jnp.float32(0), jnp.zeros((), bool), targeted=False)
    for before, status in ((going, Status.FOUND), (record, Status.NON_FINITE)):
        broken = note(before, sample, said([jnp.nan, 1.0]), 0.8 * x, jnp.float32(0), jnp.zeros((), bool),
                      targeted=False)
        assert int(broken.status) == status
    # The same in GSE, whose iterate can be zero again.
    algorithm = GSE.bind(*gse_jax.preset("gse", "cifar10"), targeted=False, bounds=(0.0, 1.0))
    step = jax.jit(algorithm.step)
    state = step(algorithm.init(sample), right)
    state = state._replace(iterate=state.iterate._replace(w=jnp.zeros_like(x)))
    assert not step(state, wrong).search.found
    assert not np.asarray(changed_mask(x[None], algorithm.query(state)[None])).any()


def test_boosted_runs_are_told_by_where_they_begin():
    settings = gse_jax.GSESettings(num_runs=10, num_boosted_runs=3)
    first = jnp.full(5, 0.3)
    # The first two are boosted runs; the third lies between two of them, after the second succeeded.
    tradeoff = first * jnp.asarray([1e-7, 1e-8, 5.5e-8, 0.5, 1e-12])
    assert is_boosted(tradeoff, first, settings).tolist() == [True, True, False, False, True]
    never = gse_jax.GSESettings(num_runs=10, num_boosted_runs=0)
    assert not is_boosted(tradeoff, first, never).any()


@pytest.mark.parametrize("method", ["gse", "strattack", "sigma_zero"])
def test_an_image_that_lies_on_the_boundary_is_moved_off_it(method):
    """Two classes tie there: no loss, but a slope. (The label is predicted, because it comes first.)"""
    settings = {"gse": gse_jax.GSESettings(num_runs=2, max_steps=10, phase1_steps=5),
                "strattack": StrAttackSettings(num_searches=4, max_steps=60, num_retrainings=1),
                "sigma_zero": SigmaZeroSettings(max_steps=20)}
    kernel = np.random.default_rng(0).normal(size=(192, 2)).astype("f4")
    model = lambda kernel, x: (x.reshape(len(x), -1) - 0.5) @ kernel
    result = gse_jax.attack(kernel, model, np.full((1, 8, 8, 3), 0.5, "f4"), np.int32([0]), method=method,
                            settings=settings[method])
    assert int(result.status[0]) == Status.FOUND
