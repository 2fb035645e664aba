"""Records -> numbers: per case, and over the targets of the targeted protocol.

Averages are over found adversarials only and never hold a failure; failures are counted beside
them. Success rates have both denominators in use. Quarantined images, which no attack has seen,
are in neither.

References:
    arXiv 2311.17434 (ASR, ACP, ANC, l2, d_{2,0}; best / average / worst over targets);
    Wilson, J. Am. Stat. Assoc. 22 (1927), the interval of a rate;
    Liang and Zeger, Biometrika 73 (1986), the error of a mean over clusters.
"""

import re
from typing import NamedTuple

import numpy as np

ATTACKED = ("found", "not_found", "non_finite")
STATUSES = (*ATTACKED, "already_misclassified", "quarantined")
_Z = 1.959964  # Of the normal distribution, for 95 %.
_TARGETED = re.compile(r"(?P<method>.+)/targeted(?P<target>.*)", re.DOTALL)


class Metric(NamedTuple):
    """Say how a number of the records is called.

    Attributes:
        key: field of the record.
        short: heading of a table column; its mean is the paper's metric of that name.
        long: in words.
        latex: heading in LaTeX.
    """

    key: str
    short: str
    long: str
    latex: str


SPARSITY = (
    Metric("changed_pixels", "ACP", "changed pixels", "ACP"),
    Metric("num_clusters", "ANC", "clusters of changed pixels", "ANC"),
    Metric("l2", "\u2113\u2082", "l2 norm, images in [-1, 1]", r"$\ell_2$"),
    Metric("patch_count", "d\u2082,\u2080", "patches that hold a changed pixel", r"$d_{2,0}$"),
)
COSTS = (
    Metric("gradient_evals", "gradients", "gradient evaluations", "grad.\\ evals"),
    Metric("forward_evals", "forwards", "forward evaluations", "fwd.\\ evals"),
)


class Spread(NamedTuple):
    """Hold mean, median and standard error of a sample; None where they do not exist.

    Attributes:
        mean: arithmetic mean.
        median: median.
        error: of the mean; sample standard deviation (n - 1) / sqrt(n), but targets of one image are one
            draw.
        count: n.
    """

    mean: float | None
    median: float | None
    error: float | None
    count: int


class Rate(NamedTuple):
    """Hold a success rate; None where nothing was counted.

    Attributes:
        share: hits / total.
        hits: successes.
        total: the denominator.
        low: lower end of the 95 % Wilson interval; targets of one image are one draw.
        high: upper end.
    """

    share: float | None
    hits: int
    total: int
    low: float | None
    high: float | None


class CaseSummary(NamedTuple):
    """Hold one row of the headline table.

    Attributes:
        run: name of the run.
        case: e.g. "gse/untargeted".
        counts: {status: images} for every status.
        asr_all: successes / all images that are not quarantined; counts images that the model
            misclassified from the start where the record says success.
        asr_attacked: found / attacked.
        spreads: {record field: `Spread`}; `SPARSITY` over found, `COSTS` over attacked images.
    """

    run: str
    case: str
    counts: dict
    asr_all: Rate
    asr_attacked: Rate
    spreads: dict


class TargetedSummary(NamedTuple):
    """Hold one row (best, average or worst target) of the targeted protocol.

    Attributes:
        run: name of the run.
        method: the cases' name before "/targeted".
        kind: "best", "average" or "worst".
        targets: how many targets were attacked per image.
        rate: successes of this kind / cases of this kind. Best and worst count images, average
            counts image-target pairs; worst succeeds where every target was reached.
        spreads: {record field: `Spread`}; each metric has its own best and worst target.
    """

    run: str
    method: str
    kind: str
    targets: int
    rate: Rate
    spreads: dict


def misses_of_gse(run):
    """Say that GSE found nothing for many images, which may be its preset and not the model.

    Args:
        run: object with `name` and `records`.

    Returns:
        List of sentences, one for each of "gse" and "gse_refined" that missed more than a tenth of what
        it attacked.
    """
    said = []
    for method in ("gse", "gse_refined"):
        status = [r["status"] for r in run.records if r["method"] == method]
        missed, attacked = status.count("not_found"), sum(s in ATTACKED for s in status)
        if missed > 0.1 * attacked:
            said.append(f"{run.name}: {method} found nothing for {missed:,} of {attacked:,}. That need not be "
                        "robustness: the paper's mu suits networks with steep gradients, and a smaller one "
                        "finds more on smooth ones (in a plan: hyperparams = {mu = 0.1, step_size = 0.1}).")
    return said


def by_case(records):
    """Group records by case, in the order in which the cases first come.

    Args:
        records: list of records.

    Returns:
        {case: list of records}.
    """
    groups = {}
    for record in records:
        groups.setdefault(record["case"], []).append(record)
    return groups


def is_targeted(case):
    """Tell a targeted case from an untargeted one by its name.

    Args:
        case: e.g. "gse/targeted+1".

    Returns:
        The part before "/targeted", or None.
    """
    match = _TARGETED.fullmatch(case)
    return match["method"] if match else None


