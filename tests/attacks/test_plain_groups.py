"""StrAttack, Sparse-PGD with every structure, and GSMD on superpixels against plain NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.segmentation import slic

import gse_jax
from gse_jax import Status
from gse_jax.attacks.baselines.group_mirror_descent import GSMDHyperparams, GSMDSettings
from gse_jax.attacks.baselines.sparse_projected_gradient_descent import SparsePGDHyperparams, SparsePGDSettings
from gse_jax.attacks.baselines.structured_attack import StrAttackHyperparams, StrAttackSettings
from tests.attacks.test_plain import COUNT, SHAPE, SLOW, Plain, problem
from tests.toy_model import small_logits


class Point(Plain):
    """`Plain`, and what attacks that count model calls and look at the cross entropy ask."""

    def ce(self, w):
        z = self.logits(w)
        # Rounded as in the library: where it is nearly 0 its differences, which a line search divides by, are rounding.
        return (np.log(np.exp(z - z.max()).sum()) + z.max()) - z[self.label]

    def hinge(self, w):
        margin, gradient = self.margin(w)
        return gradient if margin >= 0 else np.zeros(SHAPE)


def compare(method, plain, targeted, trials, rtol=1e-9, images=COUNT, **options):
    """Attack with both; `plain(at, settings, hyperparams, i)` returns (perturbation, gradients, calls, trade-off)."""
    found = 0
    for number, (settings, hyperparams) in enumerate(trials):
        params, x, y, targets = problem(targeted, seed=number % 3)
        result = gse_jax.attack(params, small_logits, x, y, targets=targets, method=method, settings=settings,
                                hyperparams=hyperparams, **options)
        for i in range(images):
            at = Point(params, x[i], y[i], targets[i] if targeted else None)
            w, gradients, calls, tradeoff = plain(at, settings, hyperparams, i)
            np.testing.assert_allclose(result.adversarials[i] - x[i], w, atol=rtol, err_msg=f"{number} {i}")
            np.testing.assert_allclose(result.tradeoff[i], tradeoff, rtol=rtol)
            assert int(result.status[i]) == (Status.FOUND if w.any() else Status.NOT_FOUND)
            assert bool(result.success[i]) == bool(w.any())
            assert (int(result.gradient_evals[i]), int(result.forward_evals[i])) == (gradients, calls), (number, i)
            found += bool(w.any())
    assert found > 0


def first_quick(*settings):
    """(targeted, settings) of both directions; all but the first are slow, as each is a program of its own."""
    cases = [(targeted, one) for one in settings for targeted in (False, True)]
    return [pytest.param(*case, marks=SLOW if number else []) for number, case in enumerate(cases)]


def halved(c, lower, upper, success, growth):
    """The binary search over the weight of the loss."""
    lower, upper = (lower, min(upper, c)) if success else (max(lower, c), upper)
    return growth * c if np.isinf(upper) else (lower + upper) / 2, lower, upper


def shrunk(v, groups, amount):
    """Prox of the sum of the groups' norms; `groups` [H, W] numbers, `v` [H, W, C]."""
    norm = np.sqrt(np.bincount(groups.ravel(), (v * v).reshape(groups.size, -1).sum(-1)))[groups]
    factor = np.where(norm > amount, 1 - amount / np.maximum(norm, 1e-300), 0.0)
    return factor.reshape(factor.shape + (1,) * (v.ndim - 2)) * v


def plain_strattack(at, settings, params, i):
    rho, gamma, alpha, zero = params.rho, params.gamma, params.alpha, np.zeros(SHAPE)
    lower, upper = np.maximum(2 * at.lower, -params.radius), np.minimum(2 * at.upper, params.radius)
    row, column = np.indices(SHAPE[:2]) // settings.cell_size
    cells = row * 100 + column
    best, least, best_c, gradients, calls = zero, np.inf, 0.0, 0, 0
    inside = lambda w: np.clip(w, lower, upper)

    def slope(w):
        """c times the gradient of the hinge, in units of range width 2."""
        nonlocal gradients, calls
        gradients, calls = gradients + (at.margin(0.5 * w)[0] >= 0), calls + 1
        return c * 0.5 * at.hinge(0.5 * w)

    def test(w):
        """(adversarial, better)."""
        nonlocal best, least, best_c
        if not (w.any() and at.fools(0.5 * w)):
            return False, False
        better = (w**2).sum() < least
        if better:
            best, least, best_c = w, (w**2).sum(), c
        return True, better

    c, low, high = params.c, 0.0, np.inf
    for run in range(settings.num_searches):
        z, u, v, s, improved = zero, zero, zero, zero, False
        for k in range(settings.max_steps + settings.more_steps * run):
            eta, gradient = alpha * np.sqrt(k + 1), slope(inside(z))
            delta, w, y = rho / (rho + 2 * gamma) * (z - u), inside(z - s), shrunk(z - v, cells, params.tau / rho)
            z = (eta * z + rho * (delta + u + w + s + y + v) - gradient) / (eta + 3 * rho)
            u, v, s = u + delta - z, v + y - z, s + w - z
            length = (inside(y) ** 2).sum()
            if 0 < length < least:
                calls, improved = calls + 1, test(inside(y))[1] or improved
        c, low, high = halved(c, low, high, improved, 5.0)
    if not best.any():
        return zero, gradients, calls, 0.0
    c, low, high = 5.0, 0.0, np.inf
    for _ in range(settings.num_retrainings):
        size = np.abs(best[best != 0])
        support = np.abs(best) > np.percentile(size, 3, method="lower")
        onto = lambda w: np.where(support, inside(w * rho / (rho + 0.01 * gamma)), 0.0)
        z, y, u, enough, since = best, onto(best), zero, False, 0
        for k in range(settings.retrain_steps):
            adversarial, better = test(inside(y))
            enough |= better if settings.retrain_must_improve else adversarial
            since = k if better else since
            gradient = np.where(support, slope(inside(y)), 0.0)
            z = (alpha * z + rho * (y + u) - gradient) / (alpha + 2 * rho)
            u = u + y - z
            y = onto(z - u)
            if settings.retrain_patience and k + 1 - since >= settings.retrain_patience:
                break
        c, low, high = halved(c, low, high, enough, 5.0)
    return 0.5 * best, gradients, calls, best_c


