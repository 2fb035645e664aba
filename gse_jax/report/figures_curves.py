"""Curves and distributions of several attacks: IS by percentile, success by budget, spreads.

All functions take arrays by method name, in the order in which they are to be drawn; a method
keeps its colour, marker and dashes over all figures that list the methods in the same order.

References:
    arXiv 2311.17434 (IS curves; ACP, ANC and d_{2,0}).
"""

import numpy as np

from gse_jax.report.figures import COLUMN_WIDTH, FONT_SIZE, drawing_style, line_style

_HEIGHT = 2.1  # Inches of a curve figure without its legend.


def interpretability_curves(percentiles, scores, *, width=COLUMN_WIDTH):
    """Draw the mean interpretability score by percentile, with its standard error as a band.

    Args:
        percentiles: the P of the columns of the scores, [K] numbers.
        scores: {method: [N, K]} scores of that method's *successes*; N may differ between
            methods. A method without any success is named in the legend and has no line.
        width: inches.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: if there is no method, or an array does not fit the percentiles.

    References:
        arXiv 1808.01664 (IS); arXiv 2311.17434.
    """
    percentiles = np.asarray(percentiles, float)
    _require_methods(scores)

    def draw(axes):
        for index, (name, values) in enumerate(scores.items()):
            values = np.asarray(values, float)
            if values.ndim != 2 or values.shape[1] != len(percentiles):
                raise ValueError(
                    f"{name}: scores {values.shape} for {len(percentiles)} percentiles"
                )
            style = line_style(index)
            if not len(values):
                axes.plot([], [], label=f"{name} (no success)", **style)
                continue
            mean = values.mean(axis=0)
            axes.plot(percentiles, mean, label=name, **style)
            if len(values) > 1:
                error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
                axes.fill_between(percentiles, mean - error, mean + error, color=style["color"],
                                  alpha=0.18, linewidth=0)
        axes.set(xlabel="percentile P of the saliency map", ylabel="interpretability score",
                 xticks=percentiles, ylim=(0, 1.03))

    return _figure_with_legend(draw, width)


def success_curves(budgets, rates, *, xlabel="changed pixels k", logarithmic=False,
                   width=COLUMN_WIDTH):
    """Draw the success rate within each sparsity budget (ASR versus k).

    Args:
        budgets: the k of the entries of the rates, [K] increasing.
        rates: {method: [K]} success rates in [0, 1], as `gse_jax.metrics.success_at_k` gives.
        xlabel: what is budgeted; say the denominator of the rates in the caption.
        logarithmic: whether k has a logarithmic axis (which leaves k = 0 out).
        width: inches.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: if there is no method, an array does not fit the budgets, or a logarithmic
            axis is asked for without a positive budget.

    References:
        arXiv 2006.12834; arXiv 2402.01879.
    """
    budgets = np.asarray(budgets, float)
    _require_methods(rates)
    if logarithmic and not (budgets > 0).any():
        raise ValueError("a logarithmic axis needs a positive budget")
    # About six markers per line, at shifted places: curves often lie upon each other.
    every = max(len(budgets) // 6, 1)

    def draw(axes):
        for index, (name, values) in enumerate(rates.items()):
            values = np.asarray(values, float)
            if values.shape != budgets.shape:
                raise ValueError(f"{name}: rates {values.shape} for {len(budgets)} budgets")
            marks = (index * every // max(len(rates), 1), every)
            axes.plot(budgets, 100 * values, label=name, drawstyle="steps-post", markevery=marks,
                      **line_style(index))
        axes.set(xlabel=xlabel, ylabel="success rate (%)", ylim=(-3, 103),
                 xscale="log" if logarithmic else "linear")

    return _figure_with_legend(draw, width)


def distribution_plots(samples, *, width=COLUMN_WIDTH):
    """Draw the spread of each metric over the successes of each attack.

    One panel per metric, one row per method: the box holds the middle half with the median as a
    line, the whiskers the middle 90 %, the diamond is the mean, the dots are single images.

    Args:
        samples: {metric: {method: [n] values of that method's successes}}, every metric with the
            same methods; n may be 0. For example the keys "ACP", "ANC" and "d_{2,0}".
        width: inches.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: if there is no metric or method, or the metrics list different methods.

    References:
        arXiv 2311.17434 (ACP, ANC, d_{2,0}).
    """
    _require_methods(samples)
    methods = list(next(iter(samples.values())))
    _require_methods(methods)
    if any(list(by_method) != methods for by_method in samples.values()):
        raise ValueError("every metric needs the same methods in the same order")
    with drawing_style() as matplotlib:
        height = 0.45 + 0.24 * len(methods)
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(samples), sharey=True, squeeze=False)[0]
        for axes, (metric, by_method) in zip(panels, samples.items(), strict=True):
            for row, values in enumerate(by_method.values()):
                _draw_row(axes, row, np.asarray(values, float).reshape(-1))
            axes.set(xlabel=_metric_name(metric), xlim=(0, None))
            axes.locator_params(axis="x", nbins=3, steps=[1, 2, 5, 10])
            axes.tick_params(axis="y", length=0)
        panels[0].set(yticks=range(len(methods)), yticklabels=methods,
                      ylim=(len(methods) - 0.5, -0.5))
        return figure


def _draw_row(axes, row, values):
    if not values.size:
        axes.text(0.02, row, "no success", transform=axes.get_yaxis_transform(), va="center",
                  fontsize=FONT_SIZE - 0.5, style="italic", color="0.35")
        return
    colour = line_style(row)["color"]
    # Spread the dots by rank in a fixed pattern: random jitter would change with every run.
    height = row + 0.28 * (((np.arange(values.size) * 0.618034) % 1) * 2 - 1)
    axes.plot(np.sort(values), height, linestyle="none", marker=".", markersize=2, alpha=0.35,
              markeredgewidth=0, color=colour, rasterized=values.size > 500)
    low, left, middle, right, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([low, left], [row, row], color=colour, linewidth=0.8)
    axes.plot([right, high], [row, row], color=colour, linewidth=0.8)
    axes.broken_barh([(left, right - left)], (row - 0.25, 0.5), facecolor="none",
                     edgecolor=colour, linewidth=0.8)
    axes.plot([middle, middle], [row - 0.25, row + 0.25], color=colour, linewidth=1.6)
    axes.plot([values.mean()], [row], marker="D", markersize=3.2, color="white",
              markeredgecolor=colour, markeredgewidth=0.8)


def _metric_name(metric):
    # Braces keep mathtext from setting a space after the comma of d_{2,0}.
    return f"${metric.replace(',', '{,}')}$" if "_{" in metric else metric


def _require_methods(methods):
    if not len(methods):
        raise ValueError("there is nothing to draw")


def _figure_with_legend(draw, width):
    with drawing_style() as matplotlib:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = matplotlib.figure.Figure(figsize=(width, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        draw(axes)
        canvas = FigureCanvasAgg(figure)
        lines = len(axes.get_lines())
        for columns in range(min(lines, 4), 0, -1):  # The most that fit the width.
            legend = figure.legend(loc="outside upper center", ncols=columns, handlelength=3.2,
                                   columnspacing=1.2)
            rows = -(-lines // columns)
            fits = legend.get_window_extent(canvas.get_renderer()).width <= figure.bbox.width
            if columns == 1 or (fits and columns * rows - lines < rows):
                break
            legend.remove()
        figure.set_size_inches(width, _HEIGHT + 0.13 * rows)
        return figure
