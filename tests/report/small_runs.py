"""Made-up runs whose numbers are known by hand, for the tests of tables and page."""

import numpy as np

SIDE = 8


class SmallRun:
    """What `write_page` and `write_tables` take."""

    def __init__(self, name, records, manifest=None, images=True):
        self.name, self.records, self._images = name, records, images
        self.manifest = {
            "format": 1, "created": "2026-01-02T03:04:05Z", "bounds": [-1.0, 1.0],
            "class_names": ["cat", "dog", "owl"], "plan": {"data": "made up", "limit": None},
            "fingerprint": {"weights": name}, "versions": {"jax": "0.10.2"}, "machine": {},
            "findings": [{"name": "accuracy", "severity": "info", "message": "Clean accuracy is "
                          "80.0%.", "fix": ""}], **(manifest or {})}

    def images(self, record):
        if not self._images or record["array"] is None:
            return None
        clean = np.full((SIDE, SIDE, 3), 0.25, np.float32)
        adversarial = clean.copy()
        adversarial.reshape(-1, 3)[:record["changed_pixels"] or 0] = -1.0
        return clean, adversarial


def record(index, case="gse/untargeted", status="found", pixels=None, **fields):
    """One record; `pixels` also fixes the other numbers, so that they are easy to check."""
    found = status == "found"
    pixels = pixels if found else None
    label, targeted = index % 3, "targeted" in case.split("/")[-1] and "un" not in case
    target = (label + 1) % 3 if targeted else None
    return {
        "sample_id": f"s{index}", "index": index, "case": case, "method": case.split("/")[0],
        "label": label, "target": target,
        "clean_prediction": (label + 1) % 3 if status == "already_misclassified" else label,
        "status": status, "success": found or (status == "already_misclassified" and not targeted),
        "prediction": None if status == "quarantined" else (label + 1) % 3,
        "confidence_before": 0.9996, "confidence_after": None if status == "quarantined" else 0.5,
        "gradient_evals": 10 * index, "forward_evals": 10 * index + 1, "tradeoff": 0.5,
        "changed_pixels": pixels, "num_clusters": 1 if found else None,
        "l2": pixels / 10 if found else None, "linf": 0.5 if found else None,
        "patch_count": 2 * pixels if found else None,
        "reason": "the file is empty" if status == "quarantined" else None,
        "array": ["a.npz", index] if found else None, **fields}


def untargeted():
    """Five attacked (three found: 2, 4 and 12 pixels), one misclassified, one quarantined."""
    return [record(0, pixels=2), record(1, pixels=4), record(2, pixels=12),
            record(3, status="not_found"), record(4, status="non_finite"),
            record(5, status="already_misclassified"), record(6, status="quarantined")]


def targeted():
    """Three images, two targets: one reached by both, one by one, one by none."""
    rows = {"+1": [5, 9, None], "+2": [3, None, None]}
    return [record(i, f"gse/targeted{k}", "found" if p else "not_found", p)
            for k, pixels in rows.items() for i, p in enumerate(pixels)]


def run(name="first", **arguments):
    return SmallRun(name, untargeted() + targeted(), **arguments)