FIRST = StrAttackSettings(num_searches=4, max_steps=30, more_steps=5, num_retrainings=3, retrain_steps=15, cell_size=3)
SECOND = StrAttackSettings(num_searches=3, max_steps=60, num_retrainings=4, retrain_steps=20, cell_size=5,
                           retrain_must_improve=False, retrain_patience=6)


@pytest.mark.parametrize("targeted, settings", first_quick(FIRST, SECOND))
def test_strattack(targeted, settings):
    compare("strattack", plain_strattack, targeted, [(settings, StrAttackHyperparams(*values)) for values in (
        ((2.0, 1.0, 0.1), (20.0, 0.1, 0.5, 2.0, 1.0, 0.6)) if settings is FIRST else
        ((5.0, 0.3, 0.2, 0.5, 2.0, 0.4), (1.0, 0.5, 0.05, 3.75, 1.25)))])


PATTERN = ((1, 0, 1), (1, 1, 1))


def plain_sparse_pgd(at, settings, params, i, key=jax.random.key(5)):
    draw = lambda function, *counters: np.asarray(function(_folded(key, i, *counters)))
    structure, stride = settings.structure, settings.stride
    pattern = np.array(settings.pattern if structure == "patch" else {
        "pixel": [[1]], "row": [[1] * SHAPE[1]], "column": [[1]] * SHAPE[0]}[structure], bool)
    stride = stride if structure == "patch" else 1
    grid = tuple((n - m) // stride + 1 for n, m in zip(SHAPE[:2], pattern.shape))
    blocks = min(settings.num_pixels // pattern.sum(), grid[0] * grid[1])
    lower, upper = np.maximum(at.lower, -params.radius), np.minimum(at.upper, params.radius)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))

    def kept(m):
        mask = np.zeros(m.size)
        mask[np.argsort(-m, axis=None, kind="stable")[:blocks]] = 1.0
        return mask.reshape(m.shape)

    def spread(m):
        out = np.zeros(SHAPE[:2])
        for r, q in np.ndindex(grid):
            out[r * stride:r * stride + pattern.shape[0], q * stride:q * stride + pattern.shape[1]] += m[r, q] * pattern
        return np.minimum(out, 1.0)[..., None]

    def averaged(image):
        block = lambda r, q: image[r:r + pattern.shape[0], q:q + pattern.shape[1]][pattern]
        return np.array([[block(r * stride, q * stride).mean() for q in range(grid[1])] for r in range(grid[0])])

    def climb(w):
        z = at.logits(w)
        gap = z[at.y] - np.delete(z, at.y).max()
        return -at.margin(w)[1] if gap < 0.5 else at.climb(w)

    p = np.clip(params.radius * draw(lambda k: jax.random.uniform(k, SHAPE, jnp.float64, -1, 1), 0), lower, upper)
    scores = lambda step: draw(lambda k: jax.random.normal(k, grid, jnp.float64), 1, step)
    m, unchanged, calls = scores(0), 0, 1
    for step in range(settings.max_steps + 1):
        w, calls = p * (spread(kept(m)) > 0), calls + 1
        if at.fools(w) and w.any():
            return w, calls, calls, 0.0
        gradient = climb(w)
        if unchanged >= settings.patience:
            m, unchanged = scores(step + 1), 1
            continue
        soft = sigmoid(m)
        gain = averaged((gradient * p).sum(-1)) * soft * (1 - soft)
        length = np.linalg.norm(gain)
        rate = 0.0 if length < 2e-10 else params.mask_step_size * np.sqrt(m.size)
        reach = spread(soft if settings.unprojected else kept(m))
        p = np.clip(p + params.step_size * params.radius * np.sign(gradient * reach), lower, upper)
        new = m + rate * gain / (length + 1e-10)
        unchanged, m = (unchanged + 1 if (kept(new) == kept(m)).all() else 0), new
    return np.zeros(SHAPE), calls, calls, 0.0


