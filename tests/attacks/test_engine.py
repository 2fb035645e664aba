"""The lane engine: what must not change a result."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status, devices
from gse_jax.attacks import METHODS, api, attack_stream, packing, runner
from gse_jax.attacks.algorithm import Algorithm, Outcome, Sample
from gse_jax.attacks.baselines.projected_gradient_descent import PGDHyperparams, PGDSettings
from gse_jax.attacks.baselines.structured_attack import StrAttackSettings
from gse_jax.attacks.gse import GSE, GSESettings
from gse_jax.attacks.gse.algorithm import _judged
from gse_jax.attacks.lanes import LanesState, Parked, Queue, drain, evaluate, first_lanes, idle_lanes
from gse_jax.attacks.loops import checkpointed_scan, python_loop, while_loop
from gse_jax.attacks.program import Program
from tests.toy_model import failing_at, golden, linear_logits, toy

# Short runs; images still end after different numbers of evaluations.
SETTINGS = GSESettings(num_runs=6, max_steps=40, phase1_steps=20)
ATTACK = functools.partial(gse_jax.attack, settings=SETTINGS, bounds=(-1.0, 1.0))


def same(a, b, atol=1e-9):
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_array_equal(a.success, b.success)
    np.testing.assert_array_equal(a.gradient_evals, b.gradient_evals)
    np.testing.assert_allclose(a.adversarials, b.adversarials, atol=atol)
    np.testing.assert_allclose(a.tradeoff, b.tradeoff, rtol=1e-9)


@pytest.fixture(scope="module")
def expected():
    params, apply_fn, x, y = toy()
    result = ATTACK(params, apply_fn, x, y, lanes=1)
    assert len(np.unique(result.gradient_evals)) >= 4  # they finish at different times
    assert np.asarray(result.success).any()
    return result


# In this session there are four devices: 1, 3, 6 and 16 lanes run on 1, 3, 4 and 4 of them.
@pytest.mark.parametrize("lanes", [6, None, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 16))])
def test_lanes_and_devices_do_not_matter(expected, lanes):
    params, apply_fn, x, y = toy()
    same(ATTACK(params, apply_fn, x, y, lanes=lanes), expected)


@pytest.mark.slow
def test_order_does_not_matter(expected):
    params, apply_fn, x, y = toy()
    order = jnp.asarray([3, 0, 5, 1, 4, 2])
    result = ATTACK(params, apply_fn, x[order], y[order], lanes=2)
    same(result, jax.tree.map(lambda a: a[order], expected))


@pytest.mark.slow
def test_a_long_queue_equals_single_images(expected):
    """Refill, repeated dealing and the narrow lanes of the tail, over 4 devices."""
    params, apply_fn, x, y = toy()
    repeat, widths = 40, set()

    def seen(params, images):
        widths.add(len(images))
        return apply_fn(params, images)

    result = ATTACK(params, seen, jnp.tile(x, (repeat, 1, 1, 1)), jnp.tile(y, repeat), lanes=64)
    assert {16, 8} <= widths  # the tail is worked in fewer lanes
    same(result, jax.tree.map(lambda a: jnp.tile(a, (repeat,) + (1,) * (a.ndim - 1)), expected))


@pytest.mark.parametrize("repeat,widths", [
    pytest.param(16, {16, 4, 1}, marks=pytest.mark.slow), (8, {4, 1})])
def test_as_an_accelerator_would(expected, monkeypatch, repeat, widths):
    """An accelerator's widths, its parking and the shorter copy of its outcomes, on 4 CPU devices."""
    params, apply_fn, x, y = toy()
    seen = set()

    def noted(params, images):
        seen.add(len(images))
        return apply_fn(params, images)

    monkeypatch.setattr(runner, "_platform", lambda devices: "gpu")
    monkeypatch.setattr(runner, "default_lanes_per_device", lambda *_: 16)
    result = ATTACK(params, noted, jnp.tile(x, (repeat, 1, 1, 1)), jnp.tile(y, repeat))
    same(result, jax.tree.map(lambda a: jnp.tile(a, (repeat,) + (1,) * (a.ndim - 1)), expected))
    assert seen >= widths and max(seen) == max(widths)


def test_an_error_does_not_take_the_last_stretch_with_it(monkeypatch):
    """An accelerator's outcomes are copied while it works on; they come out before its error does."""
    params, apply_fn, x, y = toy()
    monkeypatch.setattr(runner, "_platform", lambda devices: "gpu")
    monkeypatch.setattr(runner, "on_mesh", failing_at(runner.on_mesh, 3, RuntimeError("lost the device")))
    monkeypatch.setattr(runner, "_CALLS", 4)
    done = []
    with pytest.raises(RuntimeError, match="lost the device"):
        ATTACK(params, apply_fn, jnp.tile(x, (8, 1, 1, 1)), jnp.tile(y, 8), lanes=4,
               progress=lambda progress: done.append(progress.lane_evals))
    assert len(done) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("begun", [True, False])
def test_nor_does_who_ends_it_from_outside(monkeypatch, error, begun):
    """A stretch comes once the devices are at work on the next, or before the error that kept them from it."""
    monkeypatch.setattr(runner, "_stretch", lambda number: number)
    told = []

    def work():
        for number in (1, 2):
            told.append("begun")
            yield None
            told.append("over")
            yield [number]
        if begun:
            yield None
        raise error

    stretches, seen = runner._stretches(work()), []
    with pytest.raises(error):
        for number in stretches:
            seen.append((number, len(told)))
    assert seen == [(1, 3), (2, 4)] and told == ["begun", "over"] * 2
    stretches = runner._stretches(work())  # whoever stops reading is not given another
    assert next(stretches) == 1
    stretches.close()


