r"""Records -> CSV, Markdown and LaTeX tables.

The LaTeX tables need `\usepackage{booktabs}`.

References:
    arXiv 2311.17434 (the columns).
"""

import csv
import io
import math
import re
from pathlib import Path

from gse_jax.report.files import write_whole
from gse_jax.report.summary import (
    COSTS,
    SPARSITY,
    STATUSES,
    summarise_cases,
    summarise_targeted,
)

_FIELDS = ("sample_id", "index", "case", "method", "label", "target", "clean_prediction", "status",
           "success", "prediction", "confidence_before", "confidence_after", "gradient_evals",
           "forward_evals", "tradeoff", "changed_pixels", "num_clusters", "l2", "linf",
           "patch_count", "reason")
_SYMBOLS = {"l2": r"$\ell_2$", "d_{2,0}": r"$d_{2,0}$"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
          **{c: "\\" + c for c in "&%$#_{}"}, "<": r"\textless{}", ">": r"\textgreater{}"}


def write_tables(runs, folder):
    """Write the tables of one or several runs, side by side.

    `summary.csv`, `.md` and `.tex`: one row per run and case. `targeted.*`: best, average and worst
    over the targets, where a run has at least two targeted cases. `images.csv`: every record. The
    CSV files hold full precision; the others mean +- standard error.

    Args:
        runs: list of objects with `name`, `manifest` and `records`, at least one.
        folder: missing folders are made, files overwritten.

    Returns:
        List of the written paths.

    Raises:
        ValueError: if there is no run, or two of one name.
        OSError: if a file cannot be written.

    References:
        arXiv 2311.17434.
    """
    require_runs(runs)
    folder = Path(folder)
    cases = [row for run in runs for row in summarise_cases(run)]
    targeted = [row for run in runs for row in summarise_targeted(run)]
    content = {"summary.csv": _csv(_case_columns(cases)),
               "summary.md": _markdown(_case_cells(cases)),
               "summary.tex": _latex(_case_cells(cases, latex=True), left=2)}
    if targeted:
        content |= {"targeted.csv": _csv(_targeted_columns(targeted)),
                    "targeted.md": _markdown(_targeted_cells(targeted)),
                    "targeted.tex": _latex(_targeted_cells(targeted, latex=True), left=4)}
    else:  # those of other runs that were reported here
        for suffix in ("csv", "md", "tex"):
            (folder / f"targeted.{suffix}").unlink(missing_ok=True)
    content["images.csv"] = _csv([
        {"run": run.name, **{field: record.get(field) for field in _FIELDS}}
        for run in runs for record in run.records])
    return [write_whole(folder / name, text.encode()) for name, text in content.items()]


