"""Inline charts: the numbers behind the shapes."""

import re

import numpy as np
import pytest
from tests.report.small_runs import record, untargeted

from gse_jax import metrics
from gse_jax.report import charts
from gse_jax.report.tiles import png_data_uri


def test_success_curve_is_that_of_the_metrics_room():
    rng = np.random.default_rng(0)
    records = [record(i, status=str(rng.choice(["found", "not_found", "already_misclassified"])),
                      pixels=int(rng.integers(1, 30))) for i in range(50)]
    costs, rates = charts.success_curve(records, "changed_pixels")
    success = np.array([r["status"] == "found" for r in records])
    attacked = np.array([r["status"] != "already_misclassified" for r in records])
    pixels = np.array([r["changed_pixels"] or 0 for r in records])
    expected = metrics.success_at_k(pixels, success, costs, attacked=attacked)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_curve_ends_at_the_success_rate():
    values = charts.success_curve(untargeted(), "changed_pixels")
    np.testing.assert_array_equal(values[0], [2, 4, 12])
    np.testing.assert_allclose(values[1], [0.2, 0.4, 0.6])
    svg = charts.curve_chart([charts.Series("a <b>", 0, values)], "at most k")
    assert "<title>a &lt;b&gt;</title>" in svg and "<b>" not in svg
    path = re.search(r'<path d="(M[^"]+)" class="line c0"', svg)[1]
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
    assert heights == sorted(heights, reverse=True)
    # 0 lies at 196 and 1 at 24 in the drawing.
    np.testing.assert_allclose((196 - np.array(heights)) / (196 - 24), [0.2, 0.4, 0.6], atol=1e-3)


def test_a_series_without_success_stays_at_zero():
    empty = charts.success_curve([record(0, status="not_found")], "changed_pixels")
    some = charts.success_curve(untargeted(), "changed_pixels")
    assert charts.curve_chart([charts.Series("none", 0, empty)], "k") is None
    svg = charts.curve_chart([charts.Series("none", 0, empty), charts.Series("a", 1, some)], "k")
    assert re.search(r'<path d="M34 196.0H350" class="line c0"', svg)


def test_large_curves_stay_small():
    costs = np.arange(1, 50_001, dtype=float)
    svg = charts.curve_chart([charts.Series("a", 0, (costs, costs / 50_000))], "k")
    assert len(svg) < 20_000


def test_distribution_names_empty_rows_and_its_numbers():
    rows = [charts.Series("a", 0, [1, 2, 3, 4, 40]), charts.Series("b", 8, [])]
    svg = charts.distribution_chart(rows, "changed pixels")
    assert "no success" in svg
    assert "n = 5, mean 10.0, median 3.00, middle half 2.00 to 4.00" in svg
    ends = re.search(r'd="M([\d.]+) \d+H([\d.]+)M([\d.]+) \d+H([\d.]+)" class="line thin"', svg)
    low, left, right, high = map(float, ends.groups())  # whiskers hold nine tenths, the box a half
    np.testing.assert_allclose([(right - left) / (high - low), (left - low) / (high - low)], [2 / 31.6, 0.8 / 31.6],
                               atol=1e-3)
    assert len(re.findall(r"h0", re.search(r'd="([^"]*)" class="dots"', svg)[1])) == 5
    assert charts.distribution_chart(rows[1:], "x") is None
    assert charts.distribution_chart([charts.Series("a", 0, [0.0, 0.0])], "x") is not None


@pytest.mark.parametrize("largest", [0.003, 0.9, 1, 7, 99, 1024, 50176, 1e6])
def test_ticks_are_few_round_and_inside(largest):
    ticks = charts.nice_ticks(largest)
    assert ticks[0] == 0 and 3 <= len(ticks) <= 6 and ticks[-1] <= largest * (1 + 1e-9)
    assert all(len(charts.show_tick(t).replace(",", "").strip("0.")) <= 3 for t in ticks)


@pytest.mark.parametrize("largest", [1, 2, 5, 9, 10, 12, 64, 50176])
def test_ticks_of_counts_are_counts(largest):
    ticks = charts.nice_ticks(largest, whole=True)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 6 and all(t == round(t) for t in ticks)


@pytest.mark.parametrize("largest", [1, 2, 3, 100, 101, 50176])
def test_budgets_reach_the_largest_cost(largest):
    budgets = charts.budgets(largest)
    assert budgets == sorted(set(budgets)) and len(budgets) <= 10
    assert budgets[-1] >= largest and all(b < largest for b in budgets[:-1])


def test_styles_differ():
    styles = [(i % charts.NUM_STYLES, charts.dashes(i)) for i in range(49)]
    assert len(set(styles)) == 49


def test_png_holds_the_pixels():
    import base64
    import io

    from matplotlib.image import imread

    tile = np.random.default_rng(0).random((5, 7, 3))
    uri = png_data_uri(tile)
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    np.testing.assert_allclose(imread(io.BytesIO(data)), np.round(tile * 255) / 255, atol=1e-6)