def test_who_looks_at_a_stretch_keeps_no_device_waiting(monkeypatch):
    """Each but the last is told of when the next has begun, and before anyone waits for that one."""
    params, apply_fn, x, y = toy()
    events = []

    def noted(*arguments, on_mesh=runner.on_mesh, **options):
        run = on_mesh(*arguments, **options)

        def call(*values):
            events.append("begun")
            return run(*values)

        return call

    def waited(arrays, device_get=jax.device_get):
        events.append("waited")
        return device_get(arrays)

    monkeypatch.setattr(runner, "on_mesh", noted)
    monkeypatch.setattr(runner.jax, "device_get", waited)
    monkeypatch.setattr(packing.Tail, "pack", lambda self, state, occupied, *_: (state, occupied.shape[1]))
    monkeypatch.setattr(runner, "_CALLS", 4)
    ATTACK(params, apply_fn, jnp.tile(x, (2, 1, 1, 1)), jnp.tile(y, 2), lanes=4,
           progress=lambda _: events.append("told"))
    stretches = events.count("begun")
    assert stretches > 2
    assert events == ["begun", "waited", *["begun", "told", "waited"] * (stretches - 1), "told"]


def test_parked_images_take_turns_on_a_cpu(monkeypatch):
    """Else one with most of its work ahead might wait until all lanes are free."""
    params, apply_fn, x, y = toy()
    moves = []

    def noted(self, state, places, moved=packing.Tail._moved):
        moves.append(places.swaps)
        return moved(self, state, places)

    monkeypatch.setattr(packing.Tail, "_moved", noted)
    monkeypatch.setattr(runner, "_CALLS", 4)
    swaps = {}
    for calls in (4, 10**9):
        monkeypatch.setattr(packing, "_CALLS_OF_A_TURN", calls)
        moves.clear()
        ATTACK(params, apply_fn, jnp.tile(x, (4, 1, 1, 1)), jnp.tile(y, 4))
        swaps[calls] = sum(moves)
    assert swaps[4] > swaps[10**9]


@pytest.mark.slow
def test_the_tail_works_images_in_early_runs_first(monkeypatch):
    """Whatever the order, results stay (above); a long image that waits would make the tail longer."""
    params, apply_fn, x, y = toy()
    seen = []

    def ahead(lanes):
        there = lanes.sample_id >= 0
        runs, steps = lanes.attack.search.run[there], lanes.attack.iterate.step[there]
        return np.asarray(runs) * (SETTINGS.max_steps + 1) + np.asarray(steps)

    def noted(self, state, places, moved=packing.Tail._moved):
        lanes, parked = moved(self, state, places)
        seen.append((ahead(lanes), ahead(parked)))
        return lanes, parked

    monkeypatch.setattr(packing.Tail, "_moved", noted)
    ATTACK(params, apply_fn, jnp.tile(x, (16, 1, 1, 1)), jnp.tile(y, 16))
    mixed = [both for both in seen if all(map(len, both)) and np.ptp(np.concatenate(both))]
    assert mixed and all(inside.max() <= waiting.min() for inside, waiting in mixed)


def test_the_first_images_of_a_queue_enter_lanes_and_padding_does_not():
    _, _, x, y = toy()
    samples = Sample(x, y, jnp.full(6, -1, jnp.int32), jnp.arange(6, dtype=jnp.int32))
    for begin, end, ids in ((1, 3, [1, 2, -1, -1]), (0, 6, [0, 1, 2, 3]), (4, 4, [-1] * 4)):
        lanes, queue = first_lanes(bound("gse", SETTINGS),
                                   Queue(samples, *(jnp.asarray([n], jnp.int32) for n in (begin, end))), 4)
        assert lanes.sample_id.tolist() == ids and queue.begin.tolist() == [min(begin + 4, end)]
        taken = len([i for i in ids if i >= 0])
        np.testing.assert_array_equal(lanes.attack.sample.x[:taken], x[begin:begin + taken])


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [1, 3])
def test_parked_images_follow_those_of_the_queue(expected, num_lanes):
    """Stopped half-way, parked, and taken up behind new images, in order: the same outcomes."""
    params, apply_fn, x, y = toy()
    algorithm = bound("gse", SETTINGS)
    evaluate_fn = functools.partial(evaluate, algorithm, functools.partial(apply_fn, params))
    samples = Sample(x, y, jnp.full(6, -1, jnp.int32), jnp.arange(6, dtype=jnp.int32))
    zero = jnp.zeros(1, jnp.int32)

    @jax.jit
    def compiled(lanes, queue, parked, calls):
        return drain(algorithm, evaluate_fn, lanes, queue, parked, capacity=12, max_iterations=calls)

    def run(lanes, begin, parked, calls, samples=samples):
        queue = Queue(samples, zero + begin, zero + len(samples.x))
        return compiled(lanes, queue, parked, 10**6 if calls is None else calls)

    one = jax.tree.map(lambda a: a[0], samples)
    halfway, queue, _, done, _ = run(idle_lanes(algorithm, one, 4), 0, None, 3)
    assert int(queue.begin[0]) == 4 and int(done.count[0]) == 0
    idle = idle_lanes(algorithm, one, num_lanes)
    _, queue, parked, done, _ = run(idle, 4, Parked(halfway, zero, zero + 4), None)
    assert int(queue.begin[0]) == 6 and int(parked.begin[0]) == 4 and int(done.count[0]) == 6
    order = jnp.argsort(done.sample_id[:6])
    same(jax.tree.map(lambda a: a[order], done.outcome), expected)
    # Two lanes fall free at once, for one new image and one that is parked.
    twice = jax.tree.map(lambda a: a[jnp.asarray([4, 4, 5])], samples)
    _, _, _, done, _ = run(idle_lanes(algorithm, one, 2), 0, Parked(halfway, zero + 2, zero + 3), None, twice)
    order = jnp.argsort(done.sample_id[:4])
    assert done.sample_id[order].tolist() == [2, 4, 4, 5]
    same(jax.tree.map(lambda a: a[order], done.outcome),
         jax.tree.map(lambda a: a[jnp.asarray([2, 4, 4, 5])], expected))
    lanes, queue, parked, done, _ = run(idle, 4, Parked(halfway, zero + 1, zero + 3), 1)
    assert set(lanes.sample_id.tolist()) <= {4, 5, 1} and int(parked.begin[0]) == (2 if num_lanes == 3 else 1)


