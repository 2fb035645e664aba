"""The state dicts of torchvision, timm and RobustBench: every name and shape has its place."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gse_jax.models import registry, weights_file
from gse_jax.models.classifier import expected_params

# "library version model": {name: shape}, written by make_published_names.py.
PUBLISHED = json.loads((Path(__file__).parent / "published_names.json").read_text())


def model_of(key):
    return key.split()[2].replace("vit_base_patch16_224", "vit_b_16")


def known(key):
    """The tensors of a file, by the names under which they are looked up; free of memory."""
    return {plain: np.broadcast_to(np.float32(0), shape) for name, shape in PUBLISHED[key].items()
            if (plain := weights_file.plain_name(name)) is not None}


def configuration(key, tensors):
    model = registry._MODELS[model_of(key)]
    tensors = model.renamed(tensors)
    return model, tensors, model.config(tensors, key)


@pytest.mark.parametrize("key", PUBLISHED)
def test_names_and_shapes_are_covered_exactly(key):
    model, tensors, config = configuration(key, known(key))
    registry._check_tensors(tensors, model.module, config, key)  # Raises for any difference.
    expected = expected_params(model.module, config)
    assert len(jax.tree.leaves(expected)) == len(tensors)
    classes = 10 if "wide" in key else 1000
    assert config.num_classes == classes and config.num_channels == 3


@pytest.mark.parametrize("key", [
    pytest.param(key, marks=[pytest.mark.slow] if number > 3 else []) for number, key in enumerate(PUBLISHED)])
def test_a_missing_a_superfluous_and_a_cut_tensor_are_each_refused(key):
    _, tensors, _ = configuration(key, known(key))
    # A vector that no configuration is read from, so that the comparison itself must see it.
    name = next(n for n in reversed(tensors) if n.endswith("bias") and tensors[n].ndim == 1)
    model, _, config = configuration(key, known(key))
    cases = {rf"lacks {name}": {n: t for n, t in tensors.items() if n != name},
             r"has unknown layer9.bias": {**tensors, "layer9.bias": tensors[name]},
             rf"has {name} \(1,\) instead of": {**tensors, name: tensors[name][:1]}}
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=message):
            registry._check_tensors(changed, model.module, config, key)


@pytest.mark.parametrize("key", [k for k in PUBLISHED if "sub_block1" in k])
def test_robustbench_s_unused_stage_is_left_out(key):
    assert any(name.startswith("sub_block1.") for name in PUBLISHED[key])
    assert not any(name.startswith("sub_block1.") for name in configuration(key, known(key))[1])
