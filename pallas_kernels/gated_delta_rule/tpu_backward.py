"""The backward kernel of the gated delta rule: spans from the last to the first.

From the state before a span its chunks are computed again, which leaves their states and what they
wrote in vector memory; then the chunks are walked back with the gradient of the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_tile
from pallas_kernels.gated_delta_rule.tpu_forward import How, specs
from pallas_kernels.gated_delta_rule.tpu_tile import (
    BETA,
    END,
    START,
    TILE,
    dot,
    dot_across,
    dot_down,
)


def backward(q, k, v, gates, s, starts, memory, dy, ds, how: How):
    """Gradients of q, k, v, of what gates hold, and of the first states.

    Args:
        q, k, v, gates, s, memory, how: as `tpu_forward.forward` took them; s is read only where
            there are memories.
        starts: what it kept.
        dy: `[b t h v]`, in the dtype of k.
        ds: float32 `[b m h k v]`, of the last states.

    Returns:
        dq, dk, dv; float32 `[b h tiles 8 128]`, whose first row is by the sum of g up to a token
        of its chunk and whose second is by beta; ds of the first states.
    """
    b, t, h, width = k.shape
    m, values = ds.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = specs(how, m, width, values, lambda n: spans - 1 - n)
    memories = memory is not None
    prefetched = (memory, s) if memories else ()
    flat = lambda x: x.reshape(b, t, -1)
    given = [blocks.states] if memories else []
    like = lambda x: jax.ShapeDtypeStruct(flat(x).shape, x.dtype)
    scratch = lambda *shape, dtype=k.dtype: pltpu.VMEM(shape, dtype)
    dq, dk, dv, dgates, ds = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memories, spans=spans),
        name="gated_delta_rule_backward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[
            *given,
            blocks.gates,
            blocks.keys,
            blocks.keys,
            blocks.values,
            blocks.values,
            blocks.start,
            blocks.states,
        ],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.gates, blocks.states],
        out_shape=[
            like(q),
            like(k),
            like(v),
            jax.ShapeDtypeStruct(gates.shape, gates.dtype),
            jax.ShapeDtypeStruct(ds.shape, ds.dtype),
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        num_scalar_prefetch=int(memories),
        scratch_shapes=[
            scratch(how.span // how.chunk, width, values),  # states before chunks
            scratch(width, values, dtype=jnp.float32),  # the one now
            scratch(how.span, width),  # W
            scratch(how.span, values),  # X
            scratch(how.span, TILE),  # T transposed
            scratch(how.span, TILE),  # scores
            scratch(how.span, TILE, dtype=jnp.float32),  # D
            scratch(how.span, TILE, dtype=jnp.float32),  # alike
        ],
        cost=None,
    )(*prefetched, gates, flat(q), flat(k), flat(v), flat(dy), starts, ds)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dgates, ds


def _body(*refs, how: How, memories: bool, spans: int):
    memory, s, refs = (*refs[:2], refs[2:]) if memories else (None, None, refs)
    gates, q, k, v, dy, start, ds_after, dq, dk, dv, dgates, ds, *scratch = refs
    states, now, keys, written, solved, scores, faded, alike = scratch
    operand, chunk = k.dtype, how.chunk
    parts, tiles = TILE // chunk, how.span // TILE
    row, step = pl.program_id(0), spans - 1 - pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * (how.span // chunk) + place]

    def tile_at(i):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        rows = gates[0, 0, i]
        return at, rows, lambda x: tpu_tile.read_tokens(x, at, rows, how.masked)

    @pl.when(pl.program_id(2) == 0)
    def _():
        ds[...] = ds_after[...]

    now[...] = start[0, 0, 0].astype(jnp.float32)

    def again(i, _):
        at, rows, read = tile_at(i)
        k_i = read(k)
        x = tpu_tile.inside(rows, k_i, chunk)
        beta = rows[BETA : BETA + 1]
        values = dot((x.solved * beta).astype(operand), read(v))
        keys_i = (x.solved * (beta * rows[START : START + 1])).astype(operand)
        keys_i = dot(keys_i, k_i).astype(operand)
        keys[at, :], faded[at, :], alike[at, :] = keys_i, x.faded, x.alike
        solved[at, :] = x.solved.T.astype(operand)
        scores[at, :] = (how.scale * dot_across(read(q), k_i) * x.faded).astype(operand)
        for part in range(parts):
            place = i * parts + part
            own = slice(part * chunk, (part + 1) * chunk)
            if memory is not None:
                j = memory_of(place)

                @pl.when((place > 0) & (memory_of(jnp.maximum(place - 1, 0)) != j))
                def _(j=j):
                    now[...] = s[0, j, 0]

            before = now[...]
            states[place] = before.astype(operand)
            x_i = values[own] - dot(keys_i[own], before.astype(operand))
            written[pl.ds(pl.multiple_of(place * chunk, chunk), chunk), :] = x_i.astype(operand)
            end = (x.columns[END][own] * x_i).astype(operand)
            through = rows[START : START + 1, own.stop - 1 : own.stop]
            now[...] = through * before + dot_down(k_i[own], end)
        return 0

    lax.fori_loop(0, tiles, again, 0, unroll=how.config.unroll)

    def back(n, _):
        i = tiles - 1 - n
        at, rows, read = tile_at(i)
        columns = tpu_tile.columns_of(rows)
        beta, start, end = columns[BETA], columns[START], columns[END]
        q_i, k_i, dy_i = read(q), read(k), read(dy)
        keys_i, solved_i, written_i = keys[at, :], solved[at, :], written[at, :]
        by_scores = dot_down(scores[at, :], dy_i)
        read_out = (how.scale * start * dy_i.astype(jnp.float32)).astype(operand)
        empty = jnp.zeros((chunk, dy_i.shape[1]), operand)
        dvalues, dkeys, dq_start, dk_end, at_end = [], [], [], [], []
        for part in reversed(range(parts)):
            place = i * parts + part
            own = slice(part * chunk, (part + 1) * chunk)
            j = memory_of(place)
            ds_i, before = ds[0, j, 0], states[place]
            through = rows[START : START + 1, own.stop - 1 : own.stop]
            dx = by_scores[own] + end[own] * dot(k_i[own], ds_i.astype(operand))
            dx = dx.astype(operand)
            # The other chunks of the tile have no part in these rows of T^T.
            padded = jnp.concatenate([dx if p == part else empty for p in range(parts)])
            dvalues_i = dot(solved_i[own], padded)
            both = dot_across(jnp.concatenate([dvalues_i.astype(operand), dy_i[own]]), before)
            dk_end_i = dot_across(written_i[own], ds_i.astype(operand))
            kept = jnp.sum(before.astype(jnp.float32) * ds_i, axis=0, keepdims=True)
            at_end.append(
                through * jnp.sum(kept, axis=1, keepdims=True)
                + jnp.sum(
                    jnp.sum(
                        end[own] * dk_end_i * k_i[own].astype(jnp.float32), axis=0, keepdims=True
                    ),
                    axis=1,
                    keepdims=True,
                )
            )
            ds[0, j, 0] = through * ds_i + dot_down(
                jnp.concatenate([keys_i[own], q_i[own]]),
                jnp.concatenate([-dx, read_out[own]]),
            )
            dvalues.append(dvalues_i)
            dkeys.append(-both[:chunk])
            dq_start.append(both[chunk:])
            dk_end.append(dk_end_i)
        dvalues, dkeys, dq_start, dk_end = (
            jnp.concatenate(x[::-1]) for x in (dvalues, dkeys, dq_start, dk_end)
        )

        # What was written: through T, whose gradient is dL = -T^T dT T^T; what was read.
        pairs = dot_across(jnp.concatenate([dvalues.astype(operand), dy_i]), written_i)
        dlower, dscores = -pairs[:TILE], pairs[TILE:]
        by_alike = dlower * alike[at, :]
        by_read = dscores * scores[at, :].astype(jnp.float32)
        row_at, lane = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
        by_q = (how.scale * dscores * faded[at, :]).astype(operand)
        by_k = jnp.where(row_at > lane, beta * dlower * faded[at, :], 0.0)
        dq_i = how.scale * start * dq_start + dot(by_q, k_i)
        dk_i = dot_down(by_q, q_i) + dot((by_k + by_k.T).astype(operand), k_i)
        dk_i = dk_i + beta * start * dkeys + end * dk_end
        dq[0, at, :] = dq_i.astype(dq.dtype)
        dk[0, at, :] = dk_i.astype(dk.dtype)
        dv[0, at, :] = (beta * dvalues).astype(dv.dtype)

        wide = lambda x: x.astype(jnp.float32)
        rows_of = lambda x: jnp.sum(x, axis=1, keepdims=True)
        by_start = start * rows_of(dkeys * wide(k_i))
        alike_rows = rows_of(by_alike)
        dbeta = rows_of(dvalues * wide(read(v))) + alike_rows + by_start
        dsum = rows_of(by_read) + beta * (alike_rows + by_start)
        dsum = dsum + how.scale * start * rows_of(dq_start * wide(q_i))
        dsum = dsum - end * rows_of(dk_end * wide(k_i))
        turned = jnp.where(lane == 0, dsum, jnp.where(lane == 1, dbeta, 0.0)).T[: tpu_tile.ROWS]
        columns_sum = jnp.sum(by_read + beta * by_alike, axis=0, keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, (tpu_tile.ROWS, TILE), 1)
        first = lax.broadcasted_iota(jnp.int32, (tpu_tile.ROWS, TILE), 0) == 0
        extra = -columns_sum
        for part, value in zip(reversed(range(parts)), at_end, strict=True):
            extra = extra + jnp.where(last[:1] == (part + 1) * chunk - 1, value, 0.0)
        dgates[0, 0, i] = turned + jnp.where(first, extra, 0.0)
        return 0

    lax.fori_loop(0, tiles, back, 0, unroll=how.config.unroll)