def test_the_schedule_equals_a_plain_one():
    """An attack that needs as many calls as the label says: who is worked on, stored and left, and in which order.

    Where outcomes might find no place, it stops before.
    """
    algorithm = Algorithm(
        init=lambda sample: (sample, jnp.int32(0)), query=lambda state: state[0].x,
        loss=lambda state, logits: logits.sum(), step=lambda state, evaluation: (state[0], state[1] + 1),
        done=lambda state: state[1] >= state[0].y, finish=lambda state: state[1], gradient_free=True)
    evaluate_fn = functools.partial(evaluate, algorithm, lambda images: images.reshape(len(images), -1))
    compiled = jax.jit(lambda lanes, queue, parked, calls, capacity: drain(
        algorithm, evaluate_fn, lanes, queue, parked, capacity=capacity, max_iterations=calls), static_argnums=4)
    num_lanes, num_queue, num_parked = 3, 6, 4
    seen = set()

    def samples(ids, lengths):
        return Sample(np.zeros((len(ids), 1, 1, 1)), np.int32(lengths), np.int32(ids), np.int32(ids))

    for seed in range(40):
        random = np.random.default_rng(seed)
        ids, lengths = np.arange(13), random.integers(1, 7, 13)
        done_before = (random.random(13) * lengths).astype(np.int32)  # of those in lanes and parked
        occupied = random.random(num_lanes) < (0.7 if seed % 4 else 0.0)
        (first, last), (begin, end) = (np.sort(random.integers(0, n + 1, 2)) for n in (num_queue, num_parked))
        first, begin = (last, begin) if seed % 8 == 0 else (first, end if seed % 8 == 4 else begin)
        calls, capacity = int(random.choice([1, 3, 100])), int(random.choice([num_lanes, 6, 20]))
        lanes = LanesState((samples(ids[:3], lengths[:3]), done_before[:3]),
                           np.where(occupied, ids[:3], -1).astype(np.int32))
        parked = LanesState((samples(ids[9:], lengths[9:]), done_before[9:]), np.int32(ids[9:]))
        got, queue, rest, finished, made = jax.device_get(compiled(
            lanes, Queue(samples(ids[3:9], lengths[3:9]), np.int32([first]), np.int32([last])),
            Parked(parked, np.int32([begin]), np.int32([end])), np.int32(calls), capacity))
        # The same with lists.
        at_work = [[i, done_before[i]] if occupied[i] else None for i in range(num_lanes)]
        waiting = [[3 + i, 0] for i in range(first, last)] + [[9 + i, done_before[9 + i]] for i in range(begin, end)]
        stored, number = [], 0
        while (number < calls and (waiting or any(at_work))
               and len(stored) + sum(map(bool, at_work)) <= capacity):
            number += 1
            for lane, image in enumerate(at_work):
                if image and image[1] + 1 == lengths[image[0]]:
                    stored.append(image[0])
                at_work[lane] = image and ([image[0], image[1] + 1] if image[1] + 1 < lengths[image[0]] else None)
            at_work = [image or (waiting.pop(0) if waiting else None) for image in at_work]
        assert finished.sample_id[:finished.count[0]].tolist() == stored and made.tolist() == [number]
        assert (finished.sample_id[finished.count[0]:] == -1).all()
        assert finished.outcome[:finished.count[0]].tolist() == lengths[stored].tolist()
        assert got.sample_id.tolist() == [image[0] if image else -1 for image in at_work]
        there = got.sample_id >= 0
        assert got.attack[1][there].tolist() == [image[1] for image in at_work if image]
        assert got.attack[0].y[there].tolist() == lengths[got.sample_id[there]].tolist()
        fresh = sum(image[0] < 9 for image in waiting)
        assert (int(queue.begin[0]), int(rest.begin[0])) == (last - fresh, end - (len(waiting) - fresh))
        seen.add((fresh > 0, len(waiting) > fresh, any(at_work)))
    assert len(seen) >= 4


