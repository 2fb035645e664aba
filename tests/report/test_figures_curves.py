"""Curves and distributions: the numbers drawn, empty methods, and text that fits."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from gse_jax import report

METHODS = ["GSE", "StrAttack", "FWnucl", "Homotopy", "SAPF", "SAIF", "Sparse-RS", "sigma-zero",
           "a method with a rather long name"]
PERCENTILES = (50, 60, 70, 80, 90)


def make_scores(methods):
    rng = np.random.default_rng(0)
    return {name: rng.random((20 + i, 5)) for i, name in enumerate(methods)}


def make_figures(methods):
    rng = np.random.default_rng(1)
    samples = {name: rng.integers(1, 90, 30) for name in methods}
    rates = {name: np.sort(rng.random(50)) for name in methods}
    return [
        report.interpretability_curves(PERCENTILES, make_scores(methods)),
        report.success_curves(np.arange(1, 51), rates),
        report.success_curves(np.arange(50), rates, xlabel="patches $d_{2,0}$", logarithmic=True),
        report.distribution_plots({"ACP": samples, "ANC": samples, "d_{2,0}": samples}),
    ]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_everything_fits_the_column(count):
    for figure in make_figures(METHODS[:count]):
        assert figure.get_size_inches()[0] == 3.3
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        for part in [*figure.axes, *figure.legends]:  # With ticks, labels and texts.
            box = part.get_tightbbox(renderer)
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, part
            assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, part
        for axes in figure.axes:  # The legend and the labels leave room for the data.
            assert axes.get_window_extent().width > 0.1 * figure.bbox.width
        for legend in figure.legends:
            covered = legend.get_window_extent(renderer).y0
            assert covered >= figure.axes[0].get_window_extent().y1 - 1


def test_curves_draw_the_means_and_name_methods_without_success():
    scores = make_scores(METHODS[:2]) | {"none": np.zeros((0, 5)), "one": np.full((1, 5), 0.25)}
    figure = report.interpretability_curves(PERCENTILES, scores)
    lines = figure.axes[0].get_lines()
    for line, values in zip(lines, scores.values(), strict=True):
        if len(values):
            np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
            np.testing.assert_array_equal(line.get_xdata(), PERCENTILES)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["GSE", "StrAttack", "none (no success)", "one"]
    assert len(figure.axes[0].collections) == 2  # Bands only where there is a standard error.
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    first = scores["GSE"]
    error = first.std(axis=0, ddof=1) / np.sqrt(len(first))
    np.testing.assert_allclose(band.max(), (first.mean(axis=0) + error).max())


def test_success_curves_are_steps_in_percent():
    figure = report.success_curves([1, 5, 9], {"a": [0.0, 0.5, 1.0]})
    (line,) = figure.axes[0].get_lines()
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_array_equal(line.get_ydata(), [0, 50, 100])
    assert report.success_curves([1, 9], {"a": [0, 1]}, logarithmic=True).axes[0].get_xscale() == (
        "log"
    )


def test_distributions_show_median_mean_and_every_image():
    values = np.array([1.0, 2, 3, 4, 40])
    figure = report.distribution_plots({"ACP": {"a": values, "b": []}})
    (axes,) = figure.axes
    drawn = [line.get_xdata() for line in axes.get_lines()]
    np.testing.assert_array_equal(drawn[0], values)
    np.testing.assert_array_equal(drawn[3], [3, 3])
    np.testing.assert_array_equal(drawn[4], [10])
    assert [text.get_text() for text in axes.texts] == ["no success"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_figures_are_deterministic(tmp_path):
    for number, pair in enumerate(zip(make_figures(METHODS[:3]), make_figures(METHODS[:3]),
                                      strict=True)):
        first, second = (
            report.save_figure(figure, tmp_path / f"{number}{side}")
            for figure, side in zip(pair, "ab", strict=True)
        )
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()


def test_wrong_arguments_are_refused():
    for draw in (
        lambda: report.interpretability_curves(PERCENTILES, {}),
        lambda: report.success_curves([1], {}),
        lambda: report.distribution_plots({}),
        lambda: report.distribution_plots({"ACP": {}}),
    ):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()
    with pytest.raises(ValueError, match="for 5 percentiles"):
        report.interpretability_curves(PERCENTILES, {"a": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="for 2 budgets"):
        report.success_curves([1, 2], {"a": [0.5]})
    with pytest.raises(ValueError, match="positive budget"):
        report.success_curves([0], {"a": [0.5]}, logarithmic=True)
    with pytest.raises(ValueError, match="same methods"):
        report.distribution_plots({"ACP": {"a": [1]}, "ANC": {"b": [1]}})
