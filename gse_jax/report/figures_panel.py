"""The paper's panel: what the image was, what it became, what changed, and where the model looks.

One row per image; the tiles are original, adversarial, the change (amplified), its mask, the mask
in red on the faded image, and any heat maps.

Differs from the reference:
    The published figures use the "jet" colour map and red on the full-colour image; both mislead
    people with a colour deficiency, and jet invents edges. Here unsigned maps use "cividis",
    signed ones a diverging map centred at 0, and the red lies on a faded grey image, from which
    it differs in brightness as well. The change is amplified per image, by the factor printed
    below it, instead of by 4 for all.

References:
    arXiv 2311.17434 (figures of adversarial examples and class activation maps).
"""

from typing import NamedTuple

import numpy as np

from gse_jax.report.figures import COLUMN_WIDTH, FONT_SIZE, drawing_style
from gse_jax.report.tiles import changed_places, overlay_tile, to_unit
from gse_jax.types import Status

_WORDS = {
    Status.NOT_FOUND: "not found",
    Status.ALREADY_MISCLASSIFIED: "already wrong",
    Status.NON_FINITE: "non-finite",
}
_GAP = 0.04  # Inches between tiles.
_MARGIN = 0.01  # Inches at the sides: half of a tile's frame lies outside the tile.
_SMALLEST = 5.5  # Points: words that do not fit their tile shrink to this, then are cut.
_LINE = FONT_SIZE * 1.25 / 72  # Inches per line of text.


class Prediction(NamedTuple):
    """Hold what a model says about N images.

    Attributes:
        labels: predicted classes, int [N].
        confidences: probability of that class in [0, 1], [N], or None to print labels only.
    """

    labels: np.ndarray
    confidences: np.ndarray | None = None


def attack_panel(
    x,
    adversarials,
    before,
    after,
    *,
    bounds=(0.0, 1.0),
    class_names=None,
    heat_maps=None,
    status=None,
    amplification=None,
    width=COLUMN_WIDTH,
):
    """Draw the panel of original, adversarial, change, mask, overlay and heat maps.

    Args:
        x: clean images, [N, H, W, C] with C = 1 or 3 and N >= 1, in `bounds`.
        adversarials: perturbed images, same shape and range.
        before: `Prediction` for x.
        after: `Prediction` for adversarials.
        bounds: (lo, hi), shown as black and white.
        class_names: names by class number, a sequence or mapping; None prints the numbers.
        heat_maps: {column heading: maps [N, H', W']} or None. A column with negative values is
            drawn as signed, saturating at the 99.5th percentile. Each image has its own scale.
        status: `gse_jax.types.Status` per image, int [N]; says in words why a row shows no
            adversarial. None: unknown.
        amplification: factor on the change, > 0; None chooses it per image, at least 1, so that
            the largest change reaches black or white.
        width: of the whole figure, in inches.

    Returns:
        matplotlib Figure, `width` inches wide.

    Raises:
        ValueError: if N is 0 or shapes do not match.

    References:
        arXiv 2311.17434.
    """
    x, adversarials = _of_one_precision(np.asarray(x), np.asarray(adversarials))
    heat_maps = {name: np.asarray(maps, np.float64) for name, maps in (heat_maps or {}).items()}
    status = np.full(len(x), Status.FOUND) if status is None else np.asarray(status)
    _check(x, adversarials, before, after, heat_maps, status)
    headings = ["original", "adversarial", "change", "mask", "overlay", *heat_maps]
    with drawing_style() as matplotlib:
        page = _Page(matplotlib, headings, len(x), x.shape[1:3], width)
        for row in range(len(x)):
            unit = [to_unit(images[row], bounds) for images in (x, adversarials)]
            changed = changed_places(x[row], adversarials[row])
            factor = _factor(unit, amplification)
            tiles = [*unit, _change_tile(unit, factor), _mask_tile(changed),
                     overlay_tile(unit[0], changed)]
            for column, tile in enumerate(tiles):
                page.tile(row, column, tile)
            for column, maps in enumerate(heat_maps.values(), len(tiles)):
                # One colour map for a column: two would look like two kinds of map.
                page.heat_map(row, column, maps[row], signed=bool((maps < 0).any()))
            page.caption(row, 0, _lines(before, row, class_names))
            word = _WORDS.get(int(status[row]))
            page.caption(row, 1, _lines(after, row, class_names) if word is None else word.split())
            if changed.any():
                page.caption(row, 2, [f"\u00d7{factor:.3g}"])
            page.caption(row, 3, [f"{int(changed.sum())} px"])
        return page.figure


def _of_one_precision(*pair):
    """Images stored with fewer digits than the others were not changed by that; as in `metrics`."""
    if not any(images.dtype.kind in "iu" for images in pair):
        narrow = min((images.dtype for images in pair), key=lambda dtype: dtype.itemsize)
        pair = [images.astype(narrow) for images in pair]
    return [images.astype(np.float64) for images in pair]


