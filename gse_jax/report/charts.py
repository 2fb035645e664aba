"""Curves and distributions as inline SVG, coloured by the page's style sheet.

The figures for papers are in `figures_curves`; these follow the page's light or dark colours and
its width. Series differ in dash pattern as well as in colour.

References:
    arXiv 2311.17434 (metrics); arXiv 2006.12834 (success by budget).
"""

from math import ceil, floor, log10
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from gse_jax.report.summary import ATTACKED
from gse_jax.report.tables import show_number

NUM_STYLES = 7  # Colours in the style sheet.
_DASHES = ("", "6 3", "2 2", "8 2 2 2", "10 3", "4 2 1 2 1 2", "3 3")
_WIDTH, _LEFT, _RIGHT = 360, 34, 10
_MOST_DOTS = 300


class Series(NamedTuple):
    """Name a line or row of a chart and give it a style.

    Attributes:
        name: in the legend; any text.
        style: number of its colour and dash pattern.
        values: what is drawn; see the charts.
    """

    name: str
    style: int
    values: object


def success_curve(records, key):
    """Return the curve of success rate within a budget, over attacked images.

    Args:
        records: of one or several cases.
        key: the record field that is budgeted, e.g. "changed_pixels".

    Returns:
        (costs [M] ascending and distinct, rates [M]): the rate at k is that of the largest cost
        <= k, and 0 below the first. Empty where nothing was found.

    References:
        arXiv 2006.12834; arXiv 2402.01879 (ASR at k).
    """
    attacked = [r for r in records if r["status"] in ATTACKED]
    costs = [r[key] for r in attacked if r["status"] == "found" and r[key] is not None]
    values, counts = np.unique(np.asarray(costs, np.float64), return_counts=True)
    return values, np.cumsum(counts) / max(len(attacked), 1)


def curve_chart(series, xlabel):
    """Draw success rate by budget, as steps.

    Args:
        series: list of `Series` whose values are those of `success_curve`.
        xlabel: what is budgeted.

    Returns:
        Markup of one <svg>, or None where no series has a success.

    References:
        arXiv 2006.12834.
    """
    largest = max((s.values[0][-1] for s in series if len(s.values[0])), default=None)
    if largest is None:
        return None
    ticks = nice_ticks(largest, whole=True)
    top, bottom, height = 24, 196, 230
    end = max(largest * 1.03, ticks[-1])

    def x(value):
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / end

    def y(share):
        return bottom - (bottom - top) * share

    parts = [_line(_LEFT, y(s), _WIDTH - _RIGHT, y(s), "grid") + _text(_LEFT - 5, y(s) + 3.5,
             f"{100 * s:.0f}", "end") for s in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_line(x(t), bottom, x(t), bottom + 4, "axis")
              + _text(x(t), bottom + 15, show_tick(t), "middle") for t in ticks]
    parts += [_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 4, xlabel, "middle"),
              _text(8, 11, "success rate (%)", "start")]
    for one in series:
        points = {}
        for cost, share in zip(*one.values, strict=True):
            points[round(2 * x(cost)) / 2] = share  # The last within half a pixel is what shows.
        path = f"M{_LEFT} {y(0):.1f}" + "".join(
            f"H{place:.1f}V{y(share):.1f}" for place, share in points.items())
        parts.append(Markup('<path d="{}H{}" class="line c{}" stroke-dasharray="{}"><title>{}'
                            "</title></path>").format(path, _WIDTH - _RIGHT, one.style % NUM_STYLES,
                                                      dashes(one.style), one.name))
    return _svg(height, f"Success rate in percent by {xlabel}", parts)


