"""The public surface: names, light import, registry signature."""

import inspect
import json
import subprocess
import sys

import gse_jax

PUBLIC = [
    "AttackResult", "GSEHyperparams", "GSESettings", "Status", "attack", "attack_stream", "data",
    "differentiable", "differentiable_attack", "evaluation", "implicit_attack", "metrics", "models",
    "ops", "pareto", "preset", "refine", "report", "use_all_cpu_cores", "use_compilation_cache",
]


def test_public_names_are_the_frozen_list():
    assert gse_jax.__all__ == PUBLIC and len(PUBLIC) <= 25
    assert all(hasattr(gse_jax, name) for name in PUBLIC)


def test_attack_keeps_its_signature():
    parameters = inspect.signature(gse_jax.attack).parameters
    assert list(parameters) == ["params", "apply_fn", "x", "y", "targets", "method", "settings",
                                "hyperparams", "bounds", "key", "lanes", "precision",
                                "progress"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[4:])


def test_result_fields():
    fields = [f.name for f in gse_jax.AttackResult.__dataclass_fields__.values()]
    assert fields == ["adversarials", "success", "status", "gradient_evals", "forward_evals",
                      "tradeoff", "method", "preset"]
    assert {s.name: s.value for s in gse_jax.Status} == {
        "FOUND": 0, "NOT_FOUND": 1, "ALREADY_MISCLASSIFIED": 2, "NON_FINITE": 3}
    assert all(len(s.message) > 20 for s in gse_jax.Status)


def test_import_is_light_and_starts_no_device():
    code = ("import sys, json, gse_jax; from jax._src import xla_bridge as b; "
            "print(json.dumps([sorted(sys.modules), bool(b._backends)]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, started = json.loads(out.stdout)
    heavy = {"tensorflow", "tensorflow_datasets", "torch", "matplotlib", "sklearn", "skimage",
             "flax", "optax", "scipy.ndimage", "rich", "PIL", "ray", "jinja2"}
    assert not heavy & set(modules)
    assert not any(name.startswith("gse_jax.attacks.baselines.") for name in modules)
    assert not started


def test_unknown_attribute_is_an_attribute_error():
    try:
        gse_jax.nonsense
    except AttributeError as error:
        assert "nonsense" in str(error)
    else:
        raise AssertionError("accepted")