def spread(values, images=None):
    """Describe a sample.

    Args:
        values: numbers; None among them is left out.
        images: which image each is of; None where all are different.

    Returns:
        `Spread`.

    References:
        arXiv 2311.17434.
    """
    values = list(values)
    images = range(len(values)) if images is None else images
    kept = [(v, image) for v, image in zip(values, images, strict=True) if v is not None]
    if not kept:
        return Spread(None, None, None, 0)
    values = np.asarray([v for v, _ in kept], np.float64)
    error = _error(values, [image for _, image in kept])
    return Spread(float(values.mean()), float(np.median(values)), error, len(kept))


def _error(values, images):
    """Standard error of a mean over clusters, one for each image (Liang and Zeger 1986)."""
    _, image = np.unique(images, return_inverse=True)
    sums = np.bincount(image, values - values.mean())
    m = sums.size
    return float(np.sqrt(m / (m - 1) * np.sum(sums * sums)) / values.size) if m > 1 else None


def rate(hits, total, draws=None):
    """Describe a success rate.

    Args:
        hits: successes.
        total: the denominator.
        draws: independent draws that the denominator is worth; None for all of it.

    Returns:
        `Rate`.

    References:
        Wilson (1927).
    """
    if total == 0:
        return Rate(None, 0, 0, None, None)
    draws = total if draws is None else draws
    share, weight = hits / total, _Z * _Z / draws
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * np.sqrt(share * (1 - share) / draws + weight / (4 * draws)) / (1 + weight)
    # At 0 and 1 the interval ends there exactly; rounding would leave 1e-17.
    return Rate(share, hits, total, 0.0 if hits == 0 else float(middle - half),
                1.0 if hits == total else float(middle + half))


def _draws(records):
    """How many independent images the image-target pairs tell as much as."""
    found = np.asarray([r["status"] == "found" for r in records], np.float64)
    images = [r["sample_id"] for r in records]
    share, error = (found.mean(), _error(found, images)) if len(found) else (0.0, None)
    if share in (0.0, 1.0) or error is None:  # all pairs agree: they tell no more than the images
        return len(set(images))
    return min(share * (1 - share) / max(error**2, 1e-30), len(records))


def summarise_cases(run):
    """Summarise every case of a run.

    Args:
        run: object with `name` and `records`.

    Returns:
        List of `CaseSummary`.

    Raises:
        ValueError: for a status that is none of `STATUSES`.

    References:
        arXiv 2311.17434.
    """
    rows = []
    for case, records in by_case(run.records).items():
        counts = {status: 0 for status in STATUSES}
        for record in records:
            if record["status"] not in counts:
                raise ValueError(f"record {record['sample_id']!r} has status {record['status']!r}, "
                                 f"expected one of {', '.join(STATUSES)}; update gse_jax")
            counts[record["status"]] += 1
        attacked = [r for r in records if r["status"] in ATTACKED]
        found = [r for r in records if r["status"] == "found"]
        seen = [r for r in records if r["status"] != "quarantined"]
        rows.append(CaseSummary(
            run.name, case, counts,
            rate(sum(bool(r["success"]) for r in seen), len(seen)),
            rate(len(found), len(attacked)),
            {m.key: spread(r[m.key] for r in found) for m in SPARSITY}
            | {m.key: spread(r[m.key] for r in attacked) for m in COSTS}))
    return rows


def summarise_targeted(run):
    """Summarise the targeted cases of a run over their targets: best, average, worst.

    Args:
        run: object with `name` and `records`.

    Returns:
        List of `TargetedSummary`, three per method with at least two targeted cases.

    References:
        arXiv 2311.17434, targeted protocol.
    """
    methods = {}
    for case, records in by_case(run.records).items():
        if (method := is_targeted(case)) is not None:
            methods.setdefault(method, []).append(records)
    rows = []
    for method, cases in methods.items():
        if len(cases) < 2:
            continue
        pairs = [r for records in cases for r in records if r["status"] in ATTACKED]
        images = {}
        for record in pairs:
            images.setdefault(record["sample_id"], []).append(record)
        reached = {sample: [r for r in group if r["status"] == "found"]
                   for sample, group in images.items()}
        any_found = [group for group in reached.values() if group]
        all_found = [group for sample, group in reached.items()
                     if len(group) == len(images[sample])]
        kinds = (("best", any_found, len(images), min, None),
                 ("average", [[r] for group in any_found for r in group], len(pairs), min, _draws(pairs)),
                 ("worst", all_found, len(images), max, None))
        for kind, groups, total, choose, draws in kinds:
            of = [group[0]["sample_id"] for group in groups]
            spreads = {m.key: spread((_chosen(choose, group, m.key) for group in groups), of)
                       for m in SPARSITY}
            rows.append(TargetedSummary(run.name, method, kind, len(cases),
                                        rate(len(groups), total, draws), spreads))
    return rows


def clean_accuracy(records):
    """Return the share of images that the model classified correctly before any attack.

    Args:
        records: of any number of cases; every image counts once.

    Returns:
        `Rate` over the images that are not quarantined.
    """
    images = {r["sample_id"]: r["label"] == r["clean_prediction"] for r in records
              if r["status"] != "quarantined"}
    return rate(sum(images.values()), len(images))


def _chosen(choose, group, key):
    values = [r[key] for r in group if r[key] is not None]
    return choose(values) if values else None
