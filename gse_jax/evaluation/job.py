"""A plan made concrete: model, samples, cases, and the fingerprint of all three."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from gse_jax.attacks import METHODS, validation
from gse_jax.devices import local_devices
from gse_jax.evaluation.attacker import Model, unusable
from gse_jax.evaluation.cases import Group, resolve
from gse_jax.evaluation.checks import Finding, check
from gse_jax.evaluation.fingerprint import fingerprint, versions
from gse_jax.evaluation.plan import Plan
from gse_jax.evaluation.sources import Reader, as_source, digest_of
from gse_jax.evaluation.store import FORMAT_VERSION

# Images for the pre-flight checks, spread over the data: enough to tell accuracy from chance.
_PREFLIGHT_IMAGES = 256


class Job(NamedTuple):
    """Everything about a run except where it is stored and who works on it.

    Attributes:
        plan: the plan.
        model: the model.
        reader: the samples.
        groups: the attacks with their cases.
        fingerprint: what the results depend on.
    """

    plan: Plan
    model: Model
    reader: Reader
    groups: tuple[Group, ...]
    fingerprint: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """N of the data source."""
        return len(self.reader.source.ids)


def set_up(plan: Plan, model=None, data=None) -> Job:
    """Load and check what a plan names; nothing is attacked.

    Args:
        plan: the plan.
        model: (apply_fn, params) as from `gse_jax.models.load`; None loads the plan's.
        data: a `Dataset` or `ImageSource`; None loads the plan's.

    Returns:
        Job.

    Raises:
        ValueError, TypeError, FileNotFoundError: in one line, for anything that cannot be run.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}; read a file with load_plan")
    bounds = validation.check_bounds(plan.bounds)
    validation.check_count("lanes", plan.lanes, 1)
    apply_fn, params = load_model(plan, model)
    source = as_source(_load_data(plan)) if data is None else as_source(data, plan.limit)
    reader = Reader(source, bounds)
    height, width, channels = reader.image_shape
    shape, dtype = (height, width, channels), reader.dtype
    num_classes, _ = validation.check_model(params, apply_fn, shape, dtype)
    ids = [str(name) for name in reader.source.ids]
    groups = resolve(plan, shape, num_classes, ids)
    for case in (case for group in groups for case in group.cases):
        missing = next((i for i in ids if case.targets is not None and i not in case.targets), None)
        if missing is not None:
            raise ValueError(f"plan: target_file names no target for sample {missing!r}")
    values = fingerprint(params=params, apply_fn=apply_fn, data=digest_of(reader),
                         num_samples=len(ids), image_shape=shape, dtype=dtype, bounds=bounds,
                         seed=plan.seed, groups=groups)
    model = Model(params, apply_fn, shape, np.dtype(dtype), bounds, num_classes)
    # As it will be read back from the manifest: tuples become lists.
    return Job(plan, model, reader, groups, json.loads(json.dumps(values)))


def load_model(plan: Plan, model=None):
    """Return the model of a plan, or the one given.

    Args:
        plan: the plan.
        model: (apply_fn, params) or None.

    Returns:
        (apply_fn, params).

    Raises:
        ValueError: if there is none.
        TypeError: if `model` is not such a pair.
    """
    if model is None:
        if not plan.model:
            raise ValueError("plan: model is empty; name one of gse_jax.models.names(), or pass "
                             "model=(apply_fn, params)")
        from gse_jax import models  # Flax takes a second to import; many plans bring a model.

        return models.load(plan.model, weights=plan.weights, normalize=plan.normalize)
    if not isinstance(model, tuple) or len(model) != 2 or not callable(model[0]):
        raise TypeError(f"model must be (apply_fn, params), as from gse_jax.models.load, "
                        f"got {type(model).__name__}")
    return model


def _load_data(plan: Plan):
    if not plan.data:
        raise ValueError("plan: data is empty; name a source such as 'digits' or 'npz:FILE', or "
                         "pass data=")
    from gse_jax import data

    return data.open_source(plan.data, limit=plan.limit, data_dir=plan.data_dir or None)


def preflight(job: Job, num_images: int = _PREFLIGHT_IMAGES) -> list[Any]:
    """Run the pre-flight checks on some images spread over the data.

    Args:
        job: the job.
        num_images: how many at most.

    Returns:
        List of `checks.Finding`.

    Raises:
        ValueError: if not one of these images can be used.
    """
    chosen = np.unique(np.linspace(0, job.num_samples - 1, num_images).astype(int))
    samples, set_aside = [], []
    for sample in job.reader.read_all(chosen):
        reason = unusable(sample, None, job.model.num_classes)
        if reason is None:
            samples.append(sample)
        else:
            set_aside.append((sample.sample_id, reason))
    if not samples:
        raise ValueError(f"data: none of {len(set_aside)} images can be used: {set_aside[0][1]}")
    images = np.stack([np.asarray(s.x) for s in samples])
    found = check(job.model.params, job.model.apply_fn, images,
                  np.asarray([s.label for s in samples], np.int32), bounds=job.model.bounds,
                  expected_accuracy=job.plan.expected_accuracy, needs_gradient=any(map(_needs_gradient, job.groups)))
    if set_aside:
        name, reason = set_aside[0]
        fix = "Name one size for all, as folder:PATH,size=224" if "has shape" in reason else "Repair them"
        found.append(Finding("unusable images", "error" if 2 * len(set_aside) > len(chosen) else "warning",
                             f"{len(set_aside)} of {len(chosen)} images cannot be used; the first is "
                             f"{name!r}: {reason}.", f"{fix}; else they are set aside as quarantined."))
    return found


def _needs_gradient(group: Group) -> bool:
    algorithm = METHODS[group.method].bind(group.settings, group.hyperparams, targeted=group.targeted,
                                           bounds=(0.0, 1.0), key=None)
    return not algorithm.gradient_free


def manifest_of(job: Job, findings, created: str) -> dict[str, Any]:
    """Return the content of manifest.json.

    Args:
        job: the job.
        findings: of `preflight`.
        created: time stamp.

    Returns:
        JSON values.
    """
    devices = local_devices()
    cases = [{"name": case.name, **group.describe(), "offset": case.offset or None}
             for group in job.groups for case in group.cases]
    return {
        "format_version": FORMAT_VERSION,
        "created": created,
        "plan": job.plan.to_dict(),
        "fingerprint": job.fingerprint,
        "versions": versions(),
        "machine": {"platform": devices[0].platform, "device_kind": devices[0].device_kind,
                    "devices": len(devices), "processes": jax.process_count()},
        "cases": cases,
        "num_samples": job.num_samples,
        "num_classes": job.model.num_classes,
        "image_shape": list(job.model.image_shape),
        "dtype": str(job.model.dtype),
        "bounds": list(job.model.bounds),
        "class_names": list(getattr(job.reader.source, "class_names", ())),
        "findings": [finding._asdict() for finding in findings],
    }
