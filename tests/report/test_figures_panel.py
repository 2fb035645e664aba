"""The panel: what the tiles show, and that every word is inside the figure and inside its tile."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from gse_jax import report
from gse_jax.types import Status

NAMES = {0: "cat", 1: "automobile", 2: "soft-coated wheaten terrier with $5"}


def make_panel(count=3, channels=3, status=None, **keywords):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (count, 12, 10, channels)).astype(np.float32)
    adversarials = x.copy()
    adversarials[0, 2:5, 3:6] = np.where(x[0, 2:5, 3:6] > 0, -1, 1)
    labels = np.arange(count) % 3
    before = report.Prediction(labels, np.linspace(0.5, 1, count))
    after = report.Prediction((labels + 1) % 3, np.linspace(0, 0.9, count))
    maps = {"CAM": rng.random((count, 3, 3)), "ASM": rng.normal(size=(count, 12, 10))}
    keywords = {"bounds": (-1, 1), "class_names": NAMES, "heat_maps": maps} | keywords
    return report.attack_panel(x, adversarials, before, after, status=status, **keywords)


def tiles(figure):
    """Pixels by (row, column), read from the axes' places."""
    axes = sorted(figure.axes, key=lambda one: (-round(one.get_position().y0, 4),
                                                one.get_position().x0))
    return [np.asarray(one.images[0].get_array()) for one in axes]


def words(figure):
    return [text.get_text() for text in figure.texts]


def test_tiles_show_image_change_mask_overlay_and_maps():
    figure = make_panel()
    rows = tiles(figure)
    assert len(rows) == 3 * 7
    original, adversarial, change, mask, overlay, cam, signed = rows[:7]
    expected = np.zeros((12, 10), bool)
    expected[2:5, 3:6] = True
    np.testing.assert_array_equal((original != adversarial).any(-1), expected)
    np.testing.assert_array_equal(mask[..., 0] == 255, expected)
    np.testing.assert_array_equal((change != 128).any(-1), expected)
    red = (overlay[..., 0] > 200) & (overlay[..., 1] < 20) & (overlay[..., 2] < 20)
    np.testing.assert_array_equal(red, expected)
    assert (overlay[~expected].std(axis=-1) == 0).all()  # Grey elsewhere.
    assert overlay[~expected].min() > 110  # And brighter than the red (Rec. 709: about 55).
    assert cam.shape == (3, 3, 3) and signed.shape == (12, 10, 3)
    assert {"original", "adversarial", "change", "mask", "overlay", "CAM", "ASM"} <= set(
        words(figure)
    )
    assert {"cat", "50%", "9 px", "\u00d71"} <= set(words(figure))


def test_failed_images_say_so_and_show_no_change():
    status = [Status.NOT_FOUND, Status.ALREADY_MISCLASSIFIED, Status.NON_FINITE]
    x = np.full((3, 8, 8, 3), 0.5, np.float32)
    x[2, 0, 0] = np.nan
    prediction = report.Prediction(np.zeros(3, int), np.ones(3))
    figure = report.attack_panel(x, x, prediction, prediction, status=status)
    for text in ("not", "found", "already", "wrong", "non-finite"):
        assert text in words(figure)
    assert words(figure).count("0 px") == 3 and not any("\u00d7" in w for w in words(figure))
    for row in range(3):
        _, _, change, mask, _ = tiles(figure)[5 * row : 5 * row + 5]
        assert (change == 128).all() and (mask == 0).all()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("width", [3.3, 6.9])
def test_width_is_kept_and_no_word_is_cut_or_covered(count, width):
    figure = make_panel(count, width=width)
    assert figure.get_size_inches()[0] == width
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    for box in boxes:
        assert box.x0 >= -0.5 and box.x1 <= page.width + 0.5
        assert box.y0 >= 0 and box.y1 <= page.height
    for i, one in enumerate(boxes):
        for other in [*boxes[:i], *(axes.get_window_extent() for axes in figure.axes)]:
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            upwards = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert across < 2 or upwards < 2, (one, other)
    assert min(text.get_fontsize() for text in figure.texts) >= 5.5