def write_table(rows, path_stem, *, left=1):
    """Write one table as CSV, Markdown and LaTeX.

    Args:
        rows: list of dictionaries with the same keys, the column headings; numbers, text or None.
        path_stem: path without a suffix; ".csv", ".md" and ".tex" are appended.
        left: number of columns of words at the left.

    Returns:
        List of the three paths. The CSV file holds full precision.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("rows: there is no row to write")
    body = [[cell if isinstance(cell, str) else (show_rate if head.startswith("ASR") else
                                                 show_number)(cell) for head, cell in row.items()]
            for row in rows]
    cells = (list(rows[0]), body)
    texts = {".csv": _csv(rows), ".md": _markdown(cells),
             ".tex": _latex(([_SYMBOLS.get(head) or _escape_latex(head) for head in cells[0]], body), left)}
    return [write_whole(f"{path_stem}{suffix}", text.encode()) for suffix, text in texts.items()]


def require_runs(runs):
    """Refuse what cannot be told apart in a table.

    Args:
        runs: list of objects with `name`.

    Raises:
        ValueError: if there is no run, or two of one name.
    """
    if not runs:
        raise ValueError("runs: got none, expected at least one run to report")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"runs: two are named {name!r}, expected different names; "
                             "rename one of them")


def show_number(value):
    """Write a number for people: a count whole, else four digits at most; thousands apart.

    Args:
        value: number or None.

    Returns:
        str; an en dash for None.
    """
    if value is None:
        return "\u2013"
    if isinstance(value, int):  # a count
        return f"{value:,}"
    return f"{value:,.{_decimals(value)}f}"


def show_error(error, mean):
    """Write a standard error with the decimals of its mean, or as many as its first digit needs.

    Args:
        error: number, or None.
        mean: number that it belongs to.

    Returns:
        str; an en dash for None.
    """
    if error is None:
        return show_number(error)
    decimals = _decimals(mean)
    return f"{error:,.{decimals if error == 0 or round(error, decimals) else _decimals(error)}f}"


def _decimals(value):
    size = abs(value)
    if size >= 0.0095 or not size > 0:
        return 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.0995 or size == 0 else 3
    return 1 - math.floor(math.log10(size))  # two digits of what is small


def show_rate(rate):
    """Write a rate between 0 and 1; only a whole one is 1.000, and only none is 0.000.

    Args:
        rate: in [0, 1], or None.

    Returns:
        str, three decimals; an en dash for None.
    """
    return "\u2013" if rate is None else f"{_not_rounded_away(rate):.3f}"


def _not_rounded_away(share):
    return share if share in (0, 1) or share != share else min(max(share, 0.001), 0.999)


def show_share(share):
    """Write a rate in percent.

    Args:
        share: in [0, 1], or None.

    Returns:
        str, e.g. "97.5 %"; an en dash for None. Only a whole one is 100.0 %.
    """
    return "\u2013" if share is None else f"{100 * _not_rounded_away(share):.1f} %"


def _case_columns(rows):
    return [{"run": row.run, "case": row.case, "images": sum(row.counts.values()),
             **{status: row.counts[status] for status in STATUSES},
             **_rate_columns("asr_all", row.asr_all), **_rate_columns("asr_attacked",
                                                                      row.asr_attacked),
             **_spread_columns(row.spreads, (*SPARSITY, *COSTS))} for row in rows]


def _targeted_columns(rows):
    return [{"run": row.run, "method": row.method, "targets": row.targets, "kind": row.kind,
             "cases": row.rate.total, "failures": row.rate.total - row.rate.hits,
             **_rate_columns("success_rate", row.rate), **_spread_columns(row.spreads, SPARSITY)}
            for row in rows]


def _rate_columns(name, rate):
    return {name: rate.share, f"{name}_low95": rate.low, f"{name}_high95": rate.high}


def _spread_columns(spreads, metrics):
    return {f"{m.key}_{name}": getattr(spreads[m.key], field) for m in metrics
            for name, field in (("mean", "mean"), ("median", "median"), ("stderr", "error"))}


def _case_cells(rows, latex=False):
    metrics = (*SPARSITY, *COSTS)
    heads = ["run", "case", "images", "attacked", "found", "ASR (all)", "ASR (attacked)",
             *(m.latex if latex else m.short for m in metrics)]
    body = [[row.run, row.case, str(sum(row.counts.values())), str(row.asr_attacked.total),
             str(row.asr_attacked.hits), show_share(row.asr_all.share),
             show_share(row.asr_attacked.share), *_spread_cells(row.spreads, metrics)]
            for row in rows]
    return heads, body


def _targeted_cells(rows, latex=False):
    heads = ["run", "method", "targets", "over targets", "success", "failures",
             *(m.latex if latex else m.short for m in SPARSITY)]
    body = [[row.run, row.method, str(row.targets), row.kind, show_share(row.rate.share),
             f"{row.rate.total - row.rate.hits} of {row.rate.total}",
             *_spread_cells(row.spreads, SPARSITY)] for row in rows]
    return heads, body


def _spread_cells(spreads, metrics):
    return [show_number(s.mean) if s.error is None
            else f"{show_number(s.mean)} \u00b1 {show_error(s.error, s.mean)}"
            for s in (spreads[m.key] for m in metrics)]


def _csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(cells):
    heads, body = cells
    rule = ["---"] * 2 + ["---:"] * (len(heads) - 2)
    rows = [heads, rule, *([_escape_markdown(cell) for cell in row] for row in body)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _escape_markdown(cell):
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(cell.split()))


def _latex(cells, left):
    heads, body = cells
    lines = [r"% Sparsity and norms are means over found adversarials; needs \usepackage{booktabs}.",
             rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(heads) - left)}}}", r"\toprule",
             " & ".join(heads) + r" \\", r"\midrule",
             *(" & ".join(_escape_latex(cell) for cell in row) + r" \\" for row in body),
             r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _escape_latex(cell):
    text = "".join(_LATEX.get(c, c) for c in " ".join(cell.split()))
    return text.replace("\u2013", "--").replace("\u00b1", r"$\pm$")
