"""What the TPU kernels of the gated delta rule do with 128 tokens before they meet a state.

128 tokens (a tile) fill the lanes of a register and a matrix unit. They are one chunk of c tokens,
or several that know nothing of each other. Numbers of pairs stand packed: `[c 128]` has in row i
and lane (p, j) what is between tokens i and j of chunk p; spread, `[128 128]` with one square per
chunk on the diagonal, they are factors of a matrix product.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.core import tpu, tpu_parts

TILE = 128
SQUARE = 16  # rows that are solved by substitution
# What stands where in the numbers per token, `[8 128]` per head and tile: log decays, what is left
# at the token of the state before its chunk, what is left at the end of the chunk of what the token
# brought, which document of its chunk it is in (0 = the one of the state).
G, BETA, START, END, DOCUMENT, ZERO = range(6)
ROWS = 8
# exp of it is 0, and sums of it are finite.
LOWEST = -1e30


class Tile(NamedTuple):
    """A tile of a span. What its methods give is made anew wherever they are called: it would not
    stay in registers from one loop to the next.

    Attributes:
        at: its tokens in arrays by token.
        packed: its rows in arrays `[... 128]` of packed pairs.
        gates: reference to the numbers per token, `[8 128]`.
        c: tokens per chunk.
    """

    at: Any
    packed: Any
    gates: Any
    c: int

    @property
    def rows(self) -> jax.Array:
        """The numbers per token."""
        return self.gates[...]

    @property
    def columns(self) -> tuple[jax.Array, ...]:
        """The same, as eight `[128 1]`."""
        turned = self.rows.T
        return tuple(turned[:, i : i + 1] for i in range(ROWS))

    def lanes(self, rows: int) -> jax.Array:
        """The number of the lane, int32 `[rows 128]`."""
        return lax.broadcasted_iota(jnp.int32, (rows, TILE), 1) + self._zero

    @property
    def _zero(self) -> jax.Array:
        """A 0 from memory, `[1 128]`: of what it is in the compiler makes no constant."""
        return self.gates[ZERO : ZERO + 1].astype(jnp.int32)

    def places(self) -> tuple[jax.Array, jax.Array]:
        """i and j of packed pairs, int32 `[c 128]`."""
        first = lax.broadcasted_iota(jnp.int32, (tpu.SUBLANES, TILE), 0) + self._zero
        i = jnp.concatenate([first + n for n in range(0, self.c, tpu.SUBLANES)])
        return i, self.lanes(self.c) & (self.c - 1)

    def pack(self, x: jax.Array) -> jax.Array:
        """The squares on the diagonal of `[128 128]`; or a column `[128 1]` for all their j."""
        c = self.c
        lanes = self.lanes(c) & -c
        out = jnp.broadcast_to(x[:c], (c, TILE))
        for first in range(c, TILE, c):
            out = jnp.where(lanes == first, x[first : first + c], out)
        return out

    def spread(self, x: jax.Array) -> jax.Array:
        """Packed squares `[size 128]` as `[128 128]`, 0 beside them."""
        size = x.shape[0]
        if size == TILE:
            return x
        lanes = self.lanes(size) & -size
        return jnp.concatenate(
            [jnp.where(lanes == first, x, 0.0) for first in range(0, TILE, size)]
        )


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


_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted(yes: Any) -> Iterator[None]:
    """Inside, bfloat16 factors are multiplied as float32, with the same results: XLA for CPUs joins
    some with transposes into products that it cannot compute."""
    token = _INTERPRETED.set(bool(yes))
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in float32."""
    return _dot(a, b, (1, 0))


