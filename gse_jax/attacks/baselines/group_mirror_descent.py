r"""GSMD: mirror descent in a ball of the sum of cell maxima, which grows and shrinks by success.

Entropy steps along the gradient of the cross entropy, with one AdaGrad step size per image, then
the Bregman projection onto `sum_groups max |w| <= D` and the box. D grows while the image is not
adversarial and shrinks while it is. Halfway only the strongest groups are kept, and no others come
back. Groups are the cells of a grid, or superpixels. Lengths are in the units of images of range
width 2.

References:
    github jsve96/GSMD (2026), attacks.py, classes GSMD_exact_new and GSMD_slic, and
    attackParams.json. The paper's text was not found.

Differs from the reference:
    Of the adversarial iterates the one with the fewest pixels is kept, then (as far as float32 has digits for
    both, so hardly above 10,000 pixels) with the smallest l2
    norm (the code means to, but keeps the last). Superpixels are projected onto exactly, as cells are
    (there by their largest member alone). The projection inverts the mirror map, as mirror descent
    does; the code projects the dual point as if it were the primal one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, wanted_label
from gse_jax.attacks.baselines.record import Record, is_over, note, outcome_of, start_record
from gse_jax.attacks.segmentation import slic_segments
from gse_jax.ops import (
    cross_entropy,
    grid_cells,
    is_adversarial,
    largest_scores,
    project_group_maxima,
    project_superpixel_maxima,
    to_dual,
)

_SMALLEST_BUDGET = 1e-3  # D_MIN of the reference
_MOST_CELLS = 10.0 / 22.5  # share of the cells that may be kept halfway; of the reference
_MOST_SUPERPIXELS = 10  # of the reference
_BLUR = 5.0  # pixels, before superpixels are made; of the reference
_TINY = 1e-12  # keeps the first step finite where the gradient is zero; of the reference


@dataclasses.dataclass(frozen=True)
class GSMDSettings:
    """Static configuration of GSMD.

    Attributes:
        max_steps: mirror steps, >= 2.
        cells_per_axis: n, the grid has n x n cells, >= 1; superpixels are aimed at n * n.
        groups: "cells" or "superpixels".
    """

    max_steps: int = 200
    cells_per_axis: int = 15
    groups: str = "cells"


class GSMDHyperparams(NamedTuple):
    """Traced configuration of GSMD, in images of range width 2.

    Attributes:
        budget: D at the beginning.
        rate: rho, relative change of D per step.
        learning_rate: of the mirror steps.
    """

    budget: float = 20.0  # [] float
    rate: float = 0.1  # [] float
    learning_rate: float = 1.0  # [] float


class GSMDState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        w: [H, W, C] perturbation that is evaluated next, in units of range width 2.
        budget: [] D.
        squares: [] sum over steps of the largest squared gradient entry.
        kept: [H, W] bool, pixels of cells that may change.
        step: [] int32 steps done.
    Bookkeeping:
        record: best image by its pixels, then its l2 norm; status and counts.
    """

    sample: Sample  # one image
    w: jax.Array  # [H, W, C] float
    budget: jax.Array  # [] float
    squares: jax.Array  # [] float
    kept: jax.Array  # [H, W] bool
    step: jax.Array  # [] i32
    record: Record


# attackParams.json has ImageNet only; the 8 x 8 grid and D = 5 on CIFAR-10 are ours.
PRESETS = {(domain, targeted): (GSMDSettings(), GSMDHyperparams(budget=2.0 if targeted else 20.0))
           for domain in ("original", "imagenet") for targeted in (False, True)}
PRESETS["cifar10"] = GSMDSettings(cells_per_axis=8), GSMDHyperparams(budget=5.0)


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("gsmd", settings, hyperparams, GSMDSettings, GSMDHyperparams)
    configuration.check_whole_numbers(settings, {"max_steps": 2, "cells_per_axis": 1})
    configuration.check_choice(settings, "groups", ("cells", "superpixels"))
    configuration.check_numbers(hyperparams, may_be_zero=("rate",))
    configuration.check_fits(settings, "cells_per_axis", image_shape)


