"""What all figures share: how they look, how they fit a column, how they are written.

Figures are `matplotlib.figure.Figure` objects made without pyplot: no global state, no window, no
backend to choose. matplotlib is imported when the first figure is made. Colours are those of Okabe
and Ito, which people with any common colour deficiency tell apart, and every line also has its
own marker and dash pattern, so the figures survive a grey printer.

References:
    Okabe and Ito, "Color Universal Design" (2008), jfly.uni-koeln.de/color.
"""

import contextlib
import io
from pathlib import Path

from gse_jax.report.files import write_whole

COLUMN_WIDTH = 3.3  # Inches: one column of a two-column paper.
FONT_SIZE = 6.5  # Points: the smallest that stays readable when printed at that width.

# Okabe-Ito without its yellow, which vanishes on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ((None, None), (4, 1.5), (1, 1), (5, 1, 1, 1), (7, 2), (3, 1, 1, 1, 1, 1), (2, 2))

_STYLE = {
    "font.family": "DejaVu Sans",  # Comes with matplotlib, so every machine gives equal bytes.
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 0.5,
    "ytick.labelsize": FONT_SIZE - 0.5,
    "legend.fontsize": FONT_SIZE - 0.5,
    "legend.frameon": False,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "lines.linewidth": 1.0,
    "lines.markersize": 3,
    "pdf.fonttype": 42,  # Real fonts: publishers refuse Type 3, and the text can be searched.
    "svg.hashsalt": "gse_jax",
}


@contextlib.contextmanager
def drawing_style():
    """Apply the figures' style, and nothing of the user's matplotlibrc, inside a `with` block.

    Yields:
        The imported matplotlib module.
    """
    import matplotlib  # when needed: it takes long
    import matplotlib.figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield matplotlib


def line_style(index):
    """Return the plot keywords of the index-th line: colour, marker and dashes of its own.

    Args:
        index: number of the line, >= 0. Seven colours and seven dash patterns are combined so
            that they repeat together only after 49 lines.

    Returns:
        Keywords for `Axes.plot`.

    References:
        Okabe and Ito (2008).
    """
    number = len(COLOURS)
    shape = (index + index // number) % number
    return {"color": COLOURS[index % number], "marker": MARKERS[shape], "dashes": DASHES[shape]}


def save_figure(figure, path_stem, *, dpi=300):
    """Write a figure as PNG and PDF; equal figures give equal bytes.

    Dates, versions and program names are left out of the files. Each file is written whole or not
    at all.

    Args:
        figure: matplotlib Figure.
        path_stem: path without a suffix; ".png" and ".pdf" are appended, dots in it are kept.
            Missing folders are made.
        dpi: resolution of the PNG, and of images inside the PDF, in pixels per inch.

    Returns:
        (path of the PNG, path of the PDF).

    Raises:
        OSError: if the files cannot be written.
    """
    stem = Path(path_stem)
    nothing = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }
    paths = []
    for kind, metadata in nothing.items():
        buffer = io.BytesIO()
        with drawing_style():
            figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
        paths.append(write_whole(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue()))
    return tuple(paths)
