"""Records -> one self-contained HTML page.

Nothing is loaded from elsewhere (a content security policy in the page forbids it), every text of
the records is escaped, and the same runs give the same bytes.
"""

import json
from pathlib import Path
from typing import NamedTuple

from gse_jax.report import gallery
from gse_jax.report.files import write_whole
from gse_jax.report.summary import (
    ATTACKED,
    COSTS,
    SPARSITY,
    by_case,
    clean_accuracy,
    is_targeted,
    misses_of_gse,
    summarise_cases,
    summarise_targeted,
)
from gse_jax.report.tables import require_runs, show_error, show_number, show_share

_TEMPLATES = Path(__file__).parent / "templates"
_SEVERITIES = ("error", "warning", "info")
_DETAILS = ("plan", "cases", "fingerprint", "versions", "machine", "verification")
_SHOWN_ELSEWHERE = ("findings", "class_names", *_DETAILS)
_MOST_ITEMS = 20  # Of a list in the run details.
_MOST_TROUBLES = 200  # Rows of the quarantine list; the tables hold all.


class _Detail(NamedTuple):
    """A row of the run details: one value per run."""

    key: str
    values: list
    differs: bool


def write_page(runs, path, *, num_images=None):
    """Write the report of one or several runs, side by side, as one HTML file.

    Args:
        runs: list of objects with `name`, `manifest` (dict), `records` (list of dicts) and
            `images(record)`, which returns (clean [H, W, C], adversarial [H, W, C]), or None or
            ValueError where there are none. `warnings`, a list of sentences, is optional.
        path: of the file; missing folders are made.
        num_images: about how many images the gallery shows over all runs and cases; 0 for none.
            None: 48, or 18 where images are larger than 64 pixels.

    Returns:
        The path.

    Raises:
        ValueError: if there is no run, two have one name, or a record has an unknown status.
        OSError: if the file cannot be written.

    References:
        arXiv 2311.17434.
    """
    import jinja2  # when needed

    require_runs(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": show_number, "error": show_error, "share": show_share}
    text = environment.get_template("page.html").render(_context(runs, num_images))
    return write_whole(path, text.encode())


def _context(runs, num_images):
    cards, available = gallery.make_cards(runs, num_images)
    troubles = [(run.name, r) for run in runs for r in run.records
                if r["status"] in ("quarantined", "non_finite")]
    return {
        "title": ", ".join(run.name for run in runs),
        "several": len(runs) > 1,
        "glances": [_glance(run) for run in runs],
        "metrics": SPARSITY,
        "costs": COSTS,
        "cases": [row for run in runs for row in summarise_cases(run)],
        "targeted": [row for run in runs for row in summarise_targeted(run)],
        "curves": _curves(runs),
        "distributions": _distributions(runs),
        "cards": cards,
        "available": available,
        "rule": gallery.RULE,
        "filters": _filters(cards),
        "troubles": troubles[:_MOST_TROUBLES],
        "num_troubles": len(troubles),
        "findings": [finding for run in runs for finding in _findings(run)],
        "sections": _details(runs),
        "remarks": _remarks(runs),
    }


def _glance(run):
    findings = [finding["severity"] for finding in run.manifest.get("findings", ())]
    return {
        "name": run.name,
        "created": run.manifest.get("created"),
        "images": len({r["sample_id"] for r in run.records}),
        "accuracy": clean_accuracy(run.records),
        "errors": findings.count("error"),
        "warnings": findings.count("warning"),
        "verified": _verified(run.manifest.get("verification")),
    }


def _verified(verification):
    """Return (class, words) for what a fresh forward pass said of the stored images."""
    if verification is None:
        return "warning", "\u25b2 not yet"
    if verification.get("ok") is False:
        return "error", f"\u2716 {verification.get('num_problems', 'with')} problems"
    return "ok", "\u2714 confirmed" if verification.get("ok") else "\u2714 recorded"


def _label(runs, run, words):
    return f"{run.name} \u00b7 {words}" if len(runs) > 1 else words


def _curves(runs):
    from gse_jax.report import charts

    groups = []
    for run in runs:
        pooled = {}
        for case, records in by_case(run.records).items():
            method = is_targeted(case)
            pooled.setdefault(case if method is None else (method,), []).append((case, records))
        for key, cases in pooled.items():
            # Nine targets would be nine lines per run: they are one curve over all pairs.
            words = cases[0][0] if len(cases) == 1 else f"{key[0]}/targeted, {len(cases)} targets"
            groups.append((_label(runs, run, words), [r for _, rs in cases for r in rs]))
    drawn = []
    for field, words in (("changed_pixels", "changed pixels"), ("patch_count", "patches")):
        series = [charts.Series(name, i, charts.success_curve(records, field))
                  for i, (name, records) in enumerate(groups)]
        chart = charts.curve_chart(series, f"at most k {words}")
        if chart is None:
            continue
        budgets = charts.budgets(max(s.values[0][-1] for s in series if len(s.values[0])))
        rows = [(s.name, [_rate_at(s.values, k) for k in budgets]) for s in series]
        drawn.append({"words": words, "chart": chart, "budgets": budgets, "rows": rows})
    legend = [(name, i % charts.NUM_STYLES, charts.dashes(i),
               sum(r["status"] in ATTACKED for r in records))
              for i, (name, records) in enumerate(groups)]
    return {"drawn": drawn, "legend": legend}


def _rate_at(curve, budget):
    within = [rate for cost, rate in zip(*curve, strict=True) if cost <= budget]
    return float(within[-1]) if within else 0.0


def _distributions(runs):
    from gse_jax.report import charts

    drawn = []
    for metric in (*SPARSITY, COSTS[0]):
        wanted = ATTACKED if metric in COSTS else ("found",)
        series = []
        for number, run in enumerate(runs):
            for i, (case, records) in enumerate(by_case(run.records).items()):
                values = [r[metric.key] for r in records
                          if r["status"] in wanted and r[metric.key] is not None]
                # One colour per run when runs are compared, else one per case.
                series.append(charts.Series(_label(runs, run, case),
                                            number if len(runs) > 1 else i, values))
        if (chart := charts.distribution_chart(series, metric.long)) is not None:
            drawn.append(chart)
    return drawn


def _filters(cards):
    """Return (name, its values in order) for each filter of the gallery that has a choice."""
    filters = [(name, list(dict.fromkeys(getattr(card, name) for card in cards)))
               for name in ("run", "case", "status")]
    return [(name, values) for name, values in filters if len(values) > 1]


def _findings(run):
    found = sorted(run.manifest.get("findings", ()),
                   key=lambda finding: _SEVERITIES.index(finding["severity"]))
    return [{"run": run.name, **finding} for finding in found]


def _details(runs):
    """Flatten what the manifests say, side by side, and mark what differs."""
    flat = [{key: value for section in _DETAILS
             for key, value in _flatten(run.manifest.get(section), section).items()}
            | {key: leaf for name, value in run.manifest.items() if name not in _SHOWN_ELSEWHERE
               for key, leaf in _flatten(value, name).items()} for run in runs]
    sections = []
    for section in ("run", *_DETAILS):
        keys = dict.fromkeys(key for values in flat for key in values
                             if _section(key) == section)
        rows = []
        for key in keys:
            values = [one.get(key) for one in flat]
            shown = key.removeprefix(f"{section}.")
            rows.append(_Detail(shown, values, len(set(values)) > 1))
        if rows:
            sections.append((section, rows, any(row.differs for row in rows)))
    return sections


def _section(key):
    first = key.split(".")[0]
    return first if first in _DETAILS else "run"


def _flatten(value, prefix):
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(item.get("name") or number): item for number, item in enumerate(value)}
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items()
                for key, leaf in _flatten(inner, f"{prefix}.{name}").items()}
    if value is None:  # A missing section is no row; a missing value inside one is.
        return {prefix: "none"} if "." in prefix else {}
    if isinstance(value, list) and len(value) > _MOST_ITEMS:
        return {prefix: f"{json.dumps(value[:_MOST_ITEMS])} and {len(value) - _MOST_ITEMS} more"}
    return {prefix: value if isinstance(value, str) else json.dumps(value)}