@pytest.mark.slow
def test_no_outcome_is_lost_where_a_narrow_tail_finishes_many_parked_images():
    """Images that all need one call more, when many lanes narrow to eight: more are done than a stretch has room for."""
    params, apply_fn, x, y = toy()
    x, y = (jnp.repeat(a, 200, axis=0) for a in (x[:1], y[:1]))
    y = y.at[::8].set((y[0] + 1) % 3)  # adversarial at once, so that the others narrow
    steps = runner._calls("cpu", x.shape[1:], 200)
    with jax.default_device(jax.devices()[0]):
        result = gse_jax.attack(
            params, apply_fn, x, y, method="pgd", bounds=(-1.0, 1.0), lanes=200,
            settings=PGDSettings(max_steps=steps, random_start=False), hyperparams=PGDHyperparams(1e-6, 1e-7))
    np.testing.assert_array_equal(result.gradient_evals, np.where(np.arange(200) % 8, steps + 1, 1))
    np.testing.assert_allclose(result.adversarials, x, atol=1e-5)


def counting(settings, hyperparams, *, targeted, bounds, key):
    """An attack that needs as many calls as the label says, and tells how many it made."""
    def finish(state):
        empty = jnp.zeros((), jnp.int32)
        return Outcome(**dict.fromkeys(Outcome._fields, empty) | {"gradient_evals": state[1]})

    return Algorithm(
        init=lambda sample: (sample, jnp.int32(0)), query=lambda state: state[0].x,
        loss=lambda state, logits: logits.sum(), step=lambda state, evaluation: (state[0], state[1] + 1),
        done=lambda state: state[1] >= state[0].y, finish=finish, gradient_free=True,
        progress=(lambda state: state[1].astype(float)) if settings else None)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("num_devices", [1, 3])
def test_every_image_comes_back_once_after_its_own_calls(monkeypatch, platform, num_devices):
    """Any number of images, batches and lanes, short and long images: through queues, narrow lanes and parking."""
    monkeypatch.setattr(runner, "_platform", lambda devices: platform)
    monkeypatch.setattr(runner, "local_devices", lambda: jax.devices()[:num_devices])
    if platform == "gpu":
        monkeypatch.setattr(runner, "default_lanes_per_device", lambda *_: 16)
    random = np.random.default_rng(num_devices)
    for number in range(14):
        count = int(random.integers(100, 700))
        lanes = [None, count, int(random.integers(1, count + 1))][number % 3]
        look = runner._calls(platform, (1, 1, 1), -(-(lanes or 1) // num_devices))
        lengths = [random.geometric(0.03, count),
                   np.where(random.random(count) < 0.1, 1, look + 1),  # all but done when the host first looks
                   np.where(random.random(count) < 0.1, 1, 3 + 4 * random.integers(0, 9, count)),
                   np.where(random.random(count) < 0.03, 300, random.integers(1, 20, count))][number % 4]
        ids = np.arange(count, dtype=np.int32)
        samples = Sample(np.zeros((count, 1, 1, 1), np.float32), lengths.astype(np.int32), -np.ones_like(ids), ids)
        cut = [0, *np.sort(random.integers(0, count + 1, 2)).tolist(), count]
        batches = [jax.tree.map(lambda a: a[i:j], samples) for i, j in zip(cut[:-1], cut[1:]) if i < j]
        program = Program(linear_logits, counting, number % 5 > 0, False, (0.0, 1.0), False)
        params = np.ones((1, 2), np.float32), np.zeros(2, np.float32)
        stretches = list(runner.stream(program, params, (), runner.as_key(0), batches, image_shape=(1, 1, 1),
                                       lanes=lanes, num_images=count if number % 2 else None))
        back = np.concatenate([stretch.sample_ids for stretch in stretches])
        calls = np.concatenate([stretch.outcome.gradient_evals for stretch in stretches])
        assert sorted(back.tolist()) == ids.tolist(), (number, count, lanes)
        np.testing.assert_array_equal(calls, lengths[back])


def test_a_lane_that_asks_for_no_gradient_gets_none_whatever_its_neighbours_ask_for():
    """Else a slope that is not finite would end an image beside some neighbours and not beside others."""
    params, apply_fn, x, y = toy()

    def wants(state):
        return (state[0].sample_id + state[1]) % 2 == 0

    def step(state, evaluation):
        size = jnp.abs(evaluation.gradient).sum()
        return state[0], state[1] + 1, state[2] + jnp.where(wants(state), jnp.asarray([size, 0.0]),
                                                            jnp.asarray([0.0, size]))

    algorithm = Algorithm(
        init=lambda sample: (sample, jnp.int32(0), jnp.zeros(2)), query=lambda state: state[0].x,
        loss=lambda state, logits: logits.sum(), step=step, done=lambda state: state[1] == 4,
        finish=lambda state: state[2], wants_gradient=wants)
    queue = Queue(Sample(x[:2], y[:2], -jnp.ones(2, jnp.int32), jnp.arange(2, dtype=jnp.int32)),
                  jnp.zeros(1, jnp.int32), jnp.full(1, 2, jnp.int32))
    evaluate_fn = functools.partial(evaluate, algorithm, functools.partial(apply_fn, params))
    _, _, _, done, calls = jax.jit(lambda queue: drain(
        algorithm, evaluate_fn, *first_lanes(algorithm, queue, 2), capacity=2))(queue)
    assert int(calls[0]) == 4 and (done.outcome[:, 0] > 0.0).all() and (done.outcome[:, 1] == 0.0).all()


def test_no_constant_of_the_model_becomes_an_argument_of_the_devices(monkeypatch):
    """With one that has no elements JAX 0.11 dies while it compiles for several devices."""
    params, apply_fn, x, y = toy()
    operands = []

    def noted(*arguments, on_mesh=runner.on_mesh, **options):
        run = on_mesh(*arguments, **options)

        def lowered(*values):
            head = re.search(r"manual_computation\((.*?)\)", run.lower(*values).as_text())
            operands.extend(head[1].split(", "))
            assert all(value.size for value in jax.tree.leaves(values))
            return run(*values)

        return lowered

    def with_constants(params, images):
        patch = jnp.zeros(images.shape[1:3]).at[0:2, 0:3].add(np.arange(6.0).reshape(2, 3))
        return apply_fn(params, images + 0.0 * patch[None, ..., None])

    monkeypatch.setattr(runner, "on_mesh", noted)
    ATTACK(params, with_constants, x, y)
    assert operands and all(operand.startswith("%arg") for operand in operands)


def test_inside_the_callers_jit(expected):
    params, apply_fn, x, y = toy()
    same(jax.jit(lambda p, x, y: ATTACK(p, apply_fn, x, y, lanes=4))(params, x, y), expected)
    # Concrete images and a model that closes over traced parameters.
    same(jax.jit(lambda p: ATTACK((), lambda _, x: apply_fn(p, x), x, y))(params), expected)


@pytest.mark.slow
def test_images_that_an_explicit_mesh_splits(expected):
    """`jax.make_mesh` makes Explicit axes, which allow no row to be taken from a split array."""
    params, apply_fn, x, y = toy()
    split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("batch",)), jax.sharding.PartitionSpec("batch"))
    x, y = jax.device_put((x, y), split)
    same(jax.jit(lambda x, y: ATTACK(params, apply_fn, x, y, lanes=6))(x, y), expected)
    result = gse_jax.differentiable_attack(params, apply_fn, x, y, settings=SETTINGS, bounds=(-1.0, 1.0),
                                           tradeoff=expected.tradeoff, num_steps=2)
    assert result.adversarials.shape == x.shape