def _check(x, adversarials, before, after, heat_maps, status):
    if x.ndim != 4 or x.shape != adversarials.shape or x.shape[-1] not in (1, 3):
        raise ValueError(
            "x and adversarials must have one shape [N, H, W, C] with C = 1 or 3; "
            f"got {x.shape} and {adversarials.shape}"
        )
    if len(x) == 0:
        raise ValueError("there is no image to draw")
    per_image = {"before.labels": before.labels, "after.labels": after.labels, "status": status}
    for name, prediction in (("before", before), ("after", after)):
        if prediction.confidences is not None:
            per_image[f"{name}.confidences"] = prediction.confidences
    for name, values in (per_image | heat_maps).items():
        if len(values) != len(x):
            raise ValueError(f"{name} has {len(values)} entries for {len(x)} images")
    for name, maps in heat_maps.items():
        if maps.ndim != 3:
            raise ValueError(f"heat map {name!r} must be [N, H, W], got {maps.shape}")


def _factor(unit, amplification):
    if amplification is not None:
        return float(amplification)
    largest = np.abs(unit[1] - unit[0]).max()
    # Never below 1: a change of more than half the range saturates, as it does on a screen.
    return max(0.5 / largest, 1.0) if largest > 0 else 1.0


def _change_tile(unit, factor):
    return np.clip(0.5 + factor * (unit[1] - unit[0]), 0, 1)


def _mask_tile(changed):
    return np.repeat(changed[..., None].astype(float), 3, axis=-1)


def _lines(prediction, row, class_names):
    label = int(prediction.labels[row])
    # A model may have more classes than the data set has names.
    known = class_names is not None and 0 <= label < len(class_names)
    lines = [str(class_names[label]) if known else str(label) if label >= 0 else "no class"]
    if prediction.confidences is not None and not np.isnan(prediction.confidences[row]):
        lines.append(f"{float(prediction.confidences[row]):.0%}")
    return lines


class _Page:
    """Places tiles and captions by inches, so that nothing can overlap or be cut off."""

    def __init__(self, matplotlib, headings, rows, size, width):
        self.matplotlib = matplotlib
        columns = len(headings)
        self.tile_width = (width - 2 * _MARGIN - _GAP * (columns - 1)) / columns
        self.tile_height = self.tile_width * size[0] / size[1]
        self.row_height = self.tile_height + 2 * _LINE + 2 * _GAP
        self.width, self.height = width, rows * self.row_height + 1.4 * _LINE
        self.figure = matplotlib.figure.Figure(figsize=(self.width, self.height))
        for column, heading in enumerate(headings):
            self._text(column, self.height - _LINE * 0.2, heading)

    def _left(self, column):
        return _MARGIN + column * (self.tile_width + _GAP)

    def _top(self, row):
        return self.height - 1.4 * _LINE - row * self.row_height

    def _text(self, column, top, words):
        shown, size = self._fit(words)
        baseline = top - 0.8 * FONT_SIZE / 72  # The same for shrunken words.
        self.figure.text(
            (self._left(column) + self.tile_width / 2) / self.width, baseline / self.height,
            shown, ha="center", va="baseline", fontsize=size, parse_math=False,
        )

    def _fit(self, words):
        """Shrink words that are wider than their tile, then cut them, with an ellipsis."""
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath

        def fits(shown, size):
            font = FontProperties(family="DejaVu Sans")
            plain = shown.replace("$", r"\$")  # between two of them TextPath reads mathematics
            return TextPath((0, 0), plain, size, prop=font).get_extents().width <= room

        room = self.tile_width * 72
        for size in (FONT_SIZE, (FONT_SIZE + _SMALLEST) / 2, _SMALLEST):
            if fits(words, size):
                return words, size
        cut = len(words) - 1
        while cut > 1 and not fits(words[:cut].rstrip() + "\u2026", size):
            cut -= 1
        return words[:cut].rstrip() + "\u2026", size

    def _axes(self, row, column):
        bottom = self._top(row) - self.tile_height
        axes = self.figure.add_axes((
            self._left(column) / self.width, bottom / self.height,
            self.tile_width / self.width, self.tile_height / self.height,
        ))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():  # A thin frame: white tiles would float on the paper.
            spine.set(visible=True, color="0.6", linewidth=0.4)
        return axes

    def tile(self, row, column, pixels):
        pixels = np.round(np.asarray(pixels) * 255).astype(np.uint8)
        self._axes(row, column).imshow(pixels, interpolation="nearest", aspect="auto")

    def heat_map(self, row, column, values, signed):
        values = np.nan_to_num(values)
        if signed:
            # Saliency maps have few very large values; a full scale would show nothing else.
            limit = np.quantile(np.abs(values), 0.995)
            limit = limit if limit > 0 else np.abs(values).max()
            name, low, high = "PuOr_r", -limit, limit
        else:
            name, low, high = "cividis", values.min(), values.max()
        span = high - low if high > low else 1.0
        colours = self.matplotlib.colormaps[name]((values - low) / span)[..., :3]
        self.tile(row, column, colours)

    def caption(self, row, column, lines):
        top = self._top(row) - self.tile_height - _GAP / 2
        for number, words in enumerate(lines[:2]):
            self._text(column, top - number * _LINE, words)
