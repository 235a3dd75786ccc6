"""The backward kernel of the gated delta rule: spans from the last to the first.

From the state before a span its chunks are computed again, which leaves their states and what they
wrote in vector memory; then the chunks are walked back with the gradient of the state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.gated_delta_rule import tpu_span
from pallas_kernels.gated_delta_rule.tpu_span import How, Places, Work
from pallas_kernels.gated_delta_rule.tpu_tile import (
    BETA,
    END,
    START,
    TILE,
    dot,
    dot_across,
    dot_down,
    interpreted,
    sums_along,
)


class Span(NamedTuple):
    """References to a span and to its gradients, `[span width]`."""

    q: Any
    k: Any
    v: Any
    dy: Any
    dq: Any
    dk: Any
    dv: Any


class Grads(NamedTuple):
    """References to gradients on their way; README.md says what the letters are.

    Attributes:
        states: S before each chunk of the span, `[chunks k v]`.
        solved: T^T of a tile, `[128 128]`.
        keys: by diag(beta f) K of a tile, `[128 k]` float32, then by K.
        queries: by diag(scale f) Q, the same, then by Q.
        ends: d times that by diag(d) K, the same.
        met: of a chunk, by B V and by y: what meets its state, `[2 chunk v]`.
        back: what takes its state's gradient back, beside W and Q, the same.
        by_scores: by Q K^T of a tile, spread, `[128 128]`.
        by_alike: by K K^T and its transposed, the same.
        dsum: numbers whose sums along rows are what g's sums get, `[128 128]` float32.
        dbeta: the same for beta.
        last: what g's sums get beside it, `[1 128]` float32.
    """

    states: Any
    solved: Any
    keys: Any
    queries: Any
    ends: Any
    met: Any
    back: Any
    by_scores: Any
    by_alike: Any
    dsum: Any
    dbeta: Any
    last: Any


def _scratch(how: How, k: int, v: int, dtype: Any) -> Grads:
    by_key, square = pltpu.VMEM((TILE, k), jnp.float32), pltpu.VMEM((TILE, TILE), dtype)
    wide, met = pltpu.VMEM((TILE, TILE), jnp.float32), pltpu.VMEM((2 * how.chunk, v), dtype)
    return Grads(
        states=pltpu.VMEM((how.chunks, k, v), dtype),
        **dict(solved=square, keys=by_key, queries=by_key, ends=by_key),
        **dict(met=met, back=met, by_scores=square, by_alike=square),
        **dict(dsum=wide, dbeta=wide, last=pltpu.VMEM((1, TILE), jnp.float32)),
    )


def backward(q, k, v, places: Places, s, starts, memory, dy, ds, how: How, *, cost):
    """Gradients of q, k, v, g, beta and of the first states.

    Args:
        q, k, v, places, memory, how, cost: as `tpu_forward.forward` took them.
        s: the first states, where there are memories.
        starts: what the forward pass kept.
        dy: `[b t h v]`, in the dtype of k.
        ds: float32 `[b m h k v]`, of the last states.

    Returns:
        dq, dk, dv; dg and dbeta as places have g and beta; ds of the first states.
    """
    b, t, h, width = k.shape
    m, values = ds.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = tpu_span.specs(how, (m, width, values), lambda n: spans - 1 - n)
    memories = memory is not None
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    copy = lambda size: pltpu.VMEM((how.span, size), k.dtype)
    *dinputs, dg, dbeta, ds = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memories, spans=spans),
        name="gated_delta_rule_backward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[
            *([blocks.states] if memories else []),
            *(blocks.gates, blocks.gates, *([blocks.document] if how.masked else [])),
            *(blocks.keys, blocks.keys, blocks.values, blocks.values),
            *(blocks.start, blocks.states),
        ],
        out_specs=[
            *(blocks.keys, blocks.keys, blocks.values),
            *(blocks.gates, blocks.gates, blocks.states),
        ],
        out_shape=[*map(like, (*map(tpu_span.flat, (q, k, v)), places.g, places.beta, ds))],
        semantics=("parallel", "parallel", "arbitrary"),
        num_scalar_prefetch=int(memories),
        scratch_shapes=[
            pltpu.VMEM((width, values), jnp.float32),
            *_scratch(how, width, values, k.dtype),
            *tpu_span.scratch(how, width, values, k.dtype, alike=True),
            *([copy(width), copy(width), copy(values), copy(values)] if how.masked else []),
        ],
        cost=cost,
    )(
        *(x for x in (memory, s, *places) if x is not None),
        *map(tpu_span.flat, (q, k, v, dy)),
        *(starts, ds),
    )
    dq, dk, dv = (x.reshape(like.shape) for x, like in zip(dinputs, (q, k, v), strict=True))
    return dq, dk, dv, dg, dbeta, ds


def _body(*given, how: How, memories: bool, spans: int):
    refs = Refs(given)
    memory, s = refs.take(memories), refs.take(memories)
    g, beta, document = refs.take(), refs.take(), refs.take(how.masked)
    places = Places(g.at[0, 0], beta.at[0, 0], document.at[0] if how.masked else None)
    tokens, starts, ds_after = refs.several(4), refs.take(), refs.take()
    results, dg, dbeta, ds, now = refs.several(3), *refs.several(4)
    grads = Grads(*refs.several(len(Grads._fields)))
    x = tpu_span.work(refs.several(tpu_span.scratch_count(alike=True)), alike=True)
    copies = refs.several(4 if how.masked else 0)
    row, step = pl.program_id(0), spans - 1 - pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * how.chunks + place]

    @pl.when(pl.program_id(2) == 0)
    def _():
        ds[...] = ds_after[...]

    now[...] = starts[0, 0, 0].astype(jnp.float32)

    def state(place, lane):
        """The state before a chunk, kept on the way."""
        if s is not None:
            j = memory_of(place)

            @pl.when((place > 0) & (memory_of(jnp.maximum(place - 1, 0)) != j))
            def _():
                now[:, lane] = s[0, j, 0, :, lane]

        grads.states[place, :, lane] = now[:, lane].astype(grads.states.dtype)
        return now.at[:, lane]

    with interpreted(how.config.interpret):
        tokens = tpu_span.tokens(tokens, copies, places, how)
        span = Span(*tokens, *(ref.at[0] for ref in results))
        tpu_span.before_states(places, span.q, span.k, span.v, x, how)
        tpu_span.carry(state, x, how, read=False)

        def tile_back(turn):
            i = how.tiles - 1 - turn
            at = tpu_span.block_at(i, TILE)
            _begin(i, span, grads, x, how)
            for part in reversed(range(how.parts)):
                j = memory_of(i * how.parts + part)
                _chunk_back(i, part, span, ds.at[0, j, 0], grads, x, how)
            _pairs(i, span, grads, x, how)
            _tokens(i, span, grads, x, how)
            dg[0, 0, :, at], dbeta[0, 0, :, at] = _numbers(i, grads, x, how)

        tpu_span.loop(how.tiles, tile_back)


def _begin(i: Any, span: Span, grads: Grads, x: Work, how: How) -> None:
    """What a tile needs before its states; in place of U there is what X gets of its tile's y."""
    tile, operand = tpu_span.tile_at(x, i, how), span.k.dtype
    spread = lambda ref: tile.spread(ref[tile.packed, :])
    grads.solved[...] = spread(x.pairs.solved).T.astype(operand)
    x.values[tile.at, :] = dot_down(spread(x.scores).astype(operand), span.dy[tile.at, :])
    grads.last[...] = jnp.zeros_like(grads.last)


