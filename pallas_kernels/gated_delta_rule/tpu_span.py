"""What the forward and the backward kernel share: a span of one head, tile after tile.

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

_SIDE = 2  # columns of a state, in registers' lanes, that are worked on side by side


class How(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
        config: PallasTpuConfig.
        chunk: tokens per state.
        span: tokens per step of the grid, a multiple of 128.
        scale: of q.
        masked: whether there may be places without a token.
    """

    config: Any
    chunk: int
    span: int
    scale: float
    masked: bool

    @property
    def tiles(self) -> int:
        return self.span // TILE

    @property
    def parts(self) -> int:
        """Chunks of a tile."""
        return TILE // self.chunk


class Work(NamedTuple):
    """References to what is found about a span; README.md says what the letters are.

    Attributes:
        pairs: packed pairs.
        scores: scale q_i . k_j D_ij, packed, float32.
        values: U `[span v]` float32; each stage may put something else there.
        written: X `[span v]`.
        met: per chunk its W and q, `[2 span k]`: what meets the state before it.
        turned: per tile its keys, `[tiles k 128]`.
    """

    pairs: Pairs
    scores: Any
    values: Any
    written: Any
    met: Any
    turned: Any


def scratch(how: How, k: int, v: int, dtype: Any, *, alike: bool) -> list[Any]:
    """What `work` makes a Work of."""
    packed = pltpu.VMEM((how.tiles * how.chunk, TILE), jnp.float32)
    return [
        *([packed] * (5 if alike else 4)),
        pltpu.VMEM((how.span, v), jnp.float32),
        pltpu.VMEM((how.span, v), dtype),
        pltpu.VMEM((2 * how.span, k), dtype),
        pltpu.VMEM((how.tiles, k, TILE), dtype),
    ]


def work(refs: Sequence[Any], *, alike: bool) -> Work:
    """The references that `scratch` asked for, by name."""
    scores, faded, lower, solved, *others = refs
    pairs = Pairs(faded, lower, solved, others.pop(0) if alike else None)
    return Work(pairs, scores, *others)


class Specs(NamedTuple):
    """BlockSpecs of one head's span."""

    gates: Any
    keys: Any
    values: Any
    states: Any
    start: Any


def specs(how: How, m: int, k: int, v: int, at: Callable[[Any], Any]) -> Specs:
    """For a grid (b, h, spans); `at` makes of the number of a step that of a span."""
    token = lambda width: pl.BlockSpec((1, how.span, width), lambda b, h, n, *_: (b, at(n), h))
    return Specs(
        gates=pl.BlockSpec(
            (1, 1, how.tiles, tpu_tile.ROWS, TILE), lambda b, h, n, *_: (b, h, at(n), 0, 0)
        ),
        keys=token(k),
        values=token(v),
        # They stay from a head's first step to its last: a second buffer would be of no use.
        states=pl.BlockSpec(
            (1, m, 1, k, v), lambda b, h, n, *_: (b, 0, h, 0, 0), pipeline_mode=pl.Buffered(1)
        ),
        start=pl.BlockSpec((1, 1, 1, k, v), lambda b, h, n, *_: (b, at(n), h, 0, 0)),
    )


def tile_at(gates: Any, i: Any, how: How) -> Tile:
    """The i-th tile of a span."""
    at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
    packed = pl.ds(pl.multiple_of(i * how.chunk, how.chunk), how.chunk)
    return Tile(at, packed, gates.at[0, 0, i], how.chunk)


def over_tiles(stage: Callable[[Any], None], how: How) -> None:
    """Calls `stage(i)` for each tile in a loop."""
    lax.fori_loop(0, how.tiles, lambda i, _: stage(i) or 0, 0)


def before_states(gates: Any, q: Any, k: Any, v: Any, to: Work, how: How) -> None:
    """Fills in all that does not depend on states: everything but `written`."""
    c, operand = how.chunk, k.dtype

    def inside(i):
        tile = tile_at(gates, i, how)
        tpu_tile.inside(tile, tile.read(k, how.masked), to.pairs)

    def through(i):
        tile = tile_at(gates, i, how)
        read = lambda x: tile.read(x, how.masked)
        beta, start = tile.rows[BETA : BETA + 1], tile.rows[START : START + 1]
        solved = to.pairs.solved[tile.packed, :] * beta
        spread = lambda x: tile.spread(x).astype(operand)
        to.values[tile.at, :] = dot(spread(solved), read(v))
        keys, queries = dot(spread(solved * start), read(k)).astype(operand), read(q)
        for part in range(how.parts):
            own = slice(part * c, (part + 1) * c)
            both = jnp.concatenate([keys[own], queries[own]])
            to.met[met_at(i * how.parts + part, how), :] = both

    def scores(i):
        tile = tile_at(gates, i, how)
        queries, keys = (tile.read(x, how.masked) for x in (q, k))
        found = tile.pack(dot_across(queries, keys))
        to.scores[tile.packed, :] = how.scale * found * to.pairs.faded[tile.packed, :]
        to.turned[i] = keys.T

    over_tiles(inside, how)
    over_tiles(lambda i: tpu_tile.solve(tile_at(gates, i, how), to.pairs), how)
    over_tiles(through, how)
    over_tiles(scores, how)


def met_at(place: Any, how: How) -> Any:
    """Where what meets the state before a chunk of the span stands."""
    return pl.ds(pl.multiple_of(place * 2 * how.chunk, 2 * how.chunk), 2 * how.chunk)


def lanes(width: int) -> list[Any]:
    """The blocks of 128 lanes of a width."""
    return [slice(n, n + tpu.LANES) for n in range(0, width, tpu.LANES)]


def lane_at(n: Any) -> Any:
    """The n-th block of 128 lanes, or rows."""
    return pl.ds(pl.multiple_of(n * tpu.LANES, tpu.LANES), tpu.LANES)


def over_lanes(stage: Callable[[Any], None], width: int) -> None:
    """Calls `stage(n)` for each block of 128 lanes in a loop."""
    lax.fori_loop(0, width // tpu.LANES, lambda n, _: stage(n) or 0, 0)


def carry(gates: Any, state: Callable[[Any, Any], Any], to: Work, how: How, *, read: bool) -> None:
    """Takes the state through the chunks; fills in `written`.

    Args:
        gates: numbers per token.
        state: gives, of the number of a chunk in the span and some lanes, a reference to those
            columns of the state before it; the state after it is left there.
        to: what `before_states` found.
        how: what is fixed.
        read: leaves in `values` what queries read of the states before their chunks.
    """
    c, operand = how.chunk, to.written.dtype
    width = to.values.shape[1]
    rows = 2 * c if read else c

    def chunk(i, tile, part, blocks):
        own = slice(part * c, (part + 1) * c)
        own_at = tpu_tile.rows_of(tile.at, part * c, c)
        refs = [state(i * how.parts + part, lane) for lane in blocks]
        met = pl.ds(met_at(i * how.parts + part, how).start, rows)
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

    def one(i):
        tile = tile_at(gates, i, how)
        blocks = lanes(width)
        for n in range(0, len(blocks), _SIDE):
            for part in range(how.parts):
                chunk(i, tile, part, blocks[n : n + _SIDE])

    over_tiles(one, how)


def in_its_place(x: jax.Array, part: int, how: How) -> jax.Array:
    """Rows of a chunk among those of its tile, 0 elsewhere."""
    empty = jnp.zeros_like(x)
    return jnp.concatenate([x if n == part else empty for n in range(how.parts)])
