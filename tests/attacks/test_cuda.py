"""Compiler options for NVIDIA GPUs: which are asked for, and that an attack survives those that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks import cuda
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroSettings
from gse_jax.attacks.precision import multiplying
from tests.toy_model import toy

BOTH = cuda.GRAPHS | cuda.NCHW


def traced(model, precision="highest", dtype=jnp.float32):
    """What an attack on this model computes, at least its part that matters here."""
    def gradient(kernel, x):
        with multiplying(precision):
            return jax.grad(lambda x: model(kernel, x).sum())(x)

    return jax.make_jaxpr(gradient)(jnp.ones((3, 3, 3, 3), dtype), jnp.ones((2, 8, 8, 3), dtype))


def convolving(kernel, x, **options):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                        **options)


def in_a_loop(kernel, x):
    return jax.lax.fori_loop(0, 2, lambda _, x: jax.jit(convolving)(kernel, x), x)


def in_bfloat16(kernel, x):
    return convolving(kernel.astype(jnp.bfloat16), x.astype(jnp.bfloat16))


def partly_coarse(kernel, x):
    return convolving(kernel, convolving(kernel, x, precision=jax.lax.Precision.DEFAULT))


@pytest.mark.parametrize("model", [convolving, in_a_loop, jax.checkpoint(convolving)])
def test_float32_convolutions_go_into_graphs_and_nchw(model):
    assert cuda.choices(traced(model)) == [BOTH, cuda.NCHW, cuda.GRAPHS, {}]


@pytest.mark.parametrize("jaxpr", [
    lambda: traced(convolving, "tf32"), lambda: traced(convolving, "bf16"), lambda: traced(in_bfloat16),
    lambda: traced(partly_coarse), lambda: traced(convolving, dtype=jnp.float64),
    lambda: traced(lambda kernel, x: x**2)])
def test_others_keep_the_layout_that_xla_chooses(jaxpr):
    assert cuda.choices(jaxpr()) == [cuda.GRAPHS, {}]


def test_the_user_decides_what_is_in_xla_flags(monkeypatch):
    jaxpr = traced(convolving)
    for flag, left in (("xla_gpu_enable_command_buffer=", [cuda.NCHW, {}]),
                       ("xla_gpu_force_conv_nhwc=true", [cuda.GRAPHS, {}])):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false --{flag}")
        assert cuda.choices(jaxpr) == left


def test_every_dtype_has_options_of_its_own():
    options_of = {}

    def jitted(options):
        run = jax.jit(lambda kernel, x: convolving(kernel, x, precision=jax.lax.Precision.HIGHEST),
                      compiler_options=options)
        options_of[run] = options
        return run

    tuned = cuda.Tuned(jitted, donated=1)
    for dtype in (np.float32, np.float64, np.float32):
        assert tuned(np.ones((3, 3, 3, 3), dtype), np.ones((2, 8, 8, 3), dtype)).dtype == dtype
    assert [options_of[run] for run in tuned._chosen.values()] == [BOTH, cuda.GRAPHS]


def attack():
    params, apply_fn, x, y = toy()
    # A model of its own: nothing is compiled yet.
    return gse_jax.attack(params, lambda params, x: apply_fn(params, x), x, y, bounds=(-1.0, 1.0), lanes=4,
                          method="sigma_zero", settings=SigmaZeroSettings(max_steps=5))


@pytest.fixture(scope="module")
def plain():
    return attack()


UNKNOWN = {"xla_gpu_no_such_option": True}


@pytest.mark.parametrize("graphs, nchw, fault, expected", [
    (cuda.GRAPHS, cuda.NCHW, None, BOTH),
    (cuda.GRAPHS, cuda.NCHW, "INTERNAL: not captured", cuda.NCHW),
    (cuda.GRAPHS, UNKNOWN, None, cuda.GRAPHS),
    pytest.param({"xla_gpu_enable_command_buffer": "NO_SUCH_KIND"}, UNKNOWN, None, {}, marks=pytest.mark.slow),
    pytest.param(cuda.GRAPHS, cuda.NCHW, "RESOURCE_EXHAUSTED: no room", {}, marks=pytest.mark.slow),
])
def test_an_attack_takes_the_fastest_options_that_work(monkeypatch, plain, graphs, nchw, fault, expected):
    """A CPU takes the options and does nothing with them; unknown ones fail when they are compiled."""
    made = []

    class Noted(cuda.Tuned):
        def __init__(self, jitted, donated):
            def faulty(options=None):
                def failing(*arguments):
                    run(*arguments)  # which takes the donated lanes
                    raise jax.errors.JaxRuntimeError(fault)

                run = jitted(options)
                faults = fault and "xla_gpu_enable_command_buffer" in (options or {})
                made.append((self, options, failing if faults else run))
                return made[-1][-1]

            super().__init__(faulty, donated)

    monkeypatch.setattr(cuda, "Tuned", Noted)
    monkeypatch.setattr(cuda, "is_cuda", lambda device: True)
    monkeypatch.setattr(cuda, "GRAPHS", graphs)
    monkeypatch.setattr(cuda, "NCHW", nchw)
    monkeypatch.setattr(cuda, "_convolves_in_float32", lambda jaxpr: True)  # the toy's are of float64
    result = attack()
    assert made
    for tuned in {run for run, *_ in made}:
        chosen = [options for one, options, run in made if one is tuned and run in tuned._chosen.values()]
        assert chosen == [expected]
    np.testing.assert_array_equal(result.gradient_evals, plain.gradient_evals)
    np.testing.assert_array_equal(result.status, plain.status)
    np.testing.assert_allclose(result.adversarials, plain.adversarials, atol=1e-9)


def test_no_room_for_the_copy_of_what_is_donated(monkeypatch):
    tuned = cuda.Tuned(lambda options: jax.jit(lambda x: x + 1, compiler_options=options), donated=0)
    monkeypatch.setattr(cuda, "choices", lambda jaxpr: [cuda.GRAPHS, {}])
    copies = []

    def full(array):
        copies.append(array)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(cuda.jnp, "copy", full)
    for _ in range(2):
        np.testing.assert_array_equal(tuned(np.zeros(3)), 1)
    assert len(copies) == 1  # what was chosen without room stays
