"""One attack on one model as a compiled program, cached so that later calls compile nothing."""

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import logging
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gse_jax.attacks import cuda
from gse_jax.attacks.algorithm import Algorithm, Bind, Sample
from gse_jax.attacks.lanes import Queue, drain, evaluate, first_lanes
from gse_jax.attacks.precision import multiplying
from gse_jax.types import ApplyFn

AXIS = "devices"
_LOGGER = logging.getLogger("gse_jax")


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about an attack; hashable, the key of the compilation cache.

    Attributes:
        apply_fn: (params, x) -> logits.
        bind: the method's `bind`.
        settings: the method's static configuration.
        targeted: direction.
        bounds: (low, high).
        rewrite_convolutions: see `convolutions.py`; on for CPU.
        precision: see `precision.py`.
    """

    apply_fn: ApplyFn
    bind: Bind
    settings: Any
    targeted: bool
    bounds: tuple[float, float]
    rewrite_convolutions: bool
    precision: str = "highest"

    def algorithm(self, hyperparams, key) -> Algorithm:
        """Bind the attack to its hyperparameters (possibly traced)."""
        return self.bind(self.settings, hyperparams, targeted=self.targeted, bounds=self.bounds,
                         key=key)

    def drain(self, params, hyperparams, key, lanes, queue, parked=None, *, capacity,
              max_iterations=None):
        """Run `lanes.drain` for this attack and model; see there."""
        algorithm = self.algorithm(hyperparams, key)

        def evaluate_fn(params, states, saved=None):
            with multiplying(self.precision):
                return evaluate(algorithm, functools.partial(self.apply_fn, params), states, saved)

        if self.rewrite_convolutions:
            # Here, because `jax.extend`, which it needs, takes a fourth of the time to import gse_jax.
            from gse_jax.attacks.convolutions import canonical_convolutions

            evaluate_fn = canonical_convolutions(evaluate_fn)
        return drain(algorithm, functools.partial(evaluate_fn, params), lanes, queue, parked,
                     capacity=capacity, max_iterations=max_iterations)


class _SameParts:
    """A model function that cannot be hashed, equal to another made of the very same parts."""

    def __init__(self, fn, leaves, tree):
        self._fn, self._leaves, self._tree = fn, leaves, tree

    def __call__(self, params, x):
        return self._fn(params, x)

    def __eq__(self, other):
        return (isinstance(other, _SameParts) and self._tree == other._tree
                and all(a is b for a, b in zip(self._leaves, other._leaves, strict=True)))

    def __hash__(self):
        return hash(tuple(map(id, self._leaves)))


class _Once:
    """A model function for one call of an attack: the next may find it changed. Equal to itself alone."""

    def __init__(self, fn):
        self._fn = fn
        self.built = {}  # what `remembered` built for it, which goes with it

    def __call__(self, params, x):
        return self._fn(params, x)


def hashable(apply_fn):
    """Return a hashable version of a model function, so that compiled programs can be reused.

    Args:
        apply_fn: (params, x) -> logits.

    Returns:
        `apply_fn` itself where it can be hashed. A pytree of JAX arrays, such as an Equinox module,
        compiles once as long as these are the same arrays. Others, and functions that name or hold an NNX
        module, compile anew in each call, because they may have been changed in between.
    """
    try:
        hash(apply_fn)
        if not _holds_nnx(apply_fn):
            return apply_fn
        _tell_of_nnx()
        return _Once(apply_fn)
    except TypeError:
        leaves, tree = jax.tree.flatten(apply_fn)
        if any(leaf is apply_fn or isinstance(leaf, np.ndarray) for leaf in leaves):
            return _Once(apply_fn)
        return _SameParts(apply_fn, leaves, tree)


@functools.cache
def _tell_of_nnx():
    """Say once why each call takes so long."""
    _LOGGER.warning("the model function holds a Flax NNX module, whose weights may change, so every call compiles "
                    "anew; apply_fn, params = gse_jax.models.from_nnx(module) compiles once")


_MANY = 1000  # a list of layers is shorter, one of images need not be looked through
_DEEP = 6  # steps from a function to a module: a helper of a helper that holds a trainer that holds it
_LIBRARIES = ("builtins", "jax", "jaxlib", "flax", "gse_jax", "numpy", "optax", "chex")  # they hold no model


def _holds_nnx(fn) -> bool:
    """Tell whether a function is, names or holds an NNX module, whose weights can change."""
    nnx = sys.modules.get("flax.nnx")
    seen = {}  # how many steps were left

    def holds(one, depth):
        if issubclass(type(one), nnx.Module):
            return True
        if seen.get(id(one), 0) >= depth:
            return False
        seen[id(one)] = depth
        try:
            parts = _parts(one)
        except Exception:  # a proxy of something that is not there does not even tell its class
            return False
        return any(holds(part, depth - 1) for part in parts)

    return nnx is not None and holds(fn, _DEEP)


def _parts(one) -> list:
    """What a function names, closes over or is bound to, or an object holds."""
    if isinstance(one, (type, types.ModuleType)):
        return []
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, (list, tuple, dict)):
        return list(itertools.islice(one.values() if isinstance(one, dict) else one, _MANY))
    if inspect.ismethod(one):
        return [one.__func__, one.__self__]
    parts = list(getattr(one, "__dict__", {}).values())
    if inspect.isfunction(one):
        if _of_library(one):
            return []
        parts += _globals(one.__code__, one.__globals__) + list(one.__defaults__ or ())
        parts += list((one.__kwdefaults__ or {}).values())
        for cell in one.__closure__ or ():
            with contextlib.suppress(ValueError):  # empty
                parts.append(cell.cell_contents)
        return parts
    for kind in type(one).__mro__:
        if not _of_library(kind):
            parts += [_attribute(one, name) for name in vars(kind).get("__slots__", ())]
            parts += [part for name, part in vars(kind).items()
                      if name == "__call__" or not inspect.isroutine(part)]
    return parts


def _attribute(one, name):
    try:
        return getattr(one, name)
    except Exception:  # a lazy module may raise anything
        return None


def _of_library(one) -> bool:
    return (getattr(one, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _globals(code, scope) -> list:
    """What a function reads of its module, and of modules that it names; those inside it do too."""
    found, module = [], None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            found.append(scope.get(step.argval))
        elif module is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.append(_attribute(module, step.argval))
        else:
            module = None
            continue
        module = found[-1] if isinstance(found[-1], types.ModuleType) else None
    for part in code.co_consts:
        found += _globals(part, scope) if inspect.iscode(part) else []
    return found


_MODELS, _PROGRAMS = 8, 256  # kept: those used last, and of each all methods in some configurations


def remembered(build):
    """Cache what a function builds for a program; for a model that is for one call only, with that model."""

    @functools.lru_cache(maxsize=_MODELS)
    def of_model(apply_fn):
        del apply_fn
        return functools.lru_cache(maxsize=_PROGRAMS)(build)

    @functools.wraps(build)
    def get(program, *rest):
        if not isinstance(program.apply_fn, _Once):
            return of_model(program.apply_fn)(program, *rest)
        built, key = program.apply_fn.built, (build, program, rest)
        if key not in built:
            built[key] = build(program, *rest)
        return built[key]

    return get


def compiled(jitted, apply_fn, **static):
    """Give a jitted function its model and other static arguments.

    Args:
        jitted: of `jax.jit`, with a static argument `apply_fn`.
        apply_fn: as from `hashable`.
        static: the other static arguments.

    Returns:
        A function of the arguments that are left. What is compiled for a model that is for one call only
        goes with it.
    """
    if isinstance(apply_fn, _Once):
        return jax.jit(functools.partial(jitted.__wrapped__, apply_fn=apply_fn, **static))
    return functools.partial(jitted, apply_fn=apply_fn, **static)


@remembered
def on_mesh(program: Program, mesh: jax.sharding.Mesh, capacity: int):
    """Compile `program` for lanes and queues spread over a mesh.

    There are no collectives in it: every device drains its own queue and stops by itself.

    Args:
        program: what to run.
        mesh: one axis, `AXIS`.
        capacity: places for outcomes per device.

    Returns:
        (params, hyperparams, key, lanes, queue, parked, max_iterations) -> (lanes, `begin` of the
        queue, `begin` of what is parked, finished, model_calls, progress [L]); lanes, queue, parked
        and results are split over devices along axis 0, the rest is replicated. `lanes` is donated.
    """

    def local(params, hyperparams, key, lanes, queue, parked, max_iterations):
        lanes, queue, parked, finished, calls = program.drain(
            params, hyperparams, key, lanes, queue, parked, capacity=capacity,
            max_iterations=max_iterations)
        progress = program.algorithm(hyperparams, key).progress
        progress = (jnp.zeros(lanes.sample_id.shape) if progress is None
                    else jax.vmap(progress)(lanes.attack))
        return lanes, queue.begin, parked.begin, finished, calls, progress

    # jit inside: constants of the model would else become arguments of the map, and with one that has
    # no elements (such as the index of `.at[2:4]`) JAX 0.11 dies while it compiles for two devices.
    # check_vma=False: the caller's model may hold scans whose initial carry does not vary.
    spread = jax.shard_map(jax.jit(local), mesh=mesh, in_specs=(P(), P(), P(), P(AXIS), P(AXIS), P(AXIS), P()),
                           out_specs=P(AXIS), check_vma=False)
    # Without out_shardings XLA calls arrays of no elements replicated, and the next call, whose
    # input is this output, would compile everything once more.
    def jitted(options=None):
        return jax.jit(spread, donate_argnums=3, out_shardings=NamedSharding(mesh, P(AXIS)),
                       compiler_options=options)

    return cuda.Tuned(jitted, donated=3) if cuda.is_cuda(mesh.devices.flat[0]) else jitted()


@remembered
def filled_on_mesh(program: Program, mesh: jax.sharding.Mesh, num_lanes: int):
    """Compile `first_lanes` for queues spread over a mesh.

    Args:
        program: what will run.
        mesh: one axis, `AXIS`.
        num_lanes: lanes per device.

    Returns:
        (hyperparams, key, queue) -> (lanes, `begin` of the queue).
    """

    def fill(hyperparams, key, queue):
        lanes, queue = first_lanes(program.algorithm(hyperparams, key), queue, num_lanes)
        return lanes, queue.begin

    return jax.jit(jax.shard_map(fill, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(AXIS),
                                 check_vma=False), out_shardings=NamedSharding(mesh, P(AXIS)))


@remembered
def in_graph(program: Program, num_lanes: int):
    """Compile `program` as one function of all images, for use under the caller's transformations.

    Args:
        program: what to run.
        num_lanes: lanes.

    Returns:
        (params, hyperparams, key, samples) -> Outcome with leading axis N, in order of the samples.
    """
    def run(params, hyperparams, key, samples: Sample):
        count = samples.sample_id.shape[0]
        queue = Queue(samples, jnp.zeros(1, jnp.int32), jnp.full(1, count, jnp.int32))
        lanes, queue = first_lanes(program.algorithm(hyperparams, key), queue, num_lanes)
        _, _, _, finished, _ = program.drain(params, hyperparams, key, lanes, queue, capacity=count)
        return jax.tree.map(lambda a: a.at[finished.sample_id].set(a), finished.outcome)

    return jax.jit(run)


def make_mesh(devices) -> jax.sharding.Mesh:
    """Return a one-axis mesh over `devices`.

    Args:
        devices: list of jax devices.

    Returns:
        Mesh with axis `AXIS`.
    """
    # Auto axes: with Explicit ones, inputs that are not yet placed are refused. Not `jax.make_mesh`,
    # which arranges devices for communication and refuses three of a TPU's four.
    return jax.sharding.Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def split(mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is split over the mesh."""
    return NamedSharding(mesh, P(AXIS))


def replicate(mesh) -> NamedSharding:
    """Return the sharding of arrays that every device of the mesh holds whole."""
    return NamedSharding(mesh, P())


def under(mesh):
    """Set our mesh in place of the caller's, if there is one; JAX refuses to under eager `jax.grad`."""
    return contextlib.nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(mesh)
