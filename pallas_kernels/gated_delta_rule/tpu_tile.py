"""What the TPU kernels of the gated delta rule do with 128 tokens before they meet a state.

128 tokens (a tile) fill the lanes of a register and a matrix unit. They are one chunk of c tokens,
or several that know nothing of each other. Numbers of pairs stand packed: `[c 128]` has in row i
and lane (p, j) what is between tokens i and j of chunk p; spread, `[128 128]` with one square per
chunk on the diagonal, they are factors of a matrix product.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

TILE = 128
SQUARE = 16  # rows that are solved by substitution
# What stands where in the numbers per token, `[8 128]` per head and tile.
G, BETA, START, END, DOCUMENT, VALID = range(6)
ROWS = 8
# exp of it is 0, and sums of it are finite.
LOWEST = -1e30


class Tile(NamedTuple):
    """Where a tile stands.

    Attributes:
        at: its tokens in arrays by token.
        packed: its rows in arrays `[... 128]` of packed pairs.
        rows: the numbers per token, `[8 128]`.
    """

    at: Any
    packed: Any
    rows: jax.Array


class Pairs(NamedTuple):
    """References to packed pairs, float32.

    Attributes:
        faded: D; 0 where i does not see j.
        lower: L, 0 for j >= i.
        solved: T.
        alike: k_i . k_j D_ij for j < i, or None where nobody asks for it.
    """

    faded: Any
    lower: Any
    solved: Any
    alike: Any = None


# --- Products ----------------------------------------------------------------------------------


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in float32."""
    return _dot(a, b, (((1,), (0,)), ((), ())))


def dot_across(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in float32."""
    return _dot(a, b, (((1,), (1,)), ((), ())))


def dot_down(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b in float32."""
    return _dot(a, b, (((0,), (0,)), ((), ())))


def _dot(a, b, dims):
    full = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=full, preferred_element_type=jnp.float32)