def test_inside_the_callers_vmap(expected):
    params, apply_fn, x, y = toy()
    one = jax.vmap(lambda x, y: ATTACK(params, apply_fn, x[None], y[None]))(x, y)
    same(jax.tree.map(lambda a: a[:, 0], one), expected)


def bound(method, settings, **hyperparams):
    default = gse_jax.preset(method, "cifar10", targeted=False)[1]._replace(**hyperparams)
    return METHODS[method].bind(settings, default, targeted=False, bounds=(-1.0, 1.0), key=None)


def run_with(loop, algorithm=bound("gse", GSESettings(num_runs=2, max_steps=6, phase1_steps=3)),
             num_lanes=2, logits_of=toy()[1]):
    params, _, x, y = toy()
    samples = Sample(x, y, jnp.full(6, -1, jnp.int32), jnp.arange(6, dtype=jnp.int32))
    lanes = idle_lanes(algorithm, jax.tree.map(lambda a: a[0], samples), num_lanes)
    lanes = jax.tree.map(jnp.asarray, lanes)
    queue = Queue(samples, jnp.zeros(1, jnp.int32), jnp.full(1, 6, jnp.int32))
    evaluate_fn = functools.partial(evaluate, algorithm, functools.partial(logits_of, params))
    _, _, _, finished, calls = drain(algorithm, evaluate_fn, lanes, queue,
                                  capacity=6 + num_lanes, loop=loop)
    order = jnp.argsort(finished.sample_id[:6])
    return jax.tree.map(lambda a: a[order], finished.outcome), int(calls[0])


@pytest.mark.slow
def test_the_three_loops_agree():
    # Compiled condition and body: op by op the same takes a minute.
    reference, calls = run_with(lambda more, body, carry: python_loop(jax.jit(more), jax.jit(body),
                                                                      carry))
    assert 13 < calls < 39  # 6 images of up to 13 evaluations on 2 lanes
    for loop in (while_loop, checkpointed_scan(calls + 30)):
        outcome, _ = run_with(loop)
        same(outcome, reference)


HINGED = bound("strattack", StrAttackSettings(num_searches=4, max_steps=30, num_retrainings=2,
                                              retrain_steps=20), c=20.0)


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [3, 6])
def test_a_hinged_attack_takes_only_gradients_that_are_not_zero(num_lanes):
    """The images are those with a gradient in every call, but for the last bit of fused sums."""
    algorithm = HINGED
    assert algorithm.hinged
    rows = []  # an entry per gradient that is computed

    def counted(algorithm):
        def noted(gradient):
            rows.append(1)
            return gradient

        # A pure callback is dropped, as the gradient is, where its result is not used.
        return algorithm._replace(direction=lambda gradient: jax.pure_callback(
            noted, gradient, gradient, vmap_method="sequential"))

    plain, _ = run_with(while_loop, counted(algorithm._replace(hinged=False)), num_lanes)
    num_plain, _ = len(rows), rows.clear()
    hinged, _ = run_with(while_loop, counted(algorithm), num_lanes)
    same(hinged, plain, atol=1e-14)
    np.testing.assert_array_equal(hinged.forward_evals, plain.forward_evals)
    assert int(plain.success.sum()) >= 5
    assert int(hinged.gradient_evals.sum()) <= len(rows) < 0.7 * num_plain


def with_merged_axes(params, images):
    """The rows of all images on one axis: which part belongs to a lane cannot be told by its size."""
    rows = jnp.tanh(images.reshape(-1, images.shape[2] * images.shape[3]))
    return toy()[1](params, rows.reshape(images.shape))


