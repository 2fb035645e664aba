r"""Bregman projection onto a ball of the sum of group maxima, for the log-entropy mirror map.

The mirror map `phi(x) = sum_i (|x_i| + 1) log(|x_i| + 1) - |x_i|` has the gradient
`sign(x) log(1 + |x|)`; points with the gradient z are `sign(z) (exp |z| - 1)`.

References:
    github jsve96/GSMD, attacks.py, GSMD_exact (the problem that is solved).
    Duchi, Shalev-Shwartz, Singer, Chandra, Efficient projections onto the l1-ball, 2008 (thresholds
    from sorted partial sums).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

_MOST_PAIRED = 64  # members of a group up to which each is compared with each


def to_dual(x):
    """Return the mirror map's gradient.

    Args:
        x: [...].

    Returns:
        [...] `sign(x) log(1 + |x|)`.
    """
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def grid_cells(height: int, width: int, per_axis: int) -> np.ndarray:
    """Return the cell of every pixel in a grid of `per_axis` x `per_axis` cells.

    Args:
        height: pixels, >= per_axis.
        width: pixels, >= per_axis.
        per_axis: int >= 1; the last cells take what is left over.

    Returns:
        [H, W] NumPy int32, numbered row by row from 0.
    """
    row = np.minimum(np.arange(height) // (height // per_axis), per_axis - 1)
    column = np.minimum(np.arange(width) // (width // per_axis), per_axis - 1)
    return (row[:, None] * per_axis + column[None, :]).astype(np.int32)


def _members(cells, channels):
    """[groups, largest group] indices into the flat image, -1 where a group is smaller."""
    flat = np.repeat(cells.reshape(-1), channels)
    lists = [np.flatnonzero(flat == g) for g in range(flat.max() + 1)]
    table = np.full((len(lists), max(map(len, lists))), -1)
    for row, members in zip(table, lists):
        row[:len(members)] = members
    return table


def _partial_sums(m, weight):
    """Sum, for every member, the weights of the members of its group that reach as far as it does.

    Args:
        m: [groups, members] how far each reaches.
        weight: [groups, members].

    Returns:
        (m, in any order; the sums [groups, members]; over how many members each sum goes).
    """
    if m.shape[1] > _MOST_PAIRED:
        falling, weight = lax.sort((-m, weight), dimension=1, num_keys=1)
        return -falling, jnp.cumsum(weight, axis=1), jnp.arange(1, m.shape[1] + 1, dtype=m.dtype)[None]

    def add(member, so_far):
        reaches = m[:, member, None] >= m
        return (so_far[0] + jnp.where(reaches, weight[:, member, None], 0.0),
                so_far[1] + reaches.astype(m.dtype))

    # Every member with every other: a CPU's sort takes six times as long.
    zero = jnp.zeros_like(m)
    return m, *lax.fori_loop(0, m.shape[1], add, (zero, zero), unroll=8)


def project_group_maxima(z, cells, budget, lower, upper):
    r"""Solve argmin_x D_phi(x, x_0) with sum_g max_{i in g} |x_i| <= budget, lower <= x <= upper.

    x_0 is the point whose dual is z. The solution keeps signs and cuts each group at a radius:
    `|x_i| = min(exp |z_i| - 1, c_i, r_g)` with c_i the bound on i's side. A multiplier L >= 0 of
    the budget gives the radii: with `rho = log(1 + r_g)` and m_i = min(|z_i|, log(1 + c_i)),
    `sum_{i: m_i > rho} (|z_i| - rho) = L`, that is `rho = max_k min(m_(k), (S_k - L) / k)` over the
    members in descending order of m, S_k the sum of their first k |z|.

    Args:
        z: [H, W, C] dual point.
        cells: [H, W] NumPy int, group of every pixel, numbered from 0; static.
        budget: [] > 0.
        lower: [H, W, C] <= 0.
        upper: [H, W, C] >= 0.

    Returns:
        [H, W, C].
    """
    channels, size = z.shape[-1], jnp.abs(z)
    side = jnp.where(z >= 0.0, upper, -lower)
    reach = jnp.minimum(size, jnp.log1p(side))

    members = _members(cells, channels)
    inside = members >= 0
    # A place without a member reaches nowhere: its minimum is negative and never the largest.
    m = jnp.where(inside, reach.reshape(-1)[members], -1.0)
    weight = jnp.where(inside, size.reshape(-1)[members], 0.0)
    m, sums, count = _partial_sums(m, weight)
    share = 1.0 / count
    mean = sums * share

    def dual_radii(multiplier):
        return jnp.maximum(jnp.max(jnp.minimum(m, mean - multiplier * share), axis=1), 0.0)

    radius = fitting_radii(dual_radii, jnp.max(sums), budget)
    radius = radius[cells.reshape(-1)].reshape(*cells.shape, 1)
    return jnp.sign(z) * jnp.minimum(jnp.minimum(jnp.expm1(size), side), radius)


def fitting_radii(dual_radii, highest, budget):
    """Return the radii of the smallest multiplier whose sum of radii is within the budget.

    Args:
        dual_radii: multiplier [] -> [groups] rho, falling in the multiplier.
        highest: [] multiplier at which all radii are 0.
        budget: [] > 0.

    Returns:
        [groups] `exp rho - 1`.
    """
    zero = jnp.zeros_like(highest)

    def halve(_, interval):
        low, high = interval
        middle = 0.5 * (low + high)
        fits = jnp.sum(jnp.expm1(dual_radii(middle))) <= budget
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    # A loop, because the multiplier has no closed form.
    free = jnp.sum(jnp.expm1(dual_radii(zero))) <= budget
    halvings = jnp.finfo(highest.dtype).nmant + 6  # to the last bit of a usual multiplier
    _, multiplier = lax.fori_loop(0, halvings, halve, (zero, highest))
    return jnp.expm1(dual_radii(jnp.where(free, 0.0, multiplier)))
