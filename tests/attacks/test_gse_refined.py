"""GSE with refinement against one after the other: when the search ends, what goes on and what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import GSEHyperparams, GSESettings, Status
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.gse import GSE
from gse_jax.attacks.refinement import (
    GSE_REFINED,
    REFINE,
    GSERefinedHyperparams,
    GSERefinedSettings,
    RefineHyperparams,
    RefineSettings,
)
from gse_jax.attacks.refinement.algorithm import start

begun = jax.jit(start)

BOUND = dict(targeted=False, bounds=(0.0, 1.0), key=None)
SEARCH = dict(num_runs=4, max_steps=4, phase1_steps=2, num_boosted_runs=1, blur_size=3, patch_size=2)
WALK = dict(max_repairs=2, max_failures=2, scales=(1.0,), patch_size=2)
OF_GSE, OF_WALK = dict(step_size=0.05, mu=0.5), dict(max_l2=2.0, overshoot=0.2)
# How often the model is fooled (None: from the beginning on), and from which evaluation on it is not finite.
RUNS = ((None, 99), (0.0, 0), (0.0, 99), (0.3, 99), (1.0, 99), (0.15, 99), (0.4, 5), (0.3, 9), (0.0, 3), (0.6, 99),
        (0.3, 1), (0.08, 99), (0.5, 4))


def compiled(algorithm):
    names = ("init", "query", "loss", "step", "done", "finish")
    return algorithm._replace(**{name: jax.jit(getattr(algorithm, name)) for name in names})


@pytest.fixture(scope="module")
def parts():
    search = GSE.bind(GSESettings(**SEARCH), GSEHyperparams(**OF_GSE), **BOUND)
    walk = REFINE.bind(RefineSettings(**WALK), RefineHyperparams(**OF_WALK), **BOUND)
    return compiled(search), compiled(walk)


@pytest.mark.parametrize("budget, search_runs", [(14, 2), (4, 4)])
def test_one_after_the_other(parts, budget, search_runs):
    both = compiled(GSE_REFINED.bind(GSERefinedSettings(**SEARCH | WALK, max_evals=budget, search_runs=search_runs),
                                     GSERefinedHyperparams(**OF_GSE, **OF_WALK), **BOUND))
    ends = set()
    for seed, (share, broken) in enumerate(RUNS):
        random = np.random.default_rng(seed)
        x = random.uniform(0.3, 0.7, (8, 8, 1))
        sample, number = Sample(x, np.int32(0), np.int32(-1), np.int32(0)), 0
        state, (search, walk), walking = both.init(sample), parts, False
        searched, walked = search.init(sample), None
        while not both.done(state):
            part, now = (walk, walked) if walking else (search, searched)
            np.testing.assert_allclose(both.query(state), part.query(now), atol=1e-12)
            fooled = share is None or (number and random.random() < share)
            margin = -0.3 if fooled else 0.2 + random.random()
            logits = np.asarray([margin, 0.0, -1.0])
            loss = float(part.loss(now, logits))
            assert float(both.loss(state, logits)) == loss == (margin if walking else max(margin, 0))
            poison = np.nan if number >= broken else 0.0
            evaluation = Evaluation(logits + poison, np.float64(loss) + poison, random.normal(size=x.shape))
            state, number = both.step(state, evaluation), number + 1
            now = part.step(now, evaluation)
            if walking:
                walked = now
                assert bool(both.done(state)) == bool(part.done(now))
                continue
            searched, left = now, budget - int(now.gradient_evals)
            if now.search.found and (part.done(now) or now.search.run >= search_runs or left <= 1):
                walking, walked = True, begun(sample, now.best, left)
                assert not both.done(state)
            elif not now.search.found and left <= 0 and not part.done(now):
                searched = now._replace(status=jnp.asarray(int(Status.NOT_FOUND), jnp.int32))
                assert both.done(state)
            else:
                assert bool(both.done(state)) == bool(part.done(now))
        outcome, before = both.finish(state), search.finish(searched)
        last = walk.finish(walked) if walking else before
        np.testing.assert_allclose(outcome.adversarials, last.adversarials, atol=1e-12)
        assert (int(outcome.status), bool(outcome.success)) == (int(last.status), bool(last.success))
        assert number == int(outcome.forward_evals)
        assert int(outcome.gradient_evals) == int(before.gradient_evals) + (int(last.gradient_evals) if walking else 0)
        assert int(outcome.gradient_evals) <= budget
        np.testing.assert_allclose(outcome.tradeoff, before.tradeoff if outcome.success else 0.0)
        ends.add((int(outcome.status), walking))
    assert len(ends) >= 4