@functools.cache
def without_the_hinge(logits_of):
    return run_with(while_loop, HINGED._replace(hinged=False), 3, logits_of)[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes, logits_of, repeats", [
    pytest.param(2, toy()[1], False, marks=pytest.mark.slow), (8, toy()[1], False),
    (8, with_merged_axes, True)])
def test_the_gradients_of_a_hinged_attack_do_not_repeat_its_forward_pass(num_lanes, logits_of, repeats):
    """But for a model whose saved arrays cannot be told apart by lanes; the images are the same."""
    rows = []  # an entry per image of a forward pass

    @jax.custom_vjp
    def seen(images):
        def noted(images):
            rows.append(images.shape[0])
            return images

        # Dropped where its result is not used.
        return jax.pure_callback(noted, images, images)

    seen.defvjp(lambda images: (seen(images), None), lambda _, cotangent: (cotangent,))
    hinged, calls = run_with(while_loop, HINGED, num_lanes,
                             lambda params, images: logits_of(params, seen(images)))
    plain = without_the_hinge(logits_of)
    same(hinged, plain, atol=1e-14)
    assert int(plain.success.sum()) >= 5
    assert (sum(rows) > num_lanes * calls) == repeats
    assert repeats or sum(rows) == num_lanes * calls


def test_scan_that_is_too_short_stops_early():
    _, calls = run_with(checkpointed_scan(9))
    assert calls == 9


def test_forward_and_reverse_through_the_scan():
    """The driver is differentiable and its derivative is that of the unrolled loop."""
    def total(driver, a):
        state = driver(lambda c: c[1] < 7, lambda c: (jnp.sin(a * c[0]), c[1] + 1),
                       (jnp.asarray(0.7), jnp.asarray(0)))
        return state[0]

    unrolled = jax.grad(lambda a: functools.reduce(lambda c, _: jnp.sin(a * c), range(7), 0.7))(1.3)
    for driver in (checkpointed_scan(7), checkpointed_scan(50)):
        np.testing.assert_allclose(jax.grad(functools.partial(total, driver))(1.3), unrolled,
                                   rtol=1e-12)
        np.testing.assert_allclose(jax.jvp(functools.partial(total, driver), (1.3,), (1.0,))[1],
                                   unrolled, rtol=1e-12)


def test_progress_is_reported_and_truthful():
    params, apply_fn, x, y = toy()
    seen = []
    result = ATTACK(params, apply_fn, x, y, lanes=2, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    last = seen[-1]
    assert (last.done, last.total) == (6, 6)
    assert last.found == int(np.sum(result.success))
    assert last.gradient_evals == int(np.sum(result.gradient_evals)) <= last.lane_evals


def test_evaluations_are_counted_exactly():
    """A run of k steps takes k - 1 gradients beside the clean one, and k predictions."""
    params, apply_fn, x, y = toy()
    steps = 7
    settings = GSESettings(num_runs=1, max_steps=steps, phase1_steps=3, num_boosted_runs=0)
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)
    hyperparams = hyperparams._replace(step_size=1e-7)  # too small to succeed
    result = ATTACK(params, apply_fn, x, y, settings=settings, hyperparams=hyperparams)
    np.testing.assert_array_equal(result.status, Status.NOT_FOUND)
    np.testing.assert_array_equal(result.forward_evals, 1 + steps)
    np.testing.assert_array_equal(result.gradient_evals, steps)


def test_dead_runs_cost_no_evaluation_and_change_nothing():
    """A search that starts above the largest active trade-off: nothing but dead runs."""
    params, apply_fn, x, y = toy()
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)
    result = ATTACK(params, apply_fn, x, y, settings=GSESettings(num_runs=3, num_boosted_runs=0),
                    hyperparams=hyperparams._replace(initial_fraction=1e4))
    np.testing.assert_array_equal(result.gradient_evals, 1)
    np.testing.assert_array_equal(result.forward_evals, 1)
    np.testing.assert_array_equal(result.status, Status.NOT_FOUND)
    np.testing.assert_array_equal(result.adversarials, golden()["images"])


def batches(x, y, sizes):
    """The images in batches of odd sizes, as Samples with their own ids."""
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        count = len(x[part])
        yield Sample(np.asarray(x[part]), np.asarray(y[part]), np.full(count, -1),
                     100 + start + np.arange(count))
        start += size


def test_a_stream_of_batches_equals_one_call(expected):
    params, apply_fn, x, y = toy()
    ids, adversarials, lane_evals = [], [], 0
    for stretch in attack_stream(params, apply_fn, batches(x, y, (1, 3, 0, 2)), lanes=2,
                                 image_shape=x.shape[1:], dtype=x.dtype, settings=SETTINGS,
                                 bounds=(-1.0, 1.0)):
        ids += stretch.sample_ids.tolist()
        adversarials += list(stretch.outcome.adversarials)
        lane_evals += stretch.lane_evals
    assert sorted(ids) == list(range(100, 106))
    order = np.argsort(ids)
    np.testing.assert_allclose(np.stack(adversarials)[order], expected.adversarials, atol=1e-9)
    assert lane_evals >= int(np.sum(expected.gradient_evals))


