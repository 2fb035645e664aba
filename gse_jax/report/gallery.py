"""Records -> cards of the image gallery: which images are shown, and what stands below them."""

from typing import NamedTuple

import numpy as np

from gse_jax.report.summary import by_case
from gse_jax.report.tables import show_number
from gse_jax.report.tiles import changed_places, overlay_tile, png_data_uri, to_unit

RULE = ("Of every run and case, the adversarial images at evenly spaced ranks by number of changed "
        "pixels, from the sparsest to the densest, so neither the best nor the worst are picked by "
        "hand; of every other status the first by index.")
_SMALL_SIDE = 64  # Pixels.
_SMALL_LIMIT, _LARGE_LIMIT = 48, 18  # Cards; large images take about 100 kB per tile.
_OTHERS = ("not_found", "non_finite", "already_misclassified")


class Card(NamedTuple):
    """Hold one image of the gallery.

    Attributes:
        run: name of the run.
        case: of the record.
        status: of the record.
        sample_id: of the record.
        tiles: list of (caption, description, data URI).
        lines: list of (term, text).
    """

    run: str
    case: str
    status: str
    sample_id: str
    tiles: list
    lines: list


def make_cards(runs, limit=None):
    """Choose images by `RULE` and draw them.

    Args:
        runs: list of objects with `name`, `manifest`, `records` and `images(record)`.
        limit: about how many cards over all runs and cases, >= 0; at least one per case that has
            any. None: 48, or 18 where images are larger than 64 pixels.

    Returns:
        (list of `Card`, number of records that could have been shown).
    """
    groups = [(run, records) for run in runs for records in by_case(run.records).values()]
    available = sum(r["status"] != "quarantined" for _, records in groups for r in records)
    if limit is None:
        limit = _SMALL_LIMIT if _largest_side(groups) <= _SMALL_SIDE else _LARGE_LIMIT
    if limit == 0 or not groups:
        return [], available
    quota = max(limit // len(groups), 1)
    cards, shown = [], set()
    for run, records in groups:
        for record in choose_records(records, quota):
            image = run.name, record["sample_id"]
            card = _card(run, record)
            # A misclassified image is the same one in every case of a run: once is enough.
            if record["status"] == "already_misclassified" and (image in shown or not card.tiles):
                continue
            shown.add(image)
            cards.append(card)
    return cards, available


def choose_records(records, quota):
    """Choose the records of one case by `RULE`.

    Args:
        records: of one case.
        quota: how many, >= 1.

    Returns:
        List of records: other statuses take at most a quarter of the quota, rounded up each.
    """
    found = sorted((r for r in records if r["status"] == "found"),
                   key=lambda r: (r["changed_pixels"] or 0, r["index"], r["sample_id"]))
    others = []
    for status in _OTHERS:
        those = sorted((r for r in records if r["status"] == status), key=lambda r: r["index"])
        others += those[:max(quota // 8, 1) if found else quota]
    others = others[:max(quota // 4, 1) if found else quota]
    left = min(max(quota - len(others), 1), len(found))
    # One place goes to the middle, not to the sparsest.
    ranks = np.linspace(0, len(found) - 1, left) if left != 1 else [(len(found) - 1) / 2]
    ranks = np.round(ranks).astype(int)
    return [found[i] for i in ranks] + others


def _largest_side(groups):
    for run, records in groups:
        for record in records:
            if record["status"] == "found" and (pair := _images(run, record)) is not None:
                return max(pair[0].shape[:2])
    return 0


def _images(run, record):
    try:
        return run.images(record)
    except (OSError, ValueError, KeyError, IndexError):  # A damaged file must not cost the page.
        return None


def _card(run, record):
    names = run.manifest.get("class_names")
    pair = _images(run, record)
    tiles = []
    if pair is not None:
        bounds = run.manifest.get("bounds", (0.0, 1.0))
        clean, adversarial = (np.asarray(image) for image in pair)
        unit, changed = to_unit(clean, bounds), changed_places(clean, adversarial)
        pictures = [("original", "clean image", unit)]
        if changed.any():
            pictures += [
                ("adversarial", "adversarial image", to_unit(adversarial, bounds)),
                ("changed", f"the {int(changed.sum())} changed pixels in red",
                 overlay_tile(unit, changed))]
        tiles = [(caption, f"{record['sample_id']}: {what}", png_data_uri(tile))
                 for caption, what, tile in pictures]
    return Card(run.name, record["case"], record["status"], record["sample_id"], tiles,
                _lines(record, names))


def _lines(record, names):
    lines = [("label", class_name(record["label"], names))]
    if record["target"] is not None:
        lines.append(("target", class_name(record["target"], names)))
    lines.append(("before", _said(record["clean_prediction"], record["confidence_before"], names)))
    if record["prediction"] is not None and record["status"] != "already_misclassified":
        lines.append(("after", _said(record["prediction"], record["confidence_after"], names)))
    if record["status"] == "found":
        lines.append(("change", f"{record['changed_pixels']} px in {record['num_clusters']} "
                                f"cluster{'' if record['num_clusters'] == 1 else 's'}, "
                                f"\u2113\u2082 {show_number(record['l2'])}"))
    if record["reason"]:
        lines.append(("reason", record["reason"]))
    return lines


def class_name(label, names):
    """Name a class.

    Args:
        label: int or None; negative where unknown.
        names: sequence of names, or None.

    Returns:
        str: the name, or the number where there is none.
    """
    if label is None or label < 0:
        return "unknown"
    return str(names[label]) if names and label < len(names) else str(label)


def _said(label, confidence, names):
    said = class_name(label, names)
    if confidence is None or not np.isfinite(confidence):
        return said
    # Rounding 99.97 % to 100 % would hide that the model is not certain.
    percent = "100" if confidence >= 1 else f"{min(100 * confidence, 99.9):.1f}"
    return f"{said} ({percent} %)"
