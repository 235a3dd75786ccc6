"""What the forward and the backward kernel share: a span of one head.

Each stage is a loop over the tiles whose intermediate results lie in vector memory: short loops
keep what is alive within the registers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_tile
from pallas_kernels.gated_delta_rule.tpu_tile import (
    BETA,
    END,
    START,
    TILE,
    Pairs,
    Tile,
    dot,
    dot_across,
)

ABSENT = 256  # added to the document of a place where there is no token


class How(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
        config: PallasTpuConfig.
        chunk: tokens per state.
        span: tokens per step of the grid, a multiple of 128.
        scale: of q.
        masked: whether there are documents, or places without a token.
        stride: of states that are kept: one in so many spans.
    """

    config: Any
    chunk: int
    span: int
    scale: float
    masked: bool
    stride: int = 1

    @property
    def tiles(self) -> int:
        return self.span // TILE

    @property
    def chunks(self) -> int:
        return self.span // self.chunk

    @property
    def parts(self) -> int:
        """Chunks of a tile."""
        return TILE // self.chunk


class Places(NamedTuple):
    """What tokens come with beside q, k and v, or references to it; all float32.

    Attributes:
        g, beta: `[b h 1 tokens]`, in a kernel `[1 span]`; both are 0 where there is no token.
        document: `[b 1 tokens]`, in a kernel `[1 span]`: of its chunk, 0 = the one of the state,
            + ABSENT where there is no token; None = all are in one and there.
    """

    g: Any
    beta: Any
    document: Any


class Work(NamedTuple):
    """References to what is found about a span; README.md says what the letters are.

    Attributes:
        gates: numbers per token, `[tiles 8 128]`, see tpu_tile.
        scores: scale q_i . k_j D_ij, packed, float32.
        pairs: packed pairs.
        values: U `[span v]` float32; each stage may put something else there.
        written: X `[span v]`.
        met: per chunk its W and q, `[2 span k]`: what meets the state before it.
        turned: per tile its keys, `[tiles k 128]`.
    """

    gates: Any
    scores: Any
    pairs: Pairs
    values: Any
    written: Any
    met: Any
    turned: Any


def scratch(how: How, k: int, v: int, dtype: Any, *, alike: bool) -> list[Any]:
    """What `work` makes a Work of."""
    packed = pltpu.VMEM((how.tiles * how.chunk, TILE), jnp.float32)
    return [
        pltpu.VMEM((how.tiles, tpu_tile.ROWS, TILE), jnp.float32),
        *([packed] * (5 if alike else 4)),
        pltpu.VMEM((how.span, v), jnp.float32),
        pltpu.VMEM((how.span, v), dtype),
        pltpu.VMEM((2 * how.span, k), dtype),
        pltpu.VMEM((how.tiles, k, TILE), dtype),
    ]


def scratch_count(*, alike: bool) -> int:
    """How many references `scratch` asks for."""
    return 10 if alike else 9


def work(refs: Sequence[Any], *, alike: bool) -> Work:
    """The references that `scratch` asked for, by name."""
    gates, scores, faded, lower, solved, *others = refs
    pairs = Pairs(faded, lower, solved, others.pop(0) if alike else None)
    return Work(gates, scores, pairs, *others)


class Specs(NamedTuple):
    """BlockSpecs of a span of one head: of `[b t h*k]`, as projections make them."""

    gates: Any
    document: Any
    keys: Any
    values: Any
    states: Any
    start: Any


