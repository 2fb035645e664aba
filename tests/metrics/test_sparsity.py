"""Metrics of the perturbation against per-pixel Python loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import metrics

# 5 shapes x 40 images = 200 cases; odd sizes, a single row, a single column, 1 and 3 channels.
SHAPES = [(7, 9, 3), (5, 13, 1), (1, 9, 3), (9, 1, 1), (11, 5, 3)]


def make_case(shape, count=40, seed=0, dtype=np.float32):
    """Images and sparse perturbations; densities from nothing to everything."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.uniform(0, 1, (count, *shape)).astype(dtype)
    density = np.linspace(0, 1, count).reshape(-1, 1, 1, 1) ** 2
    changed = rng.random(x.shape) < density
    return x, np.where(changed, rng.uniform(0, 1, x.shape).astype(dtype), x)


def loop_mask(x, adversarial):
    """The changed pixels of one image, by a loop."""
    height, width, channels = x.shape
    mask = [[False] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            for k in range(channels):
                if x[i, j, k] != adversarial[i, j, k]:
                    mask[i][j] = True
    return mask


def loop_norms(x, adversarial):
    total, largest = 0.0, 0.0
    for a, b in zip(x.reshape(-1).tolist(), adversarial.reshape(-1).tolist(), strict=True):
        total += (b - a) ** 2
        largest = max(largest, abs(b - a))
    return math.sqrt(total), largest


def loop_patches(mask, size):
    count = 0
    for i in range(len(mask) - size + 1):
        for j in range(len(mask[0]) - size + 1):
            count += any(mask[i + a][j + b] for a in range(size) for b in range(size))
    return count


def loop_cells(mask, size, offset):
    """Cells are named by floor division, so no padding argument is shared with the library."""
    cells = set()
    for i, row in enumerate(mask):
        for j, hit in enumerate(row):
            if hit:
                cells.add(((i - offset[0]) // size, (j - offset[1]) // size))
    return len(cells)


def loop_groups(mask, labels):
    groups = set()
    for i, row in enumerate(mask):
        for j, hit in enumerate(row):
            if hit and labels[i][j] >= 0:
                groups.add(int(labels[i][j]))
    return len(groups)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_metric_equals_a_loop(shape):
    x, adversarials = make_case(shape)
    size = min(3, *shape[:2])
    labels = np.random.default_rng(1).integers(-1, 6, (len(x), *shape[:2]), dtype=np.int32)
    masks = [loop_mask(a, b) for a, b in zip(x, adversarials, strict=True)]
    norms = np.array([loop_norms(a, b) for a, b in zip(x, adversarials, strict=True)])
    np.testing.assert_array_equal(metrics.changed_mask(x, adversarials), masks)
    np.testing.assert_array_equal(
        metrics.changed_pixels(x, adversarials), [sum(map(sum, mask)) for mask in masks]
    )
    np.testing.assert_allclose(metrics.l2_norm(x, adversarials), norms[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.linf_norm(x, adversarials), norms[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(
        metrics.patch_count(x, adversarials, patch_size=size),
        [loop_patches(mask, size) for mask in masks],
    )
    for offset in ((0, 0), (1, 2), (2, 0), (-1, 7)):
        np.testing.assert_array_equal(
            metrics.grid_group_count(x, adversarials, patch_size=3, offset=offset),
            [loop_cells(mask, 3, offset) for mask in masks],
        )
    np.testing.assert_array_equal(
        metrics.active_superpixels(x, adversarials, labels, num_groups=6),
        [loop_groups(mask, one) for mask, one in zip(masks, labels, strict=True)],
    )


def test_float64_is_kept_and_exact():
    with jax.enable_x64(True):
        x, adversarials = make_case((7, 9, 3), dtype=np.float64)
        got = metrics.l2_norm(x, adversarials)
        assert got.dtype == jnp.float64
        want = [loop_norms(a, b)[0] for a, b in zip(x, adversarials, strict=True)]
        np.testing.assert_allclose(got, want, rtol=1e-13)
        assert metrics.changed_pixels(x, adversarials).dtype == jnp.int32


def test_jit_and_vmap_give_the_same():
    x, adversarials = make_case((7, 9, 3))
    for metric in (
        metrics.changed_pixels, metrics.l2_norm, metrics.linf_norm, metrics.patch_count,
        metrics.grid_group_count,
    ):
        keywords = {"patch_size": 4} if metric.__name__.endswith("count") else {}
        plain = metric(x, adversarials, **keywords)
        jitted = jax.jit(lambda a, b, metric=metric, kw=keywords: metric(a, b, **kw))
        pairs = x.reshape(20, 2, 7, 9, 3), adversarials.reshape(20, 2, 7, 9, 3)
        np.testing.assert_allclose(jitted(x, adversarials), plain, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(jitted)(*pairs).reshape(-1), plain, rtol=1e-6)


def test_bounds_choose_the_units():
    x = np.full((1, 2, 2, 1), 0.5, np.float32)
    adversarials = x.copy()
    adversarials[0, 0, 0, 0] = 1.0  # w = 0.5 in [0, 1] is 1.0 in [-1, 1].
    assert metrics.l2_norm(x, adversarials)[0] == 0.5
    assert metrics.l2_norm(x, adversarials, bounds=(0, 1))[0] == 1.0
    assert metrics.l2_norm(x, adversarials, bounds=(-1, 1))[0] == 0.5
    assert metrics.linf_norm(x, adversarials, bounds=(0, 1))[0] == 1.0
    assert metrics.linf_norm(x * 255, adversarials * 255, bounds=(0, 255))[0] == 1.0
    with pytest.raises(ValueError, match="lo < hi"):
        metrics.l2_norm(x, adversarials, bounds=(1, 0))
    with pytest.raises(ValueError, match="lo < hi"):
        metrics.l2_norm(x, adversarials, bounds=(1, 1))


def test_uint8_images_do_not_wrap_around():
    x, adversarials = np.full((1, 3, 3, 3), 250, np.uint8), np.full((1, 3, 3, 3), 5, np.uint8)
    assert metrics.linf_norm(x, adversarials)[0] == 245
    assert metrics.changed_pixels(x, adversarials)[0] == 9


def test_value_of_grid_count_depends_on_the_position_of_the_grid_and_d20_does_not():
    x = np.zeros((1, 32, 32, 3), np.float32)
    counts = set()
    patches = set()
    for row, column in ((8, 8), (9, 8), (8, 12), (11, 13)):
        adversarials = x.copy()
        adversarials[0, row : row + 8, column : column + 8] = 1
        counts.add(int(metrics.grid_group_count(x, adversarials)[0]))
        patches.add(int(metrics.patch_count(x, adversarials)[0]))
    assert counts == {1, 2, 4}
    assert patches == {225}  # (8 + 8 - 1) ** 2, wherever the patch lies inside the image.
    fixed = x.copy()
    fixed[0, 8:16, 8:16] = 1
    assert metrics.grid_group_count(x, fixed)[0] == 1
    assert metrics.grid_group_count(x, fixed, offset=(3, 5))[0] == 4


def test_patch_count_at_its_ends():
    x = np.zeros((1, 32, 32, 3), np.float32)
    assert metrics.patch_count(x, x)[0] == 0
    assert metrics.patch_count(x, x + 1)[0] == 625
    assert metrics.patch_count(x, x + 1, patch_size=1)[0] == metrics.changed_pixels(x, x + 1)[0]
    assert metrics.patch_count(x, x + 1, patch_size=32)[0] == 1
    for size in (0, 33):
        with pytest.raises(ValueError, match="patch_size"):
            metrics.patch_count(x, x, patch_size=size)
    with pytest.raises(ValueError, match="patch_size"):
        metrics.grid_group_count(x, x, patch_size=0)


def test_unchanged_nan_and_no_images():
    x = np.full((2, 9, 9, 3), np.nan, np.float32)
    assert metrics.changed_pixels(x, x).tolist() == [0, 0]
    assert metrics.l2_norm(x, x).tolist() == [0, 0]
    finite = np.zeros_like(x)
    finite[:, 2, 2, 1] = np.nan  # in one of both images only: a change
    assert metrics.changed_pixels(np.zeros_like(x), finite).tolist() == [1, 1]
    assert metrics.changed_pixels(finite, np.zeros_like(x)).tolist() == [1, 1]
    infinite = np.full((1, 9, 9, 3), np.inf, np.float32)
    assert metrics.l2_norm(infinite, infinite).tolist() == [0]
    broken = np.zeros((2, 32, 32, 3), np.float32)
    broken[0, 3, 3, 0] = np.nan
    for norm in (metrics.l2_norm, metrics.linf_norm):
        np.testing.assert_array_equal(norm(np.zeros_like(broken), broken), [np.nan, 0.0])
    none = np.zeros((0, 9, 9, 3), np.float32)
    for metric in (
        metrics.changed_pixels, metrics.l2_norm, metrics.linf_norm, metrics.patch_count,
        metrics.grid_group_count,
    ):
        assert metric(none, none).shape == (0,)
        assert metric(x * 0 + 1, x * 0 + 1).tolist() == [0, 0]
    assert metrics.active_superpixels(none, none, np.zeros((9, 9), np.int32)).shape == (0,)


def test_a_perturbation_leads_from_the_clean_image_to_the_adversarial_one():
    x, adversarials = make_case((7, 9, 3), count=4)
    np.testing.assert_array_equal(metrics.perturbation(x, adversarials), adversarials - x)


def test_gradient_of_the_norm_is_zero_at_zero():
    x = jnp.full((1, 3, 3, 1), 0.25, jnp.float32)
    gradient = jax.grad(lambda a: jnp.sum(metrics.l2_norm(x, a)))(x)
    np.testing.assert_array_equal(gradient, np.zeros(x.shape))
    moved = jax.grad(lambda a: jnp.sum(metrics.l2_norm(x, a)))(x.at[0, 1, 1, 0].add(0.5))
    assert moved[0, 1, 1, 0] == 1
    # A change whose square is 0 in float32: the derivative of sqrt would be infinite.
    tiny = jax.grad(lambda a: jnp.sum(metrics.l2_norm(x * 0, a)))(x * 0 + 1e-30)
    assert jnp.isfinite(tiny).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int8, np.int32])
def test_label_maps_of_any_integer_dtype(dtype):
    x, labels = np.zeros((1, 16, 16, 3), np.float32), np.arange(256).reshape(16, 16) // 2
    adversarials = x.copy()
    adversarials[0, 5, 5, 0] = 1.0
    for num_groups in (None, 128, 256, 300):
        assert metrics.active_superpixels(x, adversarials, labels.astype(dtype), num_groups=num_groups).tolist() == [1]


def test_label_maps_are_checked():
    x, adversarials = make_case((6, 6, 3), count=4)
    labels = np.arange(36, dtype=np.int32).reshape(6, 6) // 6
    assert metrics.active_superpixels(x, x + 1, labels).tolist() == [6] * 4
    with pytest.raises(ValueError, match="label 5"):
        metrics.active_superpixels(x, adversarials, labels, num_groups=5)
    with pytest.raises(ValueError, match="does not fit"):
        metrics.active_superpixels(x, adversarials, labels[:5])
    with pytest.raises(TypeError, match="integer"):
        metrics.active_superpixels(x, adversarials, labels.astype(np.float32))
    with pytest.raises(ValueError, match="num_groups"):
        jax.jit(metrics.active_superpixels)(x, adversarials, labels)


def test_images_that_do_not_belong_together_are_refused():
    x, adversarials = make_case((6, 6, 3), count=4)
    with pytest.raises(ValueError, match="one shape"):
        metrics.changed_pixels(x, adversarials[:2])
    with pytest.raises(ValueError, match="one shape"):
        metrics.changed_pixels(x[0], adversarials[0])
    with pytest.raises(TypeError, match="one scale"):
        metrics.changed_pixels((x * 255).astype(np.uint8), adversarials)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_digits_lost_in_storing_one_of_both_are_no_change(dtype):
    x = np.random.default_rng(0).uniform(size=(1, 8, 8, 3))
    adversarials = x.copy()
    adversarials[0, :2, 3] = 0.0
    stored = jnp.asarray(adversarials, dtype)
    assert metrics.changed_pixels(x, stored) == metrics.changed_pixels(jnp.asarray(x, dtype), adversarials) == 2
    assert metrics.patch_count(x, stored, patch_size=2) == metrics.patch_count(x, adversarials, patch_size=2)