def test_names_that_are_too_long_end_in_an_ellipsis():
    figure = make_panel(3)
    assert "automobile" in words(figure)
    assert any(w.startswith("soft") and w.endswith("\u2026") for w in words(figure))
    wide = make_panel(3, width=14)
    assert NAMES[2] in words(wide)


def test_names_with_dollars_are_no_mathematics():
    names = {0: "cat", 1: "CAD_$20 or CAD_$50", 2: "a $x$ b"}
    assert {"CAD_$20 or CAD_$50", "a $x$ b"} <= set(words(make_panel(3, width=14, class_names=names)))


def test_grey_images_numbers_for_names_and_no_confidences():
    figure = make_panel(2, channels=1, class_names=None, heat_maps=None)
    assert "1" in words(figure)
    assert len(tiles(figure)) == 10 and tiles(figure)[0].shape == (12, 10, 3)
    bare = report.Prediction([4, 5])
    x = np.zeros((2, 6, 6, 1))
    figure = report.attack_panel(x, x, bare, bare)
    assert not any("%" in w for w in words(figure))


def test_amplification_is_per_image_and_printed():
    x = np.full((2, 6, 6, 3), 0.5)
    adversarials = x.copy()
    adversarials[0, 0, 0], adversarials[1, 0, 0] = 0.6, 0.75
    label = report.Prediction([0, 0])
    figure = report.attack_panel(x, adversarials, label, label)
    assert {"\u00d75", "\u00d72"} <= set(words(figure))
    assert tiles(figure)[2][0, 0].tolist() == [255] * 3
    fixed = report.attack_panel(x, adversarials, label, label, amplification=4)
    assert words(fixed).count("\u00d74") == 2
    np.testing.assert_allclose(tiles(fixed)[2][0, 0], 255 * 0.9, atol=1)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, "bfloat16"])
def test_rounding_of_one_side_is_no_change(kind):
    x = (np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3)) / 255.0).astype(np.float64)
    adversarials = x.astype(jnp.dtype(kind))
    adversarials[0, 4, 4] = 0.0
    label = report.Prediction([0], [np.nan])
    for pair in ((x, adversarials), (adversarials, x)):
        said = words(report.attack_panel(*pair, label, label))
        assert "1 px" in said and "nan%" not in said


def test_constant_and_signed_maps():
    x = np.zeros((1, 6, 6, 3))
    label = report.Prediction([0])
    signed = np.zeros((1, 6, 6))
    signed[0, 0, 0], signed[0, 5, 5] = -3, 3
    maps = {"flat": np.ones((1, 2, 2)), "zero": np.zeros((1, 2, 2)), "signed": signed}
    drawn = tiles(report.attack_panel(x, x, label, label, heat_maps=maps))[5:]
    assert np.ptp(drawn[0], axis=(0, 1)).max() == np.ptp(drawn[1], axis=(0, 1)).max() == 0
    middle = drawn[2][3, 3].astype(int)
    assert middle.min() > 240  # Zero is drawn white-grey, whatever the extremes.
    assert np.abs(drawn[2][0, 0].astype(int) - drawn[2][5, 5]).max() > 50


def test_wrong_arguments_are_refused():
    x, label = np.zeros((2, 6, 6, 3)), report.Prediction([0, 0])
    with pytest.raises(ValueError, match="no image"):
        report.attack_panel(x[:0], x[:0], report.Prediction([]), report.Prediction([]))
    with pytest.raises(ValueError, match="one shape"):
        report.attack_panel(x, x[:1], label, label)
    with pytest.raises(ValueError, match=r"after.labels has 1 entries"):
        report.attack_panel(x, x, label, report.Prediction([0]))
    with pytest.raises(ValueError, match="CAM has 1 entries"):
        report.attack_panel(x, x, label, label, heat_maps={"CAM": np.zeros((1, 6, 6))})
    with pytest.raises(ValueError, match=r"must be \[N, H, W\]"):
        report.attack_panel(x, x, label, label, heat_maps={"CAM": np.zeros((2, 6, 6, 3))})


@pytest.mark.slow
def test_panel_is_deterministic(tmp_path):
    first = report.save_figure(make_panel(), tmp_path / "a")
    second = report.save_figure(make_panel(), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