def _remarks(runs):
    """Say in words what limits the comparison or the trust in the numbers."""
    remarks = [f"{run.name}: {line}" for run in runs for line in getattr(run, "warnings", ())]
    for run in runs:
        if run.manifest.get("verification") is None:
            remarks.append(f"{run.name}: the stored adversarial images have not been checked by a "
                           "fresh forward pass; run gse-jax verify.")
        remarks += misses_of_gse(run)
    cases = [{case: {r["sample_id"] for r in records}
              for case, records in by_case(run.records).items()} for run in runs]
    for run, these in zip(runs[1:], cases[1:], strict=True):
        data = [r.manifest.get("fingerprint", {}).get("data") for r in (runs[0], run)]
        everyone = [set().union(*c.values()) for c in (cases[0], these)]
        if data[0] != data[1]:
            remarks.append(f"{runs[0].name} and {run.name} are of different data, so the rows are not like "
                           "for like.")
        elif not cases[0].keys() & these.keys() and (apart := len(everyone[0] ^ everyone[1])):
            remarks.append(f"{runs[0].name} and {run.name} cover different images: {apart} are in one of "
                           "them only, so the rows are not like for like.")
        for case in (case for case in cases[0] if case in these):
            if apart := len(cases[0][case] ^ these[case]):
                remarks.append(f"{runs[0].name} and {run.name} cover different images in {case}: "
                               f"{apart} images are in one of them only, so the rows are not like "
                               "for like.")
    for run, these in zip(runs, cases, strict=True):
        everything = set().union(*these.values())
        for case, samples in these.items():
            if samples != everything:
                remarks.append(f"{run.name}: {case} has {len(samples)} of the {len(everything)} "
                               "images; the run is not finished.")
    return remarks