def _folded(key, *counters):
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


@pytest.mark.parametrize("targeted, settings", [
    *first_quick(
        SparsePGDSettings(num_pixels=17, max_steps=15, structure="patch", pattern=PATTERN, stride=2, patience=2),
        SparsePGDSettings(num_pixels=5, max_steps=15),
        SparsePGDSettings(num_pixels=30, max_steps=15, structure="row"),
        SparsePGDSettings(num_pixels=26, max_steps=12, structure="column"),
        SparsePGDSettings(num_pixels=15, max_steps=15, structure="patch", pattern=PATTERN, unprojected=False)),
    *(pytest.param(targeted, SparsePGDSettings(num_pixels=5, max_steps=15, unprojected=False, patience=1),
                   marks=SLOW if targeted else []) for targeted in (False, True))])
def test_sparse_pgd(targeted, settings):
    compare("sparse_pgd", plain_sparse_pgd, targeted, [(settings, SparsePGDHyperparams(*values)) for values in (
        (), (0.7, 0.1, 1.0), (0.4, 0.5, 0.05))], key=jax.random.key(5))


def bregman(z, groups, budget, lower, upper):
    """The point under the mirror map's preimage of z with sum of group maxima <= budget, by nested bisections."""
    size, side = np.abs(z), np.where(z >= 0, upper, -lower)
    reach = np.minimum(size, np.log1p(side))

    def radius(members, multiplier):
        """rho with sum of (|z_i| - rho) over members that reach beyond it = multiplier."""
        low, high = 0.0, members[0].max()
        for _ in range(60):
            rho = (low + high) / 2
            over = (members[1][members[0] > rho] - rho).sum()
            low, high = (rho, high) if over > multiplier else (low, rho)
        return high if high > 1e-16 else 0.0

    names = np.unique(groups)
    members = [(reach[groups == g].ravel(), size[groups == g].ravel()) for g in names]
    total = lambda multiplier: [np.expm1(radius(m, multiplier)) for m in members]
    if sum(np.expm1(m[0].max()) for m in members) <= budget:
        radii = [np.expm1(m[0].max()) for m in members]
    else:
        low, high = 0.0, max(m[1].sum() for m in members)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(total(middle)) <= budget else (middle, high)
        radii = total(high)
    limit = np.zeros(groups.shape)
    for g, r in zip(names, radii):
        limit[groups == g] = r
    return np.sign(z) * np.minimum(np.minimum(np.expm1(size), side), limit[..., None])


def plain_gsmd(at, settings, params, i):
    n = settings.cells_per_axis
    groups, most = slic(at.x, n_segments=n * n, compactness=10.0, sigma=5.0, channel_axis=-1), 10
    w, budget, squares, kept = np.zeros(SHAPE), params.budget, 0.0, np.ones(SHAPE[:2], bool)
    best, least, calls = np.zeros(SHAPE), (np.inf, np.inf), 0
    for step in range(settings.max_steps + 1):
        inside, fools, calls = np.clip(0.5 * w, at.lower, at.upper), at.fools(0.5 * w), calls + 1
        score = ((w != 0).any(-1).sum(), np.linalg.norm(w))
        if step and fools and w.any() and score < least:
            best, least = inside, score
        budget = max(budget * (1 - params.rate if fools else 1 + params.rate), 1e-3)
        descent = 0.5 * at.climb(inside)
        squares += (descent**2).max()
        dual = np.sign(w) * np.log1p(np.abs(w)) + params.learning_rate / np.sqrt(squares + 1e-12) * descent
        new = bregman(dual, groups, budget, 2 * at.lower, 2 * at.upper)
        if step == settings.max_steps // 2:
            count = max(round(1 + (most - 1) * (1 - np.exp(-at.ce(inside)))), 1)
            names = np.unique(groups)
            largest = np.array([np.abs(new[groups == g]).max() for g in names])
            kept = np.isin(groups, names[np.argsort(-largest, kind="stable")[:count]])
        w = np.where(kept[..., None], new, 0.0)
    return best, calls, calls, 0.0


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [False, True])
def test_gsmd(targeted):
    settings = GSMDSettings(max_steps=8, cells_per_axis=3, groups="superpixels")
    compare("gsmd", plain_gsmd, targeted, [(settings, GSMDHyperparams(*values)) for values in (
        (0.5, 0.1, 1.0), (3.0, 0.3, 0.5))], images=2)
