"""The front between sparsity and the l2 norm: one curve, and every other attack as a point.

References:
    arXiv 2311.17434, section 4 (ACP, ANC, l2, d_{2,0}).
"""

import numpy as np

from gse_jax.report.figures import COLUMN_WIDTH, drawing_style, line_style

_PANELS = (("$d_{2{,}0}$", 3), ("changed pixels", 0), ("clusters", 1))


def front_plot(means, complete, *, width=2 * COLUMN_WIDTH):
    """Draw d_{2,0}, ACP and ANC over the l2 norm, all axes logarithmic; down and left is better.

    Args:
        means: {method: [K, 4] means ACP, ANC, l2, d_{2,0}}; K > 1 is drawn as a curve, K = 1 as a
            point. Rows with NaN are left out.
        complete: {method: [K] bool}, success on every image; the others' markers are hollow.
        width: inches.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: if there is no method, or an array does not have four columns.
    """
    if not means:
        raise ValueError("there is nothing to draw")
    with drawing_style() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(width, 2.6), layout="constrained")
        panels = figure.subplots(1, len(_PANELS))
        for axes, (label, column) in zip(panels, _PANELS, strict=True):
            axes.set(xscale="log", yscale="log", xlabel=r"$\ell_2$ norm", ylabel=label)
            axes.grid(which="major", color="0.9", linewidth=0.5)
            for index, (name, rows) in enumerate(means.items()):
                rows = np.asarray(rows, float)
                if rows.ndim != 2 or rows.shape[1] != 4:
                    raise ValueError(f"{name}: expected [K, 4] numbers, got {list(rows.shape)}")
                _draw(axes, rows, np.asarray(complete[name], bool), column, name, line_style(index))
            for axis in (axes.xaxis, axes.yaxis):
                low, high = axis.get_view_interval()
                # On less than most of a decade 1, 2 and 5 could leave a single tick.
                axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)) if high > 6 * low else
                                       matplotlib.ticker.MaxNLocator(4, steps=(1, 2, 5, 10)))
                axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                axis.set_minor_locator(matplotlib.ticker.NullLocator())
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=7, handlelength=2.0,
                      columnspacing=1.0)
        return figure


def _draw(axes, rows, complete, column, name, style):
    known = ~np.isnan(rows).any(1)
    rows, complete = rows[known], complete[known]
    order = np.argsort(rows[:, 2])
    if len(rows) == 1:
        style = {**style, "linestyle": "none", "markersize": 4}
        del style["dashes"]
    if not known.any():
        name += " (no success)"
    elif not complete.all():
        name += " (hollow: ASR < 1)" if complete.any() else " (ASR < 1)"
    (line,) = axes.plot(rows[order, 2], rows[order, column], label=name, **style)
    if not complete.all():  # white over the markers of points with a miss
        hollow = {key: value for key, value in style.items() if key != "dashes"} | {
            "linestyle": "none", "markerfacecolor": "white", "zorder": line.get_zorder() + 0.1}
        axes.plot(rows[~complete, 2], rows[~complete, column], **hollow)
