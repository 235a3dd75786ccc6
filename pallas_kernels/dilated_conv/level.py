"""One level of the stack, tile by tile, so that what its taps read again is still in the cache.

With dilation d, token t lies in row t // d, phase t % d: taps then step from row to row, whatever
d is. A tile is some rows of some phases; it is copied together, and everything is done to it at
once: all taps, and in the backward pass the gradient of every tap.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_conv.reference import level as next_level

# Elements of a tile: 256 KiB in float32, which a core's second cache holds with the result.
_TILE = 2**16
# Rows whose products are added up at once when a tap's gradient is summed.
_GROUPS = 16


class Tile(NamedTuple):
    """What is done at once.

    Attributes:
        batch, rows, phases: of a tile.
        n: rows in all, a multiple of rows.
    """

    batch: int
    rows: int
    phases: int
    n: int


class How(NamedTuple):
    """What is static of a level.

    Attributes:
        tile: what is done at once.
        forward: taps that look ahead.
        activation: "relu_res" or "linear".
        edges: whether the rows before the first token and after the last have a gradient.
    """

    tile: Tile
    forward: int
    activation: str
    edges: bool


def tile_of(b: int, t: int, dilation: int, e: int) -> Tile:
    """The tile for t tokens in phases of `dilation`."""
    n = -(-t // dilation)
    most = max(1, _TILE // e)
    if most > _GROUPS:
        most -= most % _GROUPS
    rows = -(-n // -(-n // most))
    if rows > _GROUPS:
        rows += -rows % _GROUPS
    phases = _divisor(dilation, most // rows)
    batch = _divisor(b, most // (rows * phases)) if phases == dilation else 1
    return Tile(batch, rows, phases, -(-n // rows) * rows)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is no larger."""
    return max(k for k in range(1, max(1, min(n, most)) + 1) if n % k == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def level(padded, weight, bias, behind, ahead, how):
    """The next level `[b n d e]`.

    Args:
        padded: `[b w-1+n d e]`, inputs by row and phase, with what the first and the last row see
            beyond them.
        weight: `[w e]`; tap j looks back j - how.forward rows.
        bias: `[e]`.
        behind, ahead: int32 `[b n d 1]`, how many tokens each one sees; None = all.
        how: see How.
    """
    b, _, d, e = padded.shape
    w, tile = weight.shape[0], how.tile

    def body(at, out):
        x = _cut(padded, at, tile, w - 1)
        sights = [_cut(sight, at, tile) for sight in (behind, ahead)]
        a = _sum(x, weight, bias, sights, d, how.forward)
        return _put(out, next_level(_tap(x, w, how.forward), a, how.activation), at)

    return _each(tile, (b, d), body, jnp.zeros((b, tile.n, d, e), padded.dtype))


def _level_forward(padded, weight, bias, behind, ahead, how):
    y = level(padded, weight, bias, behind, ahead, how)
    return y, (padded, weight, bias, behind, ahead)


def _level_backward(how, residuals, dy):
    padded, weight, bias, behind, ahead = residuals
    b, rows, d, e = padded.shape
    w, n, tile = weight.shape[0], dy.shape[1], how.tile
    before = w - 1 - how.forward  # rows of padded before the first token's
    lead = w - 1 if how.edges else how.forward
    spread = tile_of(b, rows * d, d, e) if how.edges else tile  # of the gradient of padded

    def products(at, carry):
        da, sums = carry
        x, g = _cut(padded, at, tile, w - 1), _cut(dy, at, tile)
        sights = [_cut(sight, at, tile) for sight in (behind, ahead)]
        if how.activation == "relu_res":
            g = jnp.where(_sum(x, weight, bias, sights, d, how.forward) > 0, g, 0)
            g = jax.lax.optimization_barrier(g)
        parts = [
            _grouped(_seen(g, sights, (j - how.forward) * d) * _tap(x, w, j)) for j in range(w)
        ]
        sums = [old + new for old, new in zip(sums, [*parts, _grouped(g)], strict=True)]
        return _put(da, g, (at[0], at[1] + lead, *at[2:])), sums

    zero = jnp.zeros((tile.batch, tile.rows // _groups(tile.rows), tile.phases, e), dy.dtype)
    da = jnp.zeros((b, spread.n + w - 1, d, e), dy.dtype)
    da, sums = _each(tile, (b, d), products, (da, [zero] * (w + 1)))
    *dweight, dbias = (jnp.sum(total, axis=(0, 1, 2)) for total in sums)

    def around(x, fill=0):  # as da lies
        after = spread.n + w - 1 - n - lead
        return jnp.pad(x, ((0, 0), (lead, after), (0, 0), (0, 0)), constant_values=fill)

    past = dy if not how.edges else around(dy)[:, how.forward :]
    behind, ahead = (None if x is None else around(x, -1) for x in (behind, ahead))

    def spreads(at, out):
        g = _cut(da, at, spread, w - 1)
        sights = [_cut(sight, at, spread, w - 1) for sight in (behind, ahead)]
        total = _cut(past, at, spread) if how.activation == "relu_res" else 0
        for j in range(w):
            part = _seen(g, sights, (j - how.forward) * d)
            total = total + weight[j] * part[:, j : j + spread.rows]
        return _put(out, total, at)

    dx = _each(spread, (b, d), spreads, jnp.zeros((b, spread.n, d, e), dy.dtype))
    dx = dx[:, :rows]
    if not how.edges:
        dx = jnp.pad(dx, ((0, 0), (before, how.forward), (0, 0), (0, 0)))
    return dx, jnp.stack(dweight), dbias, None, None


level.defvjp(_level_forward, _level_backward)


def _sum(x, weight, bias, sights, d, forward):
    """a of a tile, from its inputs with the rows around them."""
    w = weight.shape[0]
    total = bias
    for j in range(w):
        total = total + weight[j] * _seen(_tap(x, w, j), sights, (j - forward) * d)
    return total


def _tap(x, w: int, j: int):
    """What tap j of w reads, for every row of a tile."""
    return jax.lax.slice_in_dim(x, w - 1 - j, x.shape[1] - j, axis=1)


def _seen(x, sights, lag: int):
    """Sets to 0 where a tap of this lag looks into another document."""
    behind, ahead = sights
    if behind is None or lag == 0:
        return x
    return jnp.where(lag <= behind if lag > 0 else -lag <= ahead, x, 0)


def _groups(rows: int) -> int:
    return math.gcd(rows, _GROUPS) if rows > _GROUPS else rows


def _grouped(x):
    """`[b rows p e]` with the rows added up in groups; XLA makes one quick loop of it."""
    b, rows, p, e = x.shape
    groups = _groups(rows)
    return jnp.sum(x.reshape(b, groups, rows // groups, p, e), axis=1)


def _each(tile: Tile, sizes: tuple[int, int], body: Callable, carry: Any) -> Any:
    """Runs `body((batch, row, phase, 0) of a tile's begin, carry) -> carry` over all tiles."""
    b, d = sizes
    by_row, by_phase = tile.n // tile.rows, d // tile.phases
    count = b // tile.batch * by_row * by_phase
    if count == 1:
        return body((0, 0, 0, 0), carry)

    def step(i, carry):
        phase = i % by_phase * tile.phases
        row = i // by_phase % by_row * tile.rows
        return body((i // (by_phase * by_row) * tile.batch, row, phase, 0), carry)

    return jax.lax.fori_loop(0, count, step, carry)


def _cut(x, at, tile: Tile, more: int = 0):
    """A tile, with so many rows more behind it."""
    if x is None:
        return None
    shape = (tile.batch, tile.rows + more, tile.phases, x.shape[3])
    return jax.lax.optimization_barrier(jax.lax.dynamic_slice(x, at, shape))


def _put(x, part, at):
    return jax.lax.dynamic_update_slice(x, part, at)
