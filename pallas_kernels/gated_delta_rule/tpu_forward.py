"""The forward kernel of the gated delta rule: a span of one head per step, states carried."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_tile
from pallas_kernels.gated_delta_rule.tpu_tile import BETA, END, START, TILE, dot, dot_down


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


class Specs(NamedTuple):
    """BlockSpecs of one head's span; `at` turns the number of a step into that of a span."""

    gates: Any
    keys: Any
    values: Any
    states: Any
    start: Any


def specs(how: How, m: int, k: int, v: int, at) -> Specs:
    """For a grid (b, h, spans), with the memories of chunks prefetched or not."""
    tiles = how.span // TILE
    token = lambda width: pl.BlockSpec((1, how.span, width), lambda b, h, n, *_: (b, at(n), h))
    return Specs(
        gates=pl.BlockSpec(
            (1, 1, tiles, tpu_tile.ROWS, TILE), lambda b, h, n, *_: (b, h, at(n), 0, 0)
        ),
        keys=token(k),
        values=token(v),
        states=pl.BlockSpec(
            (1, m, 1, k, v),
            lambda b, h, n, *_: (b, 0, h, 0, 0),
            pipeline_mode=pl.Buffered(1),
        ),
        start=pl.BlockSpec((1, 1, 1, k, v), lambda b, h, n, *_: (b, at(n), h, 0, 0)),
    )


def forward(q, k, v, gates, s, memory, how: How, *, keep: bool):
    """y and the last states; with `keep` the state before each span too (of its first memory).

    Args:
        q, k: `[b t h k]`.
        v: `[b t h v]`.
        gates: float32 `[b h tiles 8 128]`, see tpu_tile.
        s: float32 `[b m h k v]`.
        memory: int32 `[b chunks]`, or None = there is one.
        how: what is fixed.
        keep: for the backward pass.

    Returns:
        y `[b t h v]`, s `[b m h k v]`, starts `[b spans h k v]` in the dtype of k, or None.
    """
    b, t, h, width = k.shape
    m, values = s.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = specs(how, m, width, values, lambda n: n)
    prefetched = () if memory is None else (memory,)
    y = jax.ShapeDtypeStruct((b, t, h * values), v.dtype)
    starts = jax.ShapeDtypeStruct((b, spans, h, width, values), k.dtype)
    flat = lambda x: x.reshape(b, t, -1)
    found = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memory is not None),
        name="gated_delta_rule_forward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[blocks.gates, blocks.keys, blocks.keys, blocks.values, blocks.states],
        out_specs=[blocks.values, blocks.states, *([blocks.start] if keep else [])],
        out_shape=[y, jax.ShapeDtypeStruct(s.shape, s.dtype), *([starts] if keep else [])],
        semantics=("parallel", "parallel", "arbitrary"),
        num_scalar_prefetch=len(prefetched),
        cost=None,
    )(*prefetched, gates, flat(q), flat(k), flat(v), s)
    y, s, *starts = found
    return y.reshape(v.shape), s, starts[0] if keep else None


def _body(*refs, how: How, memories: bool):
    memory, refs = (refs[0], refs[1:]) if memories else (None, refs)
    gates, q, k, v, s_before, y, s, *starts = refs
    operand = k.dtype
    chunk, tiles = how.chunk, how.span // TILE
    row, step = pl.program_id(0), pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * (how.span // chunk) + place]

    @pl.when(step == 0)
    def _():
        s[...] = s_before[...]

    if starts:
        starts[0][0, 0, 0] = s[0, memory_of(0), 0].astype(operand)

    def one(i, _):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        rows = gates[0, 0, i]
        q_i, k_i, v_i = (tpu_tile.read_tokens(x, at, rows, how.masked) for x in (q, k, v))
        x = tpu_tile.inside(rows, k_i, chunk)
        beta, start = rows[BETA : BETA + 1], rows[START : START + 1]
        values = dot((x.solved * beta).astype(operand), v_i)
        keys = dot((x.solved * (beta * start)).astype(operand), k_i).astype(operand)
        written, read = [], []
        for part in range(TILE // chunk):
            own = slice(part * chunk, (part + 1) * chunk)
            j = memory_of(i * (TILE // chunk) + part)
            before = s[0, j, 0]
            both = dot(jnp.concatenate([keys[own], q_i[own]]), before.astype(operand))
            x_i = values[own] - both[:chunk]
            end = (x.columns[END][own] * x_i).astype(operand)
            through = rows[START : START + 1, own.stop - 1 : own.stop]
            s[0, j, 0] = through * before + dot_down(k_i[own], end)
            written.append(x_i.astype(operand))
            read.append(both[chunk:])
        scores = (how.scale * tpu_tile.dot_across(q_i, k_i) * x.faded).astype(operand)
        out = how.scale * x.columns[START] * jnp.concatenate(read)
        out = out + dot(scores, jnp.concatenate(written))
        y[0, at, :] = out.astype(y.dtype)
        return 0

    lax.fori_loop(0, tiles, one, 0, unroll=how.config.unroll)