def specs(how: How, sizes: tuple[int, int, int], at: Callable[[Any], Any]) -> Specs:
    """For a grid (b, h, spans).

    Args:
        how: what is fixed.
        sizes: m, k, v.
        at: makes of the number of a step that of a span.
    """
    m, k, v = sizes
    token = lambda width: pl.BlockSpec((1, how.span, width), lambda b, h, n, *_: (b, at(n), h))
    return Specs(
        gates=pl.BlockSpec((1, 1, 1, how.span), lambda b, h, n, *_: (b, h, 0, at(n))),
        document=pl.BlockSpec((1, 1, how.span), lambda b, h, n, *_: (b, 0, at(n))),
        keys=token(k),
        values=token(v),
        # They stay from a head's first step to its last: a second buffer would be of no use.
        states=pl.BlockSpec(
            (1, m, 1, k, v), lambda b, h, n, *_: (b, 0, h, 0, 0), pipeline_mode=pl.Buffered(1)
        ),
        start=pl.BlockSpec((1, 1, 1, k, v), lambda b, h, n, *_: (b, at(n) // how.stride, h, 0, 0)),
    )


def flat(x: jax.Array) -> jax.Array:
    """`[b t h k]` as `[b t h*k]`."""
    return x.reshape(*x.shape[:2], -1)


# --- Loops -------------------------------------------------------------------------------------


def loop(count: int, stage: Callable[[Any], None]) -> None:
    """Calls `stage(i)` for i = 0, 1, ... in a loop."""

    def turn(i, carry):
        stage(i)
        return carry

    lax.fori_loop(0, count, turn, 0)


def over_lanes(stage: Callable[[Any], None], width: int) -> None:
    """Calls `stage(n)` for each turn of `side_by_side`; without a loop where there is one."""
    count = width // tpu.LANES // _side(width)
    if count == 1:
        stage(0)
    else:
        loop(count, stage)


def side_by_side(n: Any, width: int) -> list[Any]:
    """The n-th blocks of 128 lanes that are worked on together."""
    side = _side(width)
    if side * tpu.LANES == width:
        return [slice(i * tpu.LANES, (i + 1) * tpu.LANES) for i in range(side)]
    return [block_at(n * side + i) for i in range(side)]


def _side(width: int) -> int:
    return 2 if width % (2 * tpu.LANES) == 0 else 1


def block_at(n: Any, size: int = tpu.LANES) -> Any:
    """The n-th block of so many lanes or rows."""
    return pl.ds(pl.multiple_of(n * size, size), size)


def rows_of(at: Any, part: int, c: int) -> Any:
    """The rows of a part of a tile."""
    return pl.ds(pl.multiple_of(at.start + part * c, c), c)


def tile_at(x: Work, i: Any, how: How) -> Tile:
    """The i-th tile of a span."""
    return Tile(block_at(i, TILE), block_at(i, how.chunk), x.gates.at[i], how.chunk)


# --- Stages --------------------------------------------------------------------------------------


def tokens(blocks: Sequence[Any], copies: Sequence[Any], places: Places, how: How) -> list[Any]:
    """References `[span width]` to blocks of tokens, with 0 where there is none.

    Args:
        blocks: as they were fetched.
        copies: scratch for them, if there may be places without a token.
        places: of the span.
        how: what is fixed.
    """
    if not how.masked:
        return [block.at[0] for block in blocks]
    for block, copy in zip(blocks, copies, strict=True):

        def clear(i, block=block, copy=copy):
            at = block_at(i, TILE)
            there = jnp.broadcast_to(places.document[:, at], (tpu.SUBLANES, TILE)).T
            x = block[0, at, :]
            copy[at, :] = jnp.where(there[:, :1] < ABSENT, x, jnp.zeros_like(x))

        loop(how.tiles, clear)
    return list(copies)


def before_states(places: Places, q: Any, k: Any, v: Any, to: Work, how: How) -> None:
    """Fills in all that does not depend on states: everything but `written`.

    Args:
        places: of the span.
        q, k, v: references `[span width]`.
        to: what is filled.
        how: what is fixed.
    """
    c, operand = how.chunk, k.dtype

    def number(i):
        at = block_at(i, TILE)
        document = None
        if how.masked:
            document = places.document[:, at]
            document = jnp.where(document < ABSENT, document, document - ABSENT)
        tpu_tile.number(tile_at(to, i, how), places.g[:, at], places.beta[:, at], document)

    def inside(i):
        tile = tile_at(to, i, how)
        tpu_tile.inside(tile, k[tile.at, :], to.pairs, how.masked)

    def through(i):
        tile = tile_at(to, i, how)
        beta, start = tile.rows[BETA : BETA + 1], tile.rows[START : START + 1]
        solved = to.pairs.solved[tile.packed, :] * beta
        spread = lambda x: tile.spread(x).astype(operand)
        to.values[tile.at, :] = dot(spread(solved), v[tile.at, :])
        keys, queries = dot(spread(solved * start), k[tile.at, :]).astype(operand), q[tile.at, :]
        for part in range(how.parts):
            own = slice(part * c, (part + 1) * c)
            both = jnp.concatenate([keys[own], queries[own]])
            to.met[block_at(i * how.parts + part, 2 * c), :] = both

    def scores(i):
        tile = tile_at(to, i, how)
        found = tile.pack(dot_across(q[tile.at, :], k[tile.at, :]))
        to.scores[tile.packed, :] = how.scale * found * to.pairs.faded[tile.packed, :]
        to.turned[i] = k[tile.at, :].T

    loop(how.tiles, number)
    loop(how.tiles, inside)
    loop(how.tiles, lambda i: tpu_tile.solve(tile_at(to, i, how), to.pairs))
    loop(how.tiles, through)
    loop(how.tiles, scores)


def carry(state: Callable[[Any, Any], Any], to: Work, how: How, *, read: bool) -> None:
    """Takes the state through the chunks; fills in `written`.

    Args:
        state: gives, of the number of a chunk in the span and some lanes, a reference to those
            columns of the state before it; the state after it is left there.
        to: what `before_states` found.
        how: what is fixed.
        read: leaves in `values` what queries read of the states before their chunks.
    """
    c, operand, width = how.chunk, to.written.dtype, to.values.shape[1]

    def chunk(i, part, blocks):
        tile, place = tile_at(to, i, how), i * how.parts + part
        own, own_at = slice(part * c, (part + 1) * c), rows_of(tile.at, part, c)
        refs = [state(place, lane) for lane in blocks]
        met = pl.ds(block_at(place, 2 * c).start, 2 * c if read else c)
        both = [dot(to.met[met, :], ref[...].astype(operand)) for ref in refs]
        through = tile.rows[START : START + 1, own.stop - 1 : own.stop]
        end = tile.columns[END][own]
        ends = []
        for x, lane in zip(both, blocks, strict=True):
            written = to.values[own_at, lane] - x[:c]
            to.written[own_at, lane] = written.astype(operand)
            if read:
                to.values[own_at, lane] = x[c:]
            ends.append(in_its_place((end * written).astype(operand), part, how))
        for ref, x in zip(refs, ends, strict=True):
            ref[...] = through * ref[...] + dot(to.turned[i], x)

    def tile(i):
        def columns(n):
            for part in range(how.parts):
                chunk(i, part, side_by_side(n, width))

        over_lanes(columns, width)

    loop(how.tiles, tile)


def in_its_place(x: jax.Array, part: int, how: How) -> jax.Array:
    """Rows of a chunk among those of its tile, 0 elsewhere."""
    empty = jnp.zeros_like(x)
    return jnp.concatenate([x if n == part else empty for n in range(how.parts)])