def _parts(x: jax.Array) -> list[jax.Array]:
    """x as the sum of three numbers that bfloat16 holds exactly, in float32."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts


def _sum_exactly(ones: jax.Array, x: jax.Array) -> jax.Array:
    """ones x in full precision, for a matrix of zeros and ones."""
    ones = ones.astype(jnp.bfloat16)
    return sum(dot(ones, part.astype(jnp.bfloat16)) for part in _parts(x))


def _dot_spread(a: jax.Array, b: jax.Array, c: int) -> jax.Array:
    """a by the spread of b in full precision, both `[... 128]` float32.

    What lax.Precision.HIGHEST does, but b is taken apart while it is packed, and each of its parts
    is a factor once.
    """
    size = a.shape[0]
    a = jnp.concatenate([x.astype(jnp.bfloat16) for x in _parts(a)])
    total = 0.0
    for n, part in enumerate(_parts(b)):
        found = dot(a[: (3 - n) * size], spread(part, c).astype(jnp.bfloat16))
        total = total + sum(found[m * size : (m + 1) * size] for m in range(3 - n))
    return total


# --- Layouts -----------------------------------------------------------------------------------


def rows_of(at: Any, first: int, size: int) -> Any:
    """Rows of a tile, from the first-th on."""
    return pl.ds(pl.multiple_of(at.start + first, SQUARE), size)


def columns_of(rows: jax.Array) -> tuple[jax.Array, ...]:
    """`[8 128]` as eight `[128 1]`."""
    turned = rows.T
    return tuple(turned[:, i : i + 1] for i in range(ROWS))


def places(c: int) -> tuple[jax.Array, jax.Array]:
    """i and j of packed pairs, int32 `[c 128]`."""
    i, lane = (lax.broadcasted_iota(jnp.int32, (c, TILE), axis) for axis in (0, 1))
    return i, lane & (c - 1)


def pack(x: jax.Array, c: int) -> jax.Array:
    """The squares on the diagonal of `[128 128]`, packed; or a column `[128 1]` for all their j."""
    lane = lax.broadcasted_iota(jnp.int32, (c, TILE), 1) & -c
    out = jnp.broadcast_to(x[:c], (c, TILE))
    for first in range(c, TILE, c):
        out = jnp.where(lane == first, x[first : first + c], out)
    return out


def spread(x: jax.Array, c: int) -> jax.Array:
    """`[c 128]` as `[128 128]`, 0 beside the squares."""
    if c == TILE:
        return x
    lane = lax.broadcasted_iota(jnp.int32, (c, TILE), 1) & -c
    return jnp.concatenate([jnp.where(lane == first, x, 0.0) for first in range(0, TILE, c)])


def sums_of_rows(x: jax.Array, c: int) -> jax.Array:
    """Sums over j of packed pairs, as a column `[128 1]`."""
    lane = lax.broadcasted_iota(jnp.int32, (c, TILE), 1) & -c
    own = [jnp.where(lane == first, x, 0.0) for first in range(0, TILE, c)]
    return jnp.concatenate([jnp.sum(one, axis=1, keepdims=True) for one in own])


def read_tokens(ref: Any, tile: Tile, masked: bool) -> jax.Array:
    """128 tokens of a block `[1 tokens width]`, 0 where there is none, whatever stands there."""
    x = ref[0, tile.at, :]
    if not masked:
        return x
    return jnp.where(columns_of(tile.rows)[VALID] > 0, x, jnp.zeros_like(x))


# --- Pairs -------------------------------------------------------------------------------------


def inside(tile: Tile, keys: jax.Array, to: Pairs, c: int) -> None:
    """Fills in what the tokens of a tile are to each other, but for T.

    Args:
        tile: where it stands.
        keys: `[128 k]`.
        to: what is filled.
        c: tokens per chunk.
    """
    i, j = places(c)
    columns = columns_of(tile.rows)
    # Sums of log decays over the tokens after j up to i: of their own terms alone, so that no digit
    # is lost where decays are strong.
    lower = jnp.where(
        lax.broadcasted_iota(jnp.int32, (c, c), 0) >= lax.broadcasted_iota(jnp.int32, (c, c), 1),
        1.0,
        0.0,
    )
    sums = _sum_exactly(lower, jnp.where(i > j, pack(columns[G], c), 0.0))
    sees = (i >= j) & (pack(columns[DOCUMENT], c) == tile.rows[DOCUMENT : DOCUMENT + 1])
    faded = jnp.exp(jnp.where(sees, sums, LOWEST))
    to.faded[tile.packed, :] = faded
    alike = jnp.where(i > j, pack(dot_across(keys, keys), c) * faded, 0.0)
    to.lower[tile.packed, :] = pack(columns[BETA], c) * alike
    if to.alike is not None:
        to.alike[tile.packed, :] = alike


def solve(tile: Tile, pairs: Pairs, c: int) -> None:
    """Fills in T = (I + L)^-1.

    Squares of 16 by substitution. Then squares of 32, 64, ... are made of two halves each: what
    stands below the first half is -T_2 L_21 T_1. The product of powers (I - L)(I + L^2)... would be
    shorter, and wrong (core/triangular.py).
    """
    i, j = places(c)
    apart = i ^ j  # its highest bit is the size of the halves that part i and j
    found = _substitute(_squares(pairs.lower, tile, c))
    size = SQUARE
    while size < c:
        between = (apart >= size) & (apart < 2 * size)
        corner = _dot_spread(found, jnp.where(between, pairs.lower[tile.packed, :], 0.0), c)
        corner = _dot_spread(corner, found, size)
        second = (lax.broadcasted_iota(jnp.int32, (size, TILE), 1) & size) > 0
        found = jnp.concatenate([jnp.where(second, 0.0, found), jnp.where(second, found, -corner)])
        size *= 2
    pairs.solved[tile.packed, :] = found


def _squares(lower: Any, tile: Tile, c: int) -> jax.Array:
    """The squares of 16 on the diagonals of a tile's packed pairs, packed."""
    lane = lax.broadcasted_iota(jnp.int32, (SQUARE, TILE), 1) & (c - SQUARE)
    out = lower[rows_of(tile.packed, 0, SQUARE), :]
    for first in range(SQUARE, c, SQUARE):
        out = jnp.where(lane == first, lower[rows_of(tile.packed, first, SQUARE), :], out)
    return out


def _substitute(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 of packed squares of 16: row after row is taken off the rows below it."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (SQUARE, TILE), axis) for axis in (0, 1))
    first = lane & -SQUARE  # of the square
    found = jnp.where(row == lane - first, 1.0, 0.0)
    for n in range(SQUARE - 1):
        found = found - jnp.take_along_axis(lower, first + n, axis=1) * found[n : n + 1]
    return found
