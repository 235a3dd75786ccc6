"""The backward kernel of the gated delta rule: spans from the last to the first.

From the state before a span its chunks are computed again, which leaves their states and what they
wrote in vector memory; then the chunks are walked back with the gradient of the state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_span, tpu_tile
from pallas_kernels.gated_delta_rule.tpu_span import How, Work
from pallas_kernels.gated_delta_rule.tpu_tile import (
    BETA,
    END,
    ROWS,
    START,
    TILE,
    Tile,
    dot,
    dot_across,
    dot_down,
)

DSUM, DBETA = range(2)  # rows of the gradients by the numbers per token


class Grads(NamedTuple):
    """References to gradients of a tile; README.md says what the letters are.

    Attributes:
        solved: T^T of the tile, `[128 128]`.
        states: S before each chunk of the span, `[chunks k v]`.
        keys: by diag(beta f) K, `[128 k]` float32.
        queries: by diag(scale f) Q, the same.
        ends: by diag(d) K, the same.
        last: what is added to the sums at the last token of each chunk, `[8 128]`, in all rows.
    """

    solved: Any
    states: Any
    keys: Any
    queries: Any
    ends: Any
    last: Any


class Arrays(NamedTuple):
    """References to a span's blocks."""

    gates: Any
    q: Any
    k: Any
    v: Any
    dy: Any


class Results(NamedTuple):
    """References to the blocks of a span's gradients."""

    dq: Any
    dk: Any
    dv: Any
    dgates: Any


def backward(q, k, v, gates, s, starts, memory, dy, ds, how: How, *, cost):
    """Gradients of q, k, v, of what gates hold, and of the first states.

    Args:
        q, k, v, gates, memory, how: as `tpu_forward.forward` took them.
        s: the first states; read only where there are memories.
        starts: what the forward pass kept.
        dy: `[b t h v]`, in the dtype of k.
        ds: float32 `[b m h k v]`, of the last states.
        cost: pl.CostEstimate.

    Returns:
        dq, dk, dv; float32 `[b h tiles 8 128]`: row DSUM is by the sum of g up to a token of its
        chunk, row DBETA by beta; ds of the first states.
    """
    b, t, h, width = k.shape
    m, values = ds.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = tpu_span.specs(how, m, width, values, lambda n: spans - 1 - n)
    memories = memory is not None
    flat = lambda x: x.reshape(b, t, -1)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    by_key = pltpu.VMEM((TILE, width), jnp.float32)
    dq, dk, dv, dgates, ds = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memories, spans=spans),
        name="gated_delta_rule_backward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[
            *([blocks.states] if memories else []),
            *(blocks.start, blocks.states),
            *(blocks.gates, blocks.keys, blocks.keys, blocks.values, blocks.values),
        ],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.gates, blocks.states],
        out_shape=[like(flat(q)), like(flat(k)), like(flat(v)), like(gates), like(ds)],
        semantics=("parallel", "parallel", "arbitrary"),
        num_scalar_prefetch=int(memories),
        scratch_shapes=[
            pltpu.VMEM((width, values), jnp.float32),
            pltpu.VMEM((TILE, TILE), k.dtype),
            pltpu.VMEM((how.span // how.chunk, width, values), k.dtype),
            *(by_key, by_key, by_key),
            pltpu.VMEM((ROWS, TILE), jnp.float32),
            *tpu_span.scratch(how, width, values, k.dtype, alike=True),
        ],
        cost=cost,
    )(*((memory, s) if memories else ()), starts, ds, gates, flat(q), flat(k), flat(v), flat(dy))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dgates, ds


def _body(*refs, how: How, memories: bool, spans: int):
    memory, s, refs = (*refs[:2], refs[2:]) if memories else (None, None, refs)
    start, ds_after, *refs = refs
    given, results = Arrays(*refs[:5]), Results(*refs[5:9])
    ds, now, *refs = refs[9:]
    grads, x = Grads(*refs[:6]), tpu_span.work(refs[6:], alike=True)
    row, step = pl.program_id(0), spans - 1 - pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * (how.span // how.chunk) + place]

    @pl.when(pl.program_id(2) == 0)
    def _():
        ds[...] = ds_after[...]

    now[...] = start[0, 0, 0].astype(jnp.float32)

    def state(place, lane):
        """The state before a chunk, kept on the way."""
        if s is not None:
            j = memory_of(place)

            @pl.when((place > 0) & (memory_of(jnp.maximum(place - 1, 0)) != j))
            def _():
                now[:, lane] = s[0, j, 0, :, lane]

        grads.states[place, :, lane] = now[:, lane].astype(grads.states.dtype)
        return now.at[:, lane]

    tpu_span.before_states(given.gates, given.q, given.k, given.v, x, how)
    tpu_span.carry(given.gates, state, x, how, read=False)

    def tile_back(n):
        i = how.tiles - 1 - n
        tile = tpu_span.tile_at(given.gates, i, how)
        read = lambda ref: tpu_tile.read_tokens(ref, tile, how.masked)
        _begin(tile, read(given.dy), grads, x, how)
        for part in reversed(range(how.parts)):
            place = i * how.parts + part
            _chunk_back(
                tile, place, part, read, given, ds.at[0, memory_of(place), 0], grads, x, how
            )
        _finish(i, tile, read, given, grads, x, results, how)

    tpu_span.over_tiles(tile_back, how)


def _begin(tile: Tile, dy: jax.Array, grads: Grads, x: Work, how: How) -> None:
    """What a tile needs before its states; in place of U there is what X gets of its tile's y."""
    spread = lambda ref: tpu_tile.spread(ref[tile.packed, :], how.chunk)
    grads.solved[...] = spread(x.pairs.solved).T.astype(dy.dtype)
    x.values[tile.at, :] = dot_down(spread(x.scores).astype(dy.dtype), dy)
    grads.last[...] = jnp.zeros_like(grads.last)


def _chunk_back(tile: Tile, place, part, read, given: Arrays, ds, grads: Grads, x: Work, how: How):
    """Takes the gradient of the state `[k v]` back through a chunk."""
    c, operand = how.chunk, given.k.dtype
    own = slice(part * c, (part + 1) * c)
    own_at = tpu_tile.rows_of(tile.at, part * c, c)
    columns = tpu_tile.columns_of(tile.rows)
    start, end = columns[START][own], columns[END][own]
    through = tile.rows[START : START + 1, own.stop - 1 : own.stop]
    keys, dy = read(given.k)[own], read(given.dy)[own]
    before, after = grads.states[place], ds[...]

    dx = x.values[own_at, :] + end * dot(keys, after.astype(operand))
    dx = dx.astype(operand)
    dvalues = dot(grads.solved[own, :], tpu_span.in_its_place(dx, part, how))
    x.values[own_at, :] = dvalues
    both = dot_across(jnp.concatenate([dvalues.astype(operand), dy]), before)
    grads.keys[own, :] = -both[:c]
    grads.queries[own, :] = both[c:]
    ends = dot_across(x.written[own_at, :], after.astype(operand))
    grads.ends[own, :] = ends

    total = lambda x: jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)
    last = through * total(before.astype(jnp.float32) * after)
    last = last + total(end * ends * keys.astype(jnp.float32))
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, TILE), 1)
    grads.last[...] = jnp.where(lane == own.stop - 1, last, grads.last[...])
    read_out = (how.scale * start * dy.astype(jnp.float32)).astype(operand)
    met = x.met[pl.ds(pl.multiple_of(place * 2 * c, c), 2 * c), :]
    ds[...] = through * after + dot_down(met, jnp.concatenate([-dx, read_out]))