def _chunk_back(i: Any, part: int, span: Span, ds: Any, grads: Grads, x: Work, how: How) -> None:
    """Takes the gradient of the state `[k v]` back through a chunk."""
    c, operand, place = how.chunk, span.k.dtype, i * how.parts + part
    tile = tpu_span.tile_at(x, i, how)
    own, own_at = slice(part * c, (part + 1) * c), tpu_span.rows_of(tile.at, part, c)

    def by_value(n):
        start, end = tile.columns[START][own], tile.columns[END][own]
        for lane in tpu_span.side_by_side(n, ds.shape[1]):
            dx = x.values[own_at, lane] + end * dot(span.k[own_at, :], ds[:, lane].astype(operand))
            dx = dx.astype(operand)
            dvalues = dot(grads.solved[own, :], tpu_span.in_its_place(dx, part, how))
            x.values[own_at, lane] = dvalues
            dy = span.dy[own_at, lane]
            grads.met[:c, lane], grads.met[c:, lane] = dvalues.astype(operand), dy
            grads.back[:c, lane] = -dx
            grads.back[c:, lane] = (how.scale * start * dy.astype(jnp.float32)).astype(operand)

    tpu_span.over_lanes(by_value, ds.shape[1])
    at_end = tile.lanes(1) == own.stop - 1

    def by_key(n):
        block, end = tpu_span.block_at(n), tile.columns[END][own]
        before = grads.states.at[place, block, :]
        both = dot_across(grads.met[...], before[...])
        grads.keys[own, block], grads.queries[own, block] = -both[:c], both[c:]
        ends = end * dot_across(x.written[own_at, :], ds[block, :].astype(operand))
        grads.ends[own, block] = ends
        last = jnp.sum(ends * span.k[own_at, block].astype(jnp.float32), axis=0, keepdims=True)
        grads.last[...] += jnp.where(at_end, jnp.sum(last, axis=1, keepdims=True), 0.0)

        def by_value(n):
            met = x.met[tpu_span.block_at(place, 2 * c), block].T
            kept = jnp.zeros((1, tpu.LANES), jnp.float32)
            through = tile.rows[START : START + 1, own.stop - 1 : own.stop]
            for lane in tpu_span.side_by_side(n, ds.shape[1]):
                after = ds[block, lane]
                products = before[:, lane].astype(jnp.float32) * after
                kept = kept + jnp.sum(products, axis=0, keepdims=True)
                ds[block, lane] = through * after + dot(met, grads.back[:, lane])
            kept = through * jnp.sum(kept, axis=1, keepdims=True)
            grads.last[...] += jnp.where(at_end, kept, 0.0)

        tpu_span.over_lanes(by_value, ds.shape[1])

    tpu_span.loop(span.k.shape[1] // tpu.LANES, by_key)


def _pairs(i: Any, span: Span, grads: Grads, x: Work, how: How) -> None:
    """What the tokens of a tile got through each other."""
    tile, operand = tpu_span.tile_at(x, i, how), span.k.dtype
    packed = lambda ref: ref[tile.packed, :]
    # What was written: through T, whose gradient is dL = -T^T dT T^T.
    written = x.written[tile.at, :]
    dlower = -tile.pack(dot_across(x.values[tile.at, :].astype(operand), written))
    rows, lanes = tile.places()
    beta = tile.pack(tile.columns[BETA])
    by_alike = jnp.where(rows > lanes, beta * dlower * packed(x.pairs.faded), 0.0)
    by_alike = tile.spread(by_alike)
    grads.by_alike[...] = (by_alike + by_alike.T).astype(operand)
    grads.dbeta[...] = tile.spread(dlower * packed(x.pairs.alike))
    # What was read.
    dscores = tile.pack(dot_across(span.dy[tile.at, :], written))
    by_scores = tile.spread(how.scale * dscores * packed(x.pairs.faded))
    grads.by_scores[...] = by_scores.astype(operand)
    by_pairs = dscores * packed(x.scores) + dlower * packed(x.pairs.lower)
    grads.dsum[...] = tile.spread(by_pairs)
    grads.last[...] -= jnp.sum(by_pairs, axis=0, keepdims=True)


def _tokens(i: Any, span: Span, grads: Grads, x: Work, how: How) -> None:
    """The gradients of a tile's q, k and v."""
    tile, operand = tpu_span.tile_at(x, i, how), span.k.dtype

    def by_query(n):
        lane, start = tpu_span.block_at(n), tile.columns[START]
        dq_start = how.scale * start * grads.queries[:, lane]
        grads.queries[:, lane] = dq_start + dot(grads.by_scores[...], span.k[tile.at, lane])
        grads.dsum[...] += dq_start * span.q[tile.at, lane].astype(jnp.float32)

    def by_key(n):
        lane, beta, start = tpu_span.block_at(n), tile.columns[BETA], tile.columns[START]
        keys = span.k[tile.at, lane]
        dk = dot_down(grads.by_scores[...], span.q[tile.at, lane])
        dk = dk + dot(grads.by_alike[...], keys)
        dk_start, dk_end = start * grads.keys[:, lane], grads.ends[:, lane]
        keys = keys.astype(jnp.float32)
        grads.dbeta[...] += dk_start * keys
        grads.dsum[...] += (beta * dk_start - dk_end) * keys
        span.dk[tile.at, lane] = (dk + beta * dk_start + dk_end).astype(operand)
        span.dq[tile.at, lane] = grads.queries[:, lane].astype(operand)

    def by_value(n):
        beta = tile.columns[BETA]
        for lane in tpu_span.side_by_side(n, span.v.shape[1]):
            dvalues = x.values[tile.at, lane]
            grads.dbeta[...] += dvalues * span.v[tile.at, lane].astype(jnp.float32)
            span.dv[tile.at, lane] = (beta * dvalues).astype(operand)

    tpu_span.loop(span.k.shape[1] // tpu.LANES, by_query)
    tpu_span.loop(span.k.shape[1] // tpu.LANES, by_key)
    tpu_span.over_lanes(by_value, span.v.shape[1])


def _numbers(i: Any, grads: Grads, x: Work, how: How) -> tuple[jax.Array, jax.Array]:
    """The gradients of a tile's g and beta, `[1 128]`."""
    tile = tpu_span.tile_at(x, i, how)
    along = lambda ref: jnp.sum(ref[...].T, axis=0, keepdims=True)
    # A log decay acts on all that passes its token: sums over what comes after.
    rows, lanes = tile.places()
    dsum = along(grads.dsum) + grads.last[...]
    return sums_along(dsum, rows >= lanes, tile), along(grads.dbeta)
