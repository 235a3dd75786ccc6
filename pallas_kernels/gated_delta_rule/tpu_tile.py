"""What the TPU kernels of the gated delta rule do with 128 tokens before they meet a state.

128 tokens fill the lanes of a register and a matrix unit. They are one chunk, or several that know
nothing of each other: the matrices over their pairs then hold one square per chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128
SQUARE = 16  # rows that are solved by substitution
# What stands where in the numbers per token, `[8 128]` per head and tile.
G, BETA, START, END, GROUP, VALID = range(6)
ROWS = 8
# exp of it is 0, and sums of it are finite.
LOWEST = -1e30
_ACROSS = (((1,), (1,)), ((), ()))  # a b^T
_DOWN = (((0,), (0,)), ((), ()))  # a^T b


class Tile(NamedTuple):
    """128 tokens i and j; README.md says what the letters are.

    Attributes:
        rows: the numbers per token, `[8 128]`.
        columns: the same, one `[128 1]` each.
        faded: D, `[i j]` float32; 0 where i does not see j.
        alike: k_i . k_j D_ij for j < i, float32.
        solved: T, float32.
    """

    rows: jax.Array
    columns: tuple[jax.Array, ...]
    faded: jax.Array
    alike: jax.Array
    solved: jax.Array


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in float32."""
    return _dot(a, b, (((1,), (0,)), ((), ())))


def dot_across(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in float32."""
    return _dot(a, b, _ACROSS)


def dot_down(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b in float32."""
    return _dot(a, b, _DOWN)


def _dot(a, b, dims):
    full = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=full, preferred_element_type=jnp.float32)


def read_tokens(ref: Any, at: Any, tile_rows: jax.Array, masked: bool) -> jax.Array:
    """128 tokens of a block `[1 tokens width]`, 0 where there is none, whatever stands there."""
    x = ref[0, at, :]
    if not masked:
        return x
    return jnp.where(columns_of(tile_rows)[VALID] > 0, x, jnp.zeros_like(x))


def columns_of(rows: jax.Array) -> tuple[jax.Array, ...]:
    """`[8 128]` as eight `[128 1]`."""
    turned = rows.T
    return tuple(turned[:, i : i + 1] for i in range(ROWS))


def inside(rows: jax.Array, k: jax.Array, chunk: int) -> Tile:
    """What the tokens are to each other, from the numbers per token and the keys."""
    columns = columns_of(rows)
    i, j = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
    # Sums of log decays over the tokens after j up to i: of their own terms alone, so that no digit
    # is lost where decays are strong.
    terms = jnp.where(i > j, columns[G], 0.0)
    sums = _sum_exactly(jnp.where(i >= j, 1.0, 0.0), terms)
    sees = (i >= j) & (columns[GROUP] == rows[GROUP : GROUP + 1])
    faded = jnp.exp(jnp.where(sees, sums, LOWEST))
    alike = jnp.where(i > j, dot_across(k, k) * faded, 0.0)
    return Tile(rows, columns, faded, alike, inverse(columns[BETA] * alike, chunk))


def _sum_exactly(ones: jax.Array, x: jax.Array) -> jax.Array:
    """ones x, for a matrix of zeros and ones: x in three parts that bfloat16 holds exactly."""
    ones, total = ones.astype(jnp.bfloat16), 0.0
    for _ in range(3):
        part = x.astype(jnp.bfloat16)
        x, total = x - part.astype(jnp.float32), total + dot(ones, part)
    return total


def inverse(lower: jax.Array, chunk: int) -> jax.Array:
    """(I + L)^-1 for L strictly lower triangular in squares of `chunk` on the diagonal.

    Squares of 16 by substitution, all of them side by side. Then squares of 32, 64, ... are made of
    two halves each: with T the inverses so far and L' what of L lies between halves, T - T L' T, of
    which only the rows of the second halves change. The product of powers (I - L)(I + L^2)... would
    be shorter, and wrong (core/triangular.py).
    """
    i, j = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
    apart = i ^ j  # its highest bit is the size of the halves that part i and j
    found = _spread(_substitute(_side_by_side(lower)))
    size = SQUARE
    while size < chunk:
        halves = [found[at : at + size] for at in range(0, TILE, size)]
        between = jnp.where((apart >= size) & (apart < 2 * size), lower, 0.0)
        corners = dot(dot(jnp.concatenate(halves[1::2]), between), found)
        for n in range(len(halves) // 2):
            halves[2 * n + 1] -= corners[n * size : (n + 1) * size]
        found = jnp.concatenate(halves)
        size *= 2
    return found


def _side_by_side(square: jax.Array) -> jax.Array:
    """The squares of 16 on the diagonal of `[128 128]` as `[16 128]`."""
    lane = lax.broadcasted_iota(jnp.int32, (SQUARE, TILE), 1) & -SQUARE
    out = square[:SQUARE]
    for n in range(1, TILE // SQUARE):
        out = jnp.where(lane == n * SQUARE, square[n * SQUARE : (n + 1) * SQUARE], out)
    return out


def _spread(squares: jax.Array) -> jax.Array:
    """The inverse of `_side_by_side`, 0 elsewhere."""
    lane = lax.broadcasted_iota(jnp.int32, (SQUARE, TILE), 1) & -SQUARE
    parts = [jnp.where(lane == n * SQUARE, squares, 0.0) for n in range(TILE // SQUARE)]
    return jnp.concatenate(parts)


def _substitute(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 of the squares in `[16 128]`: row after row is taken off the rows below it."""
    row, lane = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    first = lane & -SQUARE  # of the square
    found = jnp.where(row == lane - first, 1.0, 0.0)
    for j in range(SQUARE - 1):
        column = jnp.take_along_axis(lower, first + j, axis=1)
        found = found - column * found[j : j + 1]
    return found