def _finish(i, tile: Tile, read, given: Arrays, grads: Grads, x: Work, to: Results, how: How):
    """The gradients of a tile's arguments."""
    c, operand = how.chunk, given.k.dtype
    columns = tpu_tile.columns_of(tile.rows)
    beta, start, end = columns[BETA], columns[START], columns[END]
    packed = lambda ref: ref[tile.packed, :]
    spread = lambda y: tpu_tile.spread(y, c)
    written = x.written[tile.at, :]
    dvalues = x.values[tile.at, :]

    # What was written: through T, whose gradient is dL = -T^T dT T^T; what was read.
    dlower = -tpu_tile.pack(dot_across(dvalues.astype(operand), written), c)
    dscores = tpu_tile.pack(dot_across(read(given.dy), written), c)
    by_alike = dlower * packed(x.pairs.alike)
    by_lower = dlower * packed(x.pairs.lower)
    by_read = dscores * packed(x.scores)
    by_q = spread(how.scale * dscores * packed(x.pairs.faded)).astype(operand)
    rows, lanes = tpu_tile.places(c)
    by_k = jnp.where(rows > lanes, tpu_tile.pack(beta, c) * dlower * packed(x.pairs.faded), 0.0)
    by_k = spread(by_k)

    keys, queries = read(given.k), read(given.q)
    dq = how.scale * start * grads.queries[...] + dot(by_q, keys)
    to.dq[0, tile.at, :] = dq.astype(operand)
    dk = dot_down(by_q, queries) + dot((by_k + by_k.T).astype(operand), keys)
    dk = dk + beta * start * grads.keys[...] + end * grads.ends[...]
    to.dk[0, tile.at, :] = dk.astype(operand)
    to.dv[0, tile.at, :] = (beta * dvalues).astype(operand)

    sums = lambda a, b: jnp.sum(a * b.astype(jnp.float32), axis=1, keepdims=True)
    by_start = start * sums(grads.keys[...], keys)
    dbeta = sums(dvalues, read(given.v)) + tpu_tile.sums_of_rows(by_alike, c) + by_start
    dsum = tpu_tile.sums_of_rows(by_read + by_lower, c) + beta * by_start
    dsum = dsum + how.scale * start * sums(grads.queries[...], queries)
    dsum = dsum - end * sums(grads.ends[...], keys)
    lane = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
    turned = jnp.where(lane == DSUM, dsum, jnp.where(lane == DBETA, dbeta, 0.0)).T[:ROWS]
    row = lax.broadcasted_iota(jnp.int32, (ROWS, TILE), 0)
    more = grads.last[...] - jnp.sum(by_read + by_lower, axis=0, keepdims=True)
    to.dgates[0, 0, i] = turned + jnp.where(row == DSUM, more, 0.0)
