"""The rows of the engine: `REFINE`, and `method="gse_refined"`: two runs of GSE, then the refinement.

GSE's section search looks for the largest trade-off that still succeeds, at about 170 gradients an
image on CIFAR-10. The refinement reaches sparser images from an early, dense success, so the
search ends after two runs (or later, as soon as one has succeeded) and its evaluations go to the refinement.

References:
    arXiv 2311.17434, algorithm 1 (GSE); the refinement is derived in `docs/refinement.md`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks.algorithm import Algorithm, Evaluation, Method, Outcome, Sample, select
from gse_jax.attacks.configuration import check_types, check_whole_numbers
from gse_jax.attacks.gse import algorithm as gse
from gse_jax.attacks.gse import settings as gse_configuration
from gse_jax.attacks.gse.settings import GSEHyperparams, GSESettings
from gse_jax.attacks.refinement import algorithm as refinement
from gse_jax.attacks.refinement import settings as configuration
from gse_jax.attacks.refinement.settings import (
    PUBLISHED_EVALS,
    PUBLISHED_EVALS_TARGETED,
    RefineHyperparams,
    RefineSettings,
)
from gse_jax.types import Status


@dataclasses.dataclass(frozen=True)
class GSERefinedSettings(RefineSettings, GSESettings):
    """Static configuration of GSE with refinement: the fields of both, and one more.

    Attributes:
        search_runs: runs of GSE's search after which the refinement takes over, as soon as one
            of them has succeeded, >= 1. `max_evals` counts the gradients of both and is never
            exceeded: an image of which GSE has found nothing by then ends as NOT_FOUND, so give
            more where success is rare.
    """

    search_runs: int = 2


class GSERefinedHyperparams(NamedTuple):
    """Traced configuration of GSE with refinement: the fields of both.

    Attributes:
        mu, step_size, q, blur_sigma, initial_fraction, boost: as in GSEHyperparams.
        max_l2, max_linf, overshoot, patience: as in RefineHyperparams.
    """

    mu: float = GSEHyperparams().mu  # [] float
    step_size: float = GSEHyperparams().step_size  # [] float
    q: float = GSEHyperparams().q  # [] float
    blur_sigma: float = GSEHyperparams().blur_sigma  # [] float
    initial_fraction: float = GSEHyperparams().initial_fraction  # [] float
    boost: float = GSEHyperparams().boost  # [] float
    max_l2: float = RefineHyperparams().max_l2  # [] float
    max_linf: float = RefineHyperparams().max_linf  # [] float
    overshoot: float = RefineHyperparams().overshoot  # [] float
    patience: float = RefineHyperparams().patience  # [] float


def _parts(hyperparams):
    """Return GSE's hyperparameters and the refinement's."""
    return tuple(kind(*(getattr(hyperparams, name) for name in kind._fields))
                 for kind in (GSEHyperparams, RefineHyperparams))


class GSERefinedState(NamedTuple):
    """State of one image.

    Changing:
        gse: GSE's state; still once the refinement has begun.
        refinement: the refinement's state; without meaning before.
        refining: [] bool, the refinement has begun.
    """

    gse: gse.GSEState
    refinement: refinement.RefineState
    refining: jax.Array  # [] bool


def preset(domain: str, targeted: bool):
    """Return GSE's published configuration and the refinement's, with the published budget; see GSE's `preset`."""
    settings, hyperparams = gse_configuration.preset(domain, targeted)
    evals = PUBLISHED_EVALS_TARGETED if targeted else PUBLISHED_EVALS
    return (GSERefinedSettings(**dataclasses.asdict(settings), max_evals=evals),
            GSERefinedHyperparams(**hyperparams._asdict()))


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    check_types("gse_refined", settings, hyperparams, GSERefinedSettings, GSERefinedHyperparams)
    check_whole_numbers(settings, {"search_runs": 1})
    of_gse, of_refinement = _parts(hyperparams)
    gse_configuration.check(settings, of_gse, image_shape)
    configuration.check(settings, of_refinement, image_shape)


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return GSE with refinement, its configuration bound; see `Bind`. It is deterministic."""
    of_gse, of_refinement = _parts(hyperparams)
    first = gse.bind(settings, of_gse, targeted=targeted, bounds=bounds, key=key)
    then = refinement.bind(settings, of_refinement, targeted=targeted, bounds=bounds, key=key)
    budget = settings.max_evals

    def init(sample: Sample) -> GSERefinedState:
        return GSERefinedState(first.init(sample), refinement.start(sample, sample.x, budget),
                               jnp.zeros((), bool))

    def query(state: GSERefinedState):
        return jnp.where(state.refining, then.query(state.refinement), first.query(state.gse))

    def loss(state: GSERefinedState, logits):
        return jnp.where(state.refining, then.loss(state.refinement, logits),
                         first.loss(state.gse, logits))

    def step(state: GSERefinedState, evaluation: Evaluation) -> GSERefinedState:
        searched, refined = first.step(state.gse, evaluation), then.step(state.refinement, evaluation)
        found = searched.search.found
        left = budget - searched.gradient_evals
        # The last evaluation goes to the refinement, which knows whether the caps are kept.
        enough = first.done(searched) | (searched.search.run >= settings.search_runs) | (left <= 1)
        begins = ~state.refining & enough & found
        gives_up = ~found & (left <= 0)
        searched = searched._replace(
            status=jnp.where(gives_up, Status.NOT_FOUND, searched.status).astype(jnp.int32))
        begun = refinement.start(state.gse.sample, searched.best, left)
        return GSERefinedState(
            gse=select(state.refining, state.gse, searched),
            refinement=select(begins, begun, select(state.refining, refined, state.refinement)),
            refining=state.refining | begins)

    def done(state: GSERefinedState):
        return jnp.where(state.refining, then.done(state.refinement), first.done(state.gse))

    def finish(state: GSERefinedState) -> Outcome:
        before, after = first.finish(state.gse), then.finish(state.refinement)
        chosen = select(state.refining, after, before)
        return chosen._replace(
            gradient_evals=before.gradient_evals + after.gradient_evals,
            forward_evals=before.forward_evals + after.forward_evals,
            tradeoff=jnp.where(chosen.success, state.gse.best_tradeoff,
                               jnp.zeros_like(state.gse.best_tradeoff)))

    # Every image that is found spends its budget.
    return Algorithm(init, query, loss, step, done, finish,
                     progress=lambda state: state.gse.gradient_evals + state.refinement.evals)


def _preset(domain, targeted):
    del domain, targeted  # One configuration for all.
    return RefineSettings(), RefineHyperparams()


GSE_REFINED = Method(bind=bind, preset=preset, check=check)
# Not in the registry: it needs adversarial images to begin with. See `attacks.refine`.
REFINE = Method(bind=refinement.bind, preset=_preset, check=configuration.check)
