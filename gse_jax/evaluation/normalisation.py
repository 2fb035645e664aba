"""Would the model do much better if the images were normalised differently?

The largest class of wrong robustness numbers comes from images in another range than the weights
were trained with. From outside, a normalisation can be replaced by an affine map of the images, so
the usual mistakes can be tried without looking into `apply_fn`:

- `apply_fn` does not normalise, but the weights want it (or the images are normalised twice);
- `apply_fn` normalises by the rule of another checkpoint.
"""

from typing import NamedTuple

import numpy as np

from gse_jax.evaluation.model_probe import evenly_chosen

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MEAN_STD = "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225)"
_LEAST_GAIN = 0.02  # of accuracy: smaller gains are not what a wrong normalisation costs
_LEAST_SKILL = 0.15  # of the way from guessing to always right
_SCREENED = 128  # images
_LEVEL = 1e-3  # of the sign test; about ten candidates are tried


class Candidate(NamedTuple):
    """Hold one guess of how the images should have been normalised.

    Attributes:
        what: completes "the model is better when ...".
        fix: what to change.
        scale: [C] of the affine map of the images.
        shift: [C] of it.
    """

    what: str
    fix: str
    scale: np.ndarray
    shift: np.ndarray


class Verdict(NamedTuple):
    """Hold the best candidate that is significantly better than the images as they are.

    Attributes:
        candidate: the `Candidate`.
        before: accuracy with the images as passed.
        after: accuracy with the candidate.
        count: images compared.
    """

    candidate: Candidate
    before: float
    after: float
    count: int


class _Rule(NamedTuple):
    """A normalisation of unit images, u -> (u - mean) / std, in words and numbers."""

    verb: str
    noun: str
    formula: str
    load: str
    mean: object
    std: object


_UNIT = _Rule("scaled to [0, 1]", "no normalisation", "{u}", "(0.0, 1.0)", 0.0, 1.0)
_HALF = _Rule("scaled to [-1, 1]", "scaling to [-1, 1]", "({u} - 0.5) / 0.5", "(0.5, 0.5)",
              0.5, 0.5)
_BYTES = _Rule("scaled to 0-255", "multiplication by 255", "255 * {u}", "(0.0, 1 / 255)",
               0.0, 1 / 255)
_DIVIDED = _Rule("divided by 255", "division by 255", "{u} / 255", "(0.0, 255.0)", 0.0, 255.0)
_STATISTICS = _Rule("normalised with the ImageNet (or a similar) mean and std",
                    "normalisation with the ImageNet (or a similar) mean and std",
                    "({u} - mean) / std, with ImageNet " + _MEAN_STD + ",", str(IMAGENET),
                    *IMAGENET)


def candidates(to_image, channels, unit_formula):
    """List the other normalisations that are worth trying.

    Args:
        to_image: (scale, shift), numbers or [C]: the images as passed are `scale * u + shift` of
            the images u in [0, 1].
        channels: C; the ImageNet statistics need 3.
        unit_formula: how u is computed from x, in Python, e.g. "x / 255".

    Returns:
        List of `Candidate`, none of which leaves the images as they are.
    """
    scale, shift = (np.broadcast_to(np.asarray(a, float), (channels,)) for a in to_image)
    statistics = [_STATISTICS] if channels == 3 else []
    found = []

    def add(what, fix, new_scale, new_shift):
        # The new image as a function of u, rewritten as a function of the image as passed.
        slope = new_scale / scale
        offset = new_shift - slope * shift
        known = [(np.ones(channels), np.zeros(channels)), *((c.scale, c.shift) for c in found)]
        if not any(np.allclose(slope, a) and np.allclose(offset, b) for a, b in known):
            found.append(Candidate(what, fix, slope, offset))

    for rule in (_UNIT, _HALF, _BYTES, *statistics):
        formula = rule.formula.format(u=unit_formula)
        load = f" (gse_jax.models.load: normalize={rule.load})" if unit_formula == "x" else ""
        add(f"the images are {rule.verb}",
            f"Let apply_fn do it: lambda p, x: apply_fn(p, x1) with x1 = {formula}{load}.",
            *_affine(rule, channels))
    for inside in (_HALF, _DIVIDED, *statistics):
        for wanted in (_UNIT, _HALF, *statistics):
            if wanted is inside:
                continue
            # What must be passed for `inside` to turn it into what `wanted` makes of u.
            a, b = _affine(inside, channels)
            c, d = _affine(wanted, channels)
            add(f"the {inside.noun} that apply_fn seems to do is replaced by {wanted.noun}",
                f"Use x1 = {wanted.formula.format(u=unit_formula)} inside apply_fn "
                f"(gse_jax.models.load: normalize={wanted.load}).",
                scale * c / a, scale * (d - b) / a + shift)
    return found


def better_normalisation(logits, x, y, options):
    """Try the candidates and keep the best, if chance does not explain its lead.

    Args:
        logits: (x, affine) -> [N, K].
        x: [N, H, W, C] images.
        y: [N] labels.
        options: list of `Candidate`.

    Returns:
        `Verdict`, or None where the images are best as they are.
    """
    first = logits(x, None)
    right = first.argmax(-1) == y
    if right.all():
        return None

    def hit(option, where):
        return logits(x[where], (option.scale, option.shift)).argmax(-1) == y[where]

    # Most candidates ruin the model, which a few images show.
    few, everything = evenly_chosen(len(y), _SCREENED), np.arange(len(y))
    options = [o for o in options if hit(o, few).sum() >= right[few].sum()]
    hits = [hit(option, everything) for option in options]
    if not hits:
        return None
    best = max(range(len(options)), key=lambda i: hits[i].sum())
    won, lost = int((hits[best] & ~right).sum()), int((right & ~hits[best]).sum())
    if (won - lost) / len(y) < _LEAST_GAIN or at_least(won, won + lost, 0.5) > _LEVEL:
        return None
    # Guessing another class more often is no better normalisation.
    chance = 1 / first.shape[1]
    if hits[best].mean() < chance + _LEAST_SKILL * (1 - chance):
        return None
    return Verdict(options[best], float(right.mean()), float(hits[best].mean()), len(y))


def _affine(rule, channels):
    mean, std = (np.broadcast_to(np.asarray(a, float), (channels,)) for a in (rule.mean, rule.std))
    return 1 / std, -mean / std


def at_least(hits, count, p):
    """Return the probability of at least `hits` successes in `count` trials of probability p."""
    from scipy.stats import binom  # when needed

    return float(binom.sf(hits - 1, count, p))