def distribution_chart(rows, xlabel):
    """Draw the spread of one metric: a box, whiskers, the mean and single images per row.

    Args:
        rows: list of `Series` whose values are numbers; may be empty.
        xlabel: the metric in words.

    Returns:
        Markup of one <svg>, or None where all rows are empty.

    References:
        arXiv 2311.17434.
    """
    samples = [np.sort(np.asarray(row.values, np.float64)) for row in rows]
    largest = max((v[-1] for v in samples if v.size), default=None)
    if largest is None:
        return None
    ticks = nice_ticks(largest, whole=all((v == np.round(v)).all() for v in samples))
    end = max(largest * 1.03, ticks[-1]) or 1.0
    bottom = 40 * len(rows) + 4

    def x(value):
        return 8 + (_WIDTH - 8 - _RIGHT) * value / end

    parts = [_line(x(t), 16, x(t), bottom + 4, "grid")
             + _text(x(t), bottom + 15, show_tick(t), "middle") for t in ticks]
    parts.append(_text(_WIDTH / 2, bottom + 30, xlabel, "middle"))
    for number, (row, values) in enumerate(zip(rows, samples, strict=True)):
        parts.append(_text(8, 40 * number + 12, row.name, "start", "row"))
        parts.append(_box(values, 40 * number + 27, x, row.style % NUM_STYLES) if values.size else
                     _text(10, 40 * number + 31, "no success", "start", "none"))
    return _svg(bottom + 36, f"Distribution of {xlabel}", parts)


def dashes(style):
    """Return the dash pattern of a style.

    Args:
        style: number >= 0.

    Returns:
        str for `stroke-dasharray`. Colours and patterns repeat together only after 49 styles.
    """
    return _DASHES[(style + style // NUM_STYLES) % len(_DASHES)]


def nice_ticks(largest, whole=False):
    """Return 0 and a few round numbers up to `largest`.

    Args:
        largest: end of the data, >= 0.
        whole: whether the data are counts, between which no tick makes sense.

    Returns:
        List of ascending numbers, at least one.
    """
    if largest <= 0:
        return [0.0]
    unit = 10.0 ** floor(log10(largest / 4))
    steps = [m * unit for m in (1, 2, 2.5, 5, 10)]
    if whole:
        steps = [step for step in steps if step >= 1 and step == round(step)] or [1.0]
    step = next(step for step in steps if largest / step <= 5)
    return [i * step for i in range(floor(largest / step + 1e-9) + 1)]


def show_tick(value):
    """Write a tick label: no digits more than it has.

    Args:
        value: number.

    Returns:
        str.
    """
    return f"{value:,.0f}" if value == round(value) else f"{value:.10g}"


def budgets(largest):
    """Return the budgets of the table beside the curves: 1, 2, 5, 10, ... up to the largest cost.

    Args:
        largest: largest cost, > 0.

    Returns:
        List of at most ten numbers; the last is >= largest.
    """
    steps = [m * 10**e for e in range(ceil(log10(max(largest, 1))) + 1) for m in (1, 2, 5)]
    enough = next(i for i, step in enumerate(steps) if step >= largest)
    return steps[max(0, enough - 9):enough + 1]


def _box(values, middle, x, style):
    low, left, median, right, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    mean = values.mean()
    count = min(values.size, _MOST_DOTS)
    shown = values[np.linspace(0, values.size - 1, count).round().astype(int)]
    # Spread by rank in a fixed pattern: random jitter would change with every run.
    heights = middle + 8 * (((np.arange(shown.size) * 0.618034) % 1) * 2 - 1)
    dots = "".join(f"M{x(v):.1f} {h:.1f}h0" for v, h in zip(shown, heights, strict=True))
    title = (f"n = {values.size}, mean {show_number(mean)}, median {show_number(median)}, "
             f"middle half {show_number(left)} to {show_number(right)}")
    at = x(mean)
    return Markup(
        '<g class="c{}"><title>{}</title><path d="{}" class="dots"/><path d="M{:.1f} {m}H{:.1f}'
        'M{:.1f} {m}H{:.1f}" class="line thin"/><rect x="{:.1f}" y="{}" width="{:.1f}" height="16" '
        'class="box"/><path d="M{:.1f} {}v16" class="line"/><path d="M{:.1f} {m}l4 -4l4 4l-4 4z" '
        'class="mean"/></g>').format(
            style, title, dots, x(low), x(left), x(right), x(high), x(left), middle - 8,
            x(right) - x(left), x(median), middle - 8, at - 4, m=middle)


def _line(x1, y1, x2, y2, kind):
    return Markup('<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" class="{}"/>').format(
        x1, y1, x2, y2, kind)


def _text(x, y, words, anchor, kind=""):
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, kind, words)


def _svg(height, label, parts):
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, label, Markup("").join(escape(part) for part in parts))