def test_a_loader_may_fill_one_buffer_again_and_again(expected):
    params, apply_fn, x, y = toy()
    x, y = np.asarray(x), np.asarray(y)
    buffer = np.empty_like(x[:2])

    def refilled():
        for batch in batches(x, y, (2, 2, 2)):
            buffer[:] = batch.x
            yield batch._replace(x=buffer)

    stretches = list(attack_stream(params, apply_fn, refilled(), image_shape=x.shape[1:], lanes=2,
                                   settings=SETTINGS, bounds=(-1.0, 1.0), dtype=np.float64))
    ids = np.concatenate([s.sample_ids for s in stretches])
    found = np.concatenate([s.outcome.adversarials for s in stretches])
    np.testing.assert_allclose(found[np.argsort(ids)], expected.adversarials, atol=1e-9)


@pytest.mark.slow
def test_a_model_may_squeeze_a_batch_of_one(expected):
    """Global pooling and `.squeeze()`: the tail's last lane, and one image, lose their batch axis."""
    params, apply_fn, x, y = toy()

    def squeezed(params, x):
        return jnp.squeeze(apply_fn(params, x)[:, None])

    same(gse_jax.attack(params, squeezed, x, y, settings=SETTINGS, bounds=(-1.0, 1.0), lanes=1), expected)
    alone = gse_jax.attack(params, squeezed, x[:1], y[:1], settings=SETTINGS, bounds=(-1.0, 1.0), precision="tf32")
    np.testing.assert_array_equal(alone.success, expected.success[:1])
    saliency = gse_jax.metrics.adversarial_saliency(params, squeezed, x[:1], y[:1], (y[:1] + 1) % 3)
    np.testing.assert_array_equal(
        saliency, gse_jax.metrics.adversarial_saliency(params, apply_fn, x[:1], y[:1], (y[:1] + 1) % 3))


def test_a_stream_is_pulled_as_lanes_fall_free_and_may_be_empty():
    params, apply_fn, x, y = toy()
    pulled = []

    def slow():
        for batch in batches(jnp.tile(x, (20, 1, 1, 1)), jnp.tile(y, 20), (4,) * 30):
            pulled.append(len(batch.y))
            yield batch

    options = dict(image_shape=x.shape[1:], dtype=x.dtype, settings=SETTINGS, bounds=(-1.0, 1.0),
                   lanes=2)
    next(iter(attack_stream(params, apply_fn, slow(), **options)))
    assert sum(pulled) < 20
    assert list(attack_stream(params, apply_fn, [], **options)) == []


@pytest.mark.parametrize("change, words", [
    (dict(sample_id=np.asarray([0, -1, 2])), r"sample_id must lie in \[0, .*from -1 to 2"),
    (dict(sample_id=np.asarray([0, 2**40, 2])), "sample_id must lie in"),
    (dict(sample_id=np.arange(2)), "sample_id must have one entry per image"),
    (dict(sample_id=np.arange(3.0)), "sample_id must be integer"),
    (dict(target=np.full(2, -1)), "target must have one entry per image")])
def test_ids_that_would_lose_images_are_refused(change, words):
    params, apply_fn, x, y = toy()
    (batch,) = batches(x, y, (3,))
    with pytest.raises((ValueError, TypeError), match=words):
        list(attack_stream(params, apply_fn, [batch._replace(**change)], image_shape=x.shape[1:],
                           dtype=x.dtype, bounds=(-1.0, 1.0)))


def test_a_known_number_of_images_may_be_zero():
    params, apply_fn, x, _ = toy()
    options = dict(image_shape=x.shape[1:], dtype=x.dtype)
    assert list(attack_stream(params, apply_fn, [], num_images=0, **options)) == []
    for wrong, words in ((dict(num_images=-1), "num_images must be a whole number >= 0 or None, got -1"),
                         (dict(lanes=0), "lanes must be a whole number >= 1 or None, got 0"), (dict(precision="fp8"), "precision")):
        with pytest.raises(ValueError, match=words):
            attack_stream(params, apply_fn, [], **wrong, **options)