def segment(settings, images):
    """Return the superpixels, if any; see `Method.segment`."""
    if settings.groups == "cells":
        return None
    return slic_segments(images, settings.cells_per_axis**2, blur=_BLUR)


def strongest_cells(w, cells, count):
    """Mark the pixels of the cells with the largest entries.

    Args:
        w: [H, W, C].
        cells: [H, W] int, group of every pixel; NumPy where static.
        count: [] int32, cells to keep.

    Returns:
        [H, W] bool.
    """
    # Superpixels are known at run time only, but there are no more than pixels.
    num_cells = int(cells.max()) + 1 if isinstance(cells, np.ndarray) else cells.size
    largest = jnp.zeros(num_cells, w.dtype).at[cells].max(jnp.max(jnp.abs(w), axis=-1))
    return largest_scores(largest, count)[cells]


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return GSMD with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    scale = 0.5 * (high - low)
    superpixels = settings.groups == "superpixels"
    share = _MOST_SUPERPIXELS if superpixels else _MOST_CELLS * settings.cells_per_axis**2
    project = project_superpixel_maxima if superpixels else project_group_maxima

    def init(sample: Sample) -> GSMDState:
        w, zero = jnp.zeros_like(sample.x), jnp.zeros((), sample.x.dtype)
        return GSMDState(sample, w, hyperparams.budget, zero,
                         jnp.ones(w.shape[:2], bool), jnp.zeros((), jnp.int32),
                         start_record(sample))

    def point(state: GSMDState):
        return jnp.clip(state.sample.x + scale * state.w, low, high)

    def loss(state: GSMDState, logits):
        ce = cross_entropy(logits, wanted_label(state.sample, targeted))
        return ce if targeted else -ce

    def step(state: GSMDState, evaluation) -> GSMDState:
        x, label = state.sample.x, wanted_label(state.sample, targeted)
        cells = (state.sample.segments if superpixels
                 else grid_cells(*x.shape[:2], settings.cells_per_axis))
        adversarial = is_adversarial(evaluation.logits, label, targeted=targeted)
        norm = jnp.sqrt(jnp.sum(state.w * state.w))
        pixels = jnp.sum(jnp.any(state.w != 0.0, axis=-1), dtype=x.dtype)
        record = note(state.record, state.sample, evaluation, point(state),
                      pixels + norm / (1.0 + norm), state.step >= settings.max_steps,
                      targeted=targeted)

        budget = state.budget * jnp.where(adversarial, 1.0 - hyperparams.rate, 1.0 + hyperparams.rate)
        budget = jnp.maximum(budget, _SMALLEST_BUDGET)
        gradient = evaluation.gradient * scale
        squares = state.squares + jnp.max(gradient * gradient)
        move = hyperparams.learning_rate / jnp.sqrt(squares + _TINY) * gradient
        w = project(to_dual(state.w) - move, cells, budget, (low - x) / scale, (high - x) / scale)

        # The surer the model is of the label, the fewer cells are kept.
        sure = jnp.exp(-cross_entropy(evaluation.logits, label))
        most = float(int(share))
        count = jnp.round(1.0 + (most - 1.0) * (1.0 - sure)).astype(jnp.int32)
        halfway = state.step == settings.max_steps // 2
        kept = jnp.where(halfway, strongest_cells(w, cells, jnp.maximum(count, 1)), state.kept)
        return GSMDState(state.sample, jnp.where(kept[..., None], w, 0.0), budget, squares, kept,
                         state.step + 1, record)

    return Algorithm(init, point, loss, step, is_over, outcome_of)


GSMD = Method(bind=bind, preset=configuration.chooser("gsmd", PRESETS), check=check, segment=segment)