def dot_across(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in float32."""
    return _dot(a, b, (1, 1))


def dot_down(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b in float32."""
    return _dot(a, b, (0, 0))


def _dot(a, b, contracted):
    if _INTERPRETED.get():
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return tpu_parts.dot(a, b, contracted)


def _parts(x: jax.Array) -> list[jax.Array]:
    """x as the sum of three numbers that bfloat16 holds exactly, in float32."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts


def _sums_down(ones: jax.Array, x: jax.Array) -> jax.Array:
    """ones x in full precision, for a matrix of truths."""
    ones = jnp.where(ones, 1.0, 0.0).astype(jnp.bfloat16)
    first, second, third = (dot(ones, part.astype(jnp.bfloat16)) for part in _parts(x))
    return first + second + third


def sums_along(row: jax.Array, ones: jax.Array, tile: Tile) -> jax.Array:
    """row ones in full precision, `[1 128]`, for packed truths."""
    parts = [jnp.broadcast_to(x, (SQUARE, TILE)) for x in _parts(row)]
    ones = tile.spread(jnp.where(ones, 1.0, 0.0)).astype(jnp.bfloat16)
    found = dot(jnp.concatenate(parts).astype(jnp.bfloat16), ones)
    return found[:1] + found[SQUARE : SQUARE + 1] + found[2 * SQUARE : 2 * SQUARE + 1]


def _dot_spread(a: jax.Array, b: jax.Array, tile: Tile) -> jax.Array:
    """a by the spread of b in full precision, both `[... 128]` float32.

    What lax.Precision.HIGHEST does, but b is taken apart while it is packed, and each of its parts
    is a factor once.
    """
    size = a.shape[0]
    a = jnp.concatenate([x.astype(jnp.bfloat16) for x in _parts(a)])
    total = jnp.zeros((size, TILE), jnp.float32)
    for n, part in enumerate(_parts(b)):
        found = dot(a[: (3 - n) * size], tile.spread(part).astype(jnp.bfloat16))
        for m in range(3 - n):
            total = total + found[m * size : (m + 1) * size]
    return total


# --- Pairs -------------------------------------------------------------------------------------


def number(tile: Tile, g: jax.Array, beta: jax.Array, document: jax.Array | None) -> None:
    """Fills in the numbers per token from rows `[1 128]`; document None = all are in one."""
    tile.gates[...] = jnp.zeros_like(tile.gates)
    tile.gates[G : G + 1], tile.gates[BETA : BETA + 1] = g, beta
    # Sums of their own terms alone, so that no digit is lost where decays are strong.
    i, j = tile.places()
    start = jnp.exp(sums_along(g, i <= j, tile))
    end = jnp.exp(sums_along(g, i > j, tile))
    if document is not None:
        tile.gates[DOCUMENT : DOCUMENT + 1] = document
        last, chunk = document[:, tile.c - 1 : tile.c], tile.lanes(1) & -tile.c
        for first in range(tile.c, TILE, tile.c):
            own = document[:, first + tile.c - 1 : first + tile.c]
            last = jnp.where(chunk == first, own, last)
        start, end = jnp.where(document == 0, start, 0.0), jnp.where(document == last, end, 0.0)
    tile.gates[START : START + 1], tile.gates[END : END + 1] = start, end


def inside(tile: Tile, keys: jax.Array, to: Pairs, masked: bool) -> None:
    """Fills in what the tokens of a tile are to each other, but for T.

    Args:
        tile: where it stands; its numbers are there.
        keys: `[128 k]`.
        to: what is filled.
        masked: whether there may be several documents.
    """
    columns, (i, j) = tile.columns, tile.places()
    lower = lax.broadcasted_iota(jnp.int32, (tile.c, tile.c), 0) >= (
        lax.broadcasted_iota(jnp.int32, (tile.c, tile.c), 1)
    )
    sums = _sums_down(lower, jnp.where(i > j, tile.pack(columns[G]), 0.0))
    sees = i >= j
    if masked:
        sees &= tile.pack(columns[DOCUMENT]) == tile.rows[DOCUMENT : DOCUMENT + 1]
    faded = jnp.exp(jnp.where(sees, sums, LOWEST))
    to.faded[tile.packed, :] = faded
    alike = jnp.where(i > j, tile.pack(dot_across(keys, keys)) * faded, 0.0)
    to.lower[tile.packed, :] = tile.pack(columns[BETA]) * alike
    if to.alike is not None:
        to.alike[tile.packed, :] = alike


def solve(tile: Tile, pairs: Pairs) -> None:
    """Fills in T = (I + L)^-1.

    Squares of 16 by substitution. Then squares of 32, 64, ... are made of two halves each: what
    stands below the first half is -T_2 L_21 T_1. The product of powers (I - L)(I + L^2)... would be
    shorter, and wrong (core/triangular.py).
    """
    c, (i, j) = tile.c, tile.places()
    apart = i ^ j  # its highest bit is the size of the halves that part i and j
    found = _substitute(_squares(pairs.lower, tile), tile)
    size = SQUARE
    while size < c:
        between = (apart >= size) & (apart < 2 * size)
        corner = _dot_spread(found, jnp.where(between, pairs.lower[tile.packed, :], 0.0), tile)
        corner = _dot_spread(corner, found, tile)
        second = (tile.lanes(size) & size) > 0
        found = jnp.concatenate([jnp.where(second, 0.0, found), jnp.where(second, found, -corner)])
        size *= 2
    pairs.solved[tile.packed, :] = found


def _squares(lower: Any, tile: Tile) -> jax.Array:
    """The squares of 16 on the diagonals of a tile's packed pairs, packed."""
    lane = tile.lanes(SQUARE) & (tile.c - SQUARE)
    out = lower[_part(tile.packed, 0), :]
    for first in range(SQUARE, tile.c, SQUARE):
        out = jnp.where(lane == first, lower[_part(tile.packed, first), :], out)
    return out


def _part(at: Any, first: int) -> Any:
    return pl.ds(pl.multiple_of(at.start + first, SQUARE), SQUARE)


def _substitute(lower: jax.Array, tile: Tile) -> jax.Array:
    """(I + L)^-1 of packed squares of 16: row after row is taken off the rows below it."""
    row = lax.broadcasted_iota(jnp.int32, lower.shape, 0)
    lane = tile.lanes(SQUARE)
    first = lane & -SQUARE  # of the square
    found = jnp.where(row == lane - first, 1.0, 0.0)
    for n in range(SQUARE - 1):
        found = found - jnp.take_along_axis(lower, first + n, axis=1) * found[n : n + 1]
    return found