@pytest.mark.slow
def test_short_attacks_keep_their_lanes_busy():
    """A stretch of 32 calls takes more images than there are lanes; the queue must hold them."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 5)).astype("f4")
    x = rng.random((400, 8, 8, 1), np.float32)
    y = (x.reshape(400, -1) @ weights).argmax(-1)
    seen = []
    result = gse_jax.attack((weights, np.zeros(5, "f4")), linear_logits, x, y, lanes=8,
                            progress=seen.append,
                            settings=GSESettings(num_runs=2, max_steps=5, phase1_steps=3))
    used = int(result.forward_evals.sum())
    assert used / len(x) < 12
    assert used > 0.97 * seen[-1].lane_evals  # with two places per lane 0.93


def test_results_that_do_not_fit_into_the_device_are_not_lost(expected, monkeypatch):
    params, apply_fn, x, y = toy()

    def full(tree):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(api.jax, "block_until_ready", full)
    with pytest.warns(UserWarning, match="do not fit into the device's memory"):
        result = ATTACK(params, apply_fn, x, y, lanes=1)
    assert isinstance(result.adversarials, np.ndarray)
    same(result, expected)

    def lost(tree):
        raise jax.errors.JaxRuntimeError("INTERNAL: lost the device")

    monkeypatch.setattr(api.jax, "block_until_ready", lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="lost the device"):
        api._on_device(np.zeros(3))


def test_a_bad_batch_is_refused_when_it_comes():
    params, apply_fn, x, y = toy()
    good = Sample(np.zeros((1, 20, 20, 3)), np.zeros(1, int), np.ones(1, int), np.zeros(1, int))
    for change, words in ((dict(x=np.zeros((1, 9, 9, 3))), r"batch.*\[9, 9, 3\].*\[20, 20, 3\]"),
                          (dict(x=good.x.astype("f4")), "batch.*float32, expected .*float64"),
                          (dict(x=good.x + 1.1), r"x must lie inside bounds=\(0, 1\)"),
                          (dict(y=good.y + 9), r"y must lie in \[0, 4\]"),
                          (dict(target=good.y + 9), "targets must lie in"),
                          (dict(target=good.y), "targets must differ from y")):
        with pytest.raises(ValueError, match=words):
            list(attack_stream(params, apply_fn, [good._replace(**change)], image_shape=x.shape[1:], dtype=x.dtype,
                               targeted=True))


def test_one_program_per_width(expected):
    """What one call returns is what the next one takes: nothing compiles in the middle of a run."""
    compiled = []

    def listen(event, duration, **details):
        del duration
        if event.endswith("backend_compile_duration"):
            compiled.append(details.get("fun_name", ""))

    params, apply_fn, x, y = toy()
    jax.monitoring.register_event_duration_secs_listener(listen)
    # A function of its own, so that no other test has compiled it.
    result = ATTACK(params, lambda params, x: apply_fn(params, x), x, y, lanes=6)
    assert len([name for name in compiled if "local" in name]) == 1
    same(result, expected)


def state_on_support(step, checkpoint):
    sample = Sample(jnp.zeros((8, 8, 1)), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
                    jnp.zeros((), jnp.int32))
    algorithm = GSE.bind(GSESettings(), gse_jax.GSEHyperparams(), targeted=False, bounds=(0.0, 1.0))
    state = algorithm.init(sample)
    return state._replace(iterate=state.iterate._replace(step=jnp.asarray(step, jnp.int32)),
                          checkpoint=jnp.asarray(checkpoint))


def test_a_run_is_given_up_when_its_pace_does_not_suffice():
    """100 iterations, 20 of them before the support is frozen, windows of 10."""
    settings = GSESettings(max_steps=100, phase1_steps=20, give_up_window=10)
    judged = lambda step, before, now, s=settings: _judged(state_on_support(step, before),
                                                           jnp.asarray(now), s)
    # At step 50 five windows are left: 0.21 in the last one suffices for 1.0, and 0.19 does not.
    assert not bool(judged(50, 1.21, 1.0)[0]) and bool(judged(50, 1.19, 1.0)[0])
    assert bool(judged(50, 1.0, 1.1)[0])  # it rises
    assert not bool(judged(30, np.inf, 5.0)[0])  # the first look has nothing to compare with
    for step in (20, 45, 51):  # no look between windows, none before the support is frozen
        hopeless, kept = judged(step, 1.0, 1.0)
        assert not bool(hopeless) and float(kept) == 1.0
    assert float(judged(50, 1.2, 1.0)[1]) == 1.0
    never, kept = judged(50, 1.0, 1.0, GSESettings(max_steps=100, phase1_steps=20))
    assert not bool(never) and float(kept) == 1.0


@pytest.mark.slow
def test_giving_up_saves_evaluations_and_finds_true_successes(expected):
    params, apply_fn, x, y = toy()
    settings = dataclasses.replace(SETTINGS, give_up_window=2)
    result = gse_jax.attack(params, apply_fn, x, y, settings=settings, bounds=(-1.0, 1.0))
    assert int(result.gradient_evals.sum()) < int(expected.gradient_evals.sum())
    fooled = np.asarray(apply_fn(params, result.adversarials).argmax(-1)) != np.asarray(y)
    np.testing.assert_array_equal(fooled, result.success)
    assert fooled.any()


def test_a_quota_counts_as_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for text, cores in (("200000 100000", 2), ("max 100000", 64), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
        assert devices._num_cores() == cores


def test_one_cpu_device_per_core_and_a_new_cache_folder(tmp_path):
    """In a process of its own: neither can be undone."""
    script = ("import logging, jax, jax.numpy as jnp, gse_jax\n"
              "from gse_jax import devices\n"
              "devices._num_cores = lambda: 3\n"
              "assert gse_jax.use_all_cpu_cores() == 3 == jax.device_count()\n"
              "for name in 'ab':\n"
              f"    gse_jax.use_compilation_cache('{tmp_path}/' + name)\n"
              "    jax.jit(lambda x: jnp.sin(x) + ord(name))(1.0)\n"
              "devices._num_cores = lambda: 2\n"
              "try:\n    gse_jax.use_all_cpu_cores()\nexcept RuntimeError as error:\n"
              "    assert 'before JAX is first used' in str(error)\nelse:\n    raise SystemExit('no error')\n"
              "devices._num_cores = lambda: 3\n"
              "for number in (1, 1, 3):\n    devices.hint_at_idle_cores(jax.devices()[:number])\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("one CPU device of a machine with 3 cores") == 1
    assert all(any((tmp_path / name).iterdir()) for name in "ab")


@pytest.mark.parametrize("lanes, count, width", [(5, 4, 2), (5, 400, 2), (32, 400, 8), (32, 32, 4), (32, 4, 1)])
def test_a_wish_for_lanes_counts_where_the_images_fill_them(lanes, count, width):
    """Narrow wishes have one program for any number of images."""
    assert len(jax.local_devices()) == 4
    assert runner.layout(count, lanes, (32, 32, 3))[1] == width
