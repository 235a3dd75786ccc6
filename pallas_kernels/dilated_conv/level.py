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

# Elements of a tile: 128 KiB in float32, which a core's second cache holds with what comes of it.
_TILE = 2**15
# The same where taps' gradients are summed, each in a loop of its own over the whole tile: two such
# tiles fit into the first cache.
_SUMS_TILE = 2**13
# Parts of a tile whose products are added up at once when a tap's gradient is summed.
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
        edges: x holds the rows before the first token, which have a gradient too (then forward is
            0); else they are 0.
    """

    tile: Tile
    forward: int
    activation: str
    edges: bool


def tile_of(b: int, t: int, dilation: int, e: int, taps: int) -> Tile:
    """The tile for t tokens in phases of `dilation`; neighbours hold all that its taps reach."""
    n = -(-t // dilation)
    most = max(_TILE // e, taps - 1, 1)
    most += -most % _GROUPS
    rows = max(-(-n // -(-n // most)), min(n, taps - 1))
    if rows > _GROUPS:
        rows += -rows % _GROUPS
    phases = divisor(dilation, most // rows)
    batch = divisor(b, most // (rows * phases)) if phases == dilation else 1
    return Tile(batch, rows, phases, -(-n // rows) * rows)


def finer(tile: Tile, e: int, taps: int) -> Tile:
    """A part of the tile, to sum gradients of taps in."""
    most = max(_SUMS_TILE // e, 1)
    whole = [k for k in range(1, tile.rows + 1) if tile.rows % k == 0 and k >= taps - 1]
    even = [k for k in whole if k % _GROUPS == 0] or whole or [tile.rows]
    rows = min(even, key=lambda k: max(k / most, most / k))
    phases = divisor(tile.phases, most // rows)
    batch = divisor(tile.batch, most // (rows * phases)) if phases == tile.phases else 1
    return Tile(batch, rows, phases, tile.n)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is no larger."""
    return max(k for k in range(1, max(1, min(n, most)) + 1) if n % k == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def level(x, weight, bias, behind, ahead, how):
    """The next level `[b n d e]`.

    Args:
        x: `[b n d e]`, inputs by row and phase; with how.edges w - 1 rows more before them.
        weight: `[w e]`; tap j looks back j - how.forward rows, 0 beyond both ends.
        bias: `[e]`.
        behind, ahead: int32 `[b n d 1]`, how many tokens each one sees; None = all.
        how: see How.
    """
    b, _, d, e = x.shape
    w, tile = weight.shape[0], how.tile

    def body(at, out):
        part = _inputs(x, at, w, how)
        sights = [_cut(sight, at, tile) for sight in (behind, ahead)]
        a = _sum(part, weight, bias, sights, d, how.forward)
        return _put(out, next_level(_tap(part, w, how.forward), a, how.activation), at)

    return _each(tile, (b, d), body, jnp.zeros((b, tile.n, d, e), x.dtype))


def _level_forward(x, weight, bias, behind, ahead, how):
    return level(x, weight, bias, behind, ahead, how), (x, weight, bias, behind, ahead)


def _level_backward(how, residuals, dy):
    x, weight, bias, behind, ahead = residuals
    b, rows, d, e = x.shape
    w, tile = weight.shape[0], how.tile

    # Three passes: what is computed in one is in memory for the next. Within a pass XLA would
    # compute da again for the gradient of each tap.
    def through_relu(at, da):
        a = _sum(_inputs(x, at, w, how), weight, bias, cuts(at), d, how.forward)
        return _put(da, jnp.where(a > 0, _cut(dy, at, tile), 0), at)

    small = finer(tile, e, w)

    def products(at, sums):
        part, g = _inputs(x, at, w, how._replace(tile=small)), _cut(da, at, small)
        seen = [_cut(sight, at, small) for sight in (behind, ahead)]
        new = [_products(_seen(g, seen, (j - how.forward) * d), _tap(part, w, j)) for j in range(w)]
        return [old + more for old, more in zip(sums, [*new, _products(g)], strict=True)]

    cuts = lambda at: [_cut(sight, at, tile) for sight in (behind, ahead)]
    da = dy
    if how.activation == "relu_res":
        da = _each(tile, (b, d), through_relu, jnp.zeros_like(dy))
    by_row, by_phase = _groups(small.rows, small.phases)
    shape = (small.batch, small.rows // by_row, small.phases // by_phase, e)
    zero = jnp.zeros(shape, dy.dtype)
    *dweight, dbias = (
        jnp.sum(total, axis=(0, 1, 2)) for total in _each(small, (b, d), products, [zero] * (w + 1))
    )

    # x[q] is read by row q + j - forward through tap j.
    before, after, back = how.forward, w - 1 - how.forward, tile
    if how.edges:  # rows of x begin w - 1 before those of da
        back = tile_of(b, rows * d, d, e, w)
        lay = lambda x, fill=0: jnp.pad(
            x, ((0, 0), (w - 1, back.n - rows), (0, 0), (0, 0)), constant_values=fill
        )
        before, after = 0, w - 1
        da, dy = lay(da), lay(dy)
        behind, ahead = None if behind is None else lay(behind, -1), None

    def spreads(at, out):
        g = _around(da, at, back, before, after)
        sights = [_around(sight, at, back, before, after, -1) for sight in (behind, ahead)]
        total = _cut(dy, at, back) if how.activation == "relu_res" else 0
        for j in range(w):
            part = _seen(g, sights, (j - how.forward) * d)
            total = total + weight[j] * part[:, j : j + back.rows]
        return _put(out, total, at)

    dx = _each(back, (b, d), spreads, jnp.zeros((b, back.n, d, e), dy.dtype))
    return dx[:, :rows], jnp.stack(dweight), dbias, None, None


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


def _groups(rows: int, phases: int) -> tuple[int, int]:
    """Into how many parts rows are cut, and phases where there are few rows."""
    by_row = math.gcd(rows, _GROUPS) if rows > _GROUPS else rows
    return by_row, math.gcd(phases, _GROUPS // by_row)


def _products(*factors):
    """Their product `[b rows p e]`, with parts of the rows and phases added up.

    Term by term: XLA makes one loop of it over whole vectors, which it does of no sum over an axis.
    """
    _, rows, phases, _ = factors[0].shape
    by_row, by_phase = _groups(rows, phases)
    row, phase = rows // by_row, phases // by_phase
    parts = [
        math.prod(x[:, i : i + row, k : k + phase] for x in factors)
        for i in range(0, rows, row)
        for k in range(0, phases, phase)
    ]
    return sum(parts[1:], start=parts[0])


def _each(tile: Tile, sizes: tuple[int, int], body: Callable, carry: Any) -> Any:
    """Runs `body((batch, row, phase, 0) of a tile's begin, carry) -> carry` over all tiles."""
    b, d = sizes
    by_row, by_phase = tile.n // tile.rows, d // tile.phases
    count = b // tile.batch * by_row * by_phase

    def step(i, carry):
        phase = i % by_phase * tile.phases
        row = i // by_phase % by_row * tile.rows
        return body((i // (by_phase * by_row) * tile.batch, row, phase, 0), carry)

    return jax.lax.fori_loop(0, count, step, carry)


def _inputs(x, at, w: int, how: How):
    """A tile of x with the rows around it that w taps read."""
    if how.edges:
        return _cut(x, at, how.tile, w - 1)
    return _around(x, at, how.tile, w - 1 - how.forward, how.forward)


def _cut(x, at, tile: Tile, more: int = 0):
    """A tile, with so many rows more behind it."""
    if x is None:
        return None
    shape = (tile.batch, tile.rows + more, tile.phases, x.shape[3])
    return jax.lax.optimization_barrier(jax.lax.dynamic_slice(x, at, shape))


def _around(x, at, tile: Tile, before: int, after: int, fill=0):
    """A tile with rows before and after it, `fill` beyond the ends of x."""
    if x is None:
        return None
    cut = lambda row, rows: jax.lax.dynamic_slice(
        x, (at[0], row, at[2], 0), (tile.batch, rows, tile.phases, x.shape[3])
    )
    row, end = at[1], at[1] + tile.rows
    parts = [cut(row, tile.rows)]
    if before:
        rows = cut(jnp.maximum(row - before, 0), before)
        parts.insert(0, jnp.where(row > 0, rows, fill))
    if after:
        rows = cut(jnp.minimum(end, tile.n - after), after)
        parts.append(jnp.where(end < tile.n, rows, fill))
    return jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1))


def _put(x, part, at):
    return jax.lax.dynamic_update_slice(x, part, at)
