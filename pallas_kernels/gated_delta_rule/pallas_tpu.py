"""gated_delta_rule as a Mosaic TPU kernel: one head's state stays in vector memory.

The grid goes over rows, heads, and spans of some hundred tokens; README.md ("On a TPU") says what
is moved and kept. What the kernels need per token and head is made ready here, in XLA: sums of log
decays inside chunks, masks, memories.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks, dispatch, tpu
from pallas_kernels.core.chunks import Plan, keep
from pallas_kernels.core.tpu import TpuConfig
from pallas_kernels.gated_delta_rule import tpu_tile
from pallas_kernels.gated_delta_rule.tpu_backward import backward
from pallas_kernels.gated_delta_rule.tpu_forward import How, forward
from pallas_kernels.gated_delta_rule.tpu_tile import LOWEST, SQUARE, TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens per state inside a span: 16, 32, 64 or 128; at most a block of memories.
        span: tokens per step of the grid, a multiple of 128. One state per span is kept for the
            backward pass.
        unroll: tiles of 128 tokens per turn of the loop inside a span.
    """

    chunk: int = 64
    span: int = 512
    unroll: int = 1

    def __post_init__(self):
        if self.chunk not in (16, 32, 64, 128):
            raise ValueError(f"chunk is {self.chunk}; it must be 16, 32, 64 or 128")
        if self.span < 1 or self.span % TILE:
            raise ValueError(f"span is {self.span}; it must be a multiple of {TILE}")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Chunks of 64; spans as long as vector memory allows, at most 1,024 tokens."""
        return cls(device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """Refuses what its tiles or the vector memory cannot hold."""
    del device_kind
    q, *_, block_memory = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    if block_memory is not None and q.shape[1] // block_memory.shape[1] < SQUARE:
        return f"blocks of memories have fewer than {SQUARE} tokens"
    return None


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config):
    """See `gated_delta_rule`; s in float32. Returns y, s, last_id."""
    b, t, h, width = q.shape
    sizes = dict(b=b, t=t, h=h, k=width, v=v.shape[-1])
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    chunk = min(chunks.fitting(config.chunk, t, block_memory), TILE)
    span = min(config.span, tpu.round_up(t, TILE))
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory, fill=span // chunk)
    how = How(config, chunk, span, scale, masked=plan.valid is not None)
    operand = jnp.bfloat16 if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    keys, values = (tpu.round_up(x, tpu.LANES) for x in (width, v.shape[-1]))
    pad = lambda x, size: tpu.pad_to(x.astype(operand), 3, size)
    one_memory = block_memory is None
    states = s[:, None] if one_memory else s
    states = tpu.pad_to(tpu.pad_to(states, 3, keys), 4, values)
    y, states = _rule((pad(q, keys), pad(k, keys), pad(v, values), g, beta), states, plan, how)
    states = states[..., :width, : v.shape[-1]]
    return y[..., : v.shape[-1]].astype(v.dtype), states[:, 0] if one_memory else states, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs, s, plan: Plan, how: How):
    """y `[b t h v]` and the last states `[b m h k v]`."""
    q, k, v, g, beta = inputs
    gates = _gates(g, beta, plan, how)
    y, s, _ = forward(q, k, v, gates, s, _memory(plan), how, keep=False)
    return y, s


def _rule_forward(inputs, s, plan, how):
    q, k, v, g, beta = inputs
    gates = _gates(g, beta, plan, how)
    y, after, starts = forward(q, k, v, gates, s, _memory(plan), how, keep=True)
    return (y, after), (inputs, s if plan.memory is not None else None, starts, plan)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g, beta), s, starts, plan = residuals
    dy, ds = cotangents
    gates = _gates(g, beta, plan, how)
    dq, dk, dv, dgates, ds = backward(
        q, k, v, gates, s, starts, _memory(plan), dy.astype(k.dtype), ds, how
    )
    dsum, dbeta = (_by_token(dgates[:, :, :, row], plan, how) for row in (0, 1))
    # A log decay acts on all that passes its token: sums over what comes after.
    dg = jax.lax.cumsum(dsum, axis=3, reverse=True)
    dg, dbeta = (
        chunks.join(keep(x, None if plan.valid is None else plan.valid[:, :, None]), g.shape[1])
        for x in (dg, dbeta)
    )
    return (dq, dk, dv, dg.astype(g.dtype), dbeta.astype(beta.dtype)), ds, None


_rule.defvjp(_rule_forward, _rule_backward)


def _memory(plan: Plan):
    """int32 `[b chunks]`, or None = there is one memory."""
    return None if plan.memory is None else plan.memory.T


def _gates(g, beta, plan: Plan, how: How):
    """The numbers per token, float32 `[b h tiles 8 128]`; see tpu_tile."""
    whole = tpu.round_up(g.shape[1], how.span)
    g, beta = (chunks.cut(tpu.pad_to(x, 1, whole), how.chunk, plan, jnp.float32) for x in (g, beta))
    n, b, h, c = g.shape
    g = jnp.maximum(g, LOWEST)
    start = keep(jnp.exp(jnp.cumsum(g, axis=3)), chunks.sees_start(plan))
    after = jnp.pad(g[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    end = keep(jnp.exp(jax.lax.cumsum(after, axis=3, reverse=True)), chunks.reaches_end(plan))
    # Chunks of a tile must not see each other, nor documents of a chunk.
    group = (jnp.arange(n) % (TILE // c) * (TILE + 1))[:, None, None]
    if plan.document is not None:
        group = group + plan.document
    group = jnp.broadcast_to(group, (n, b, c))[:, :, None]
    valid = jnp.ones((n, b, c), bool) if plan.valid is None else plan.valid
    rows = [g, beta, start, end, group, valid[:, :, None]]
    rows = [jnp.broadcast_to(x.astype(jnp.float32), g.shape) for x in rows]
    rows += [jnp.zeros_like(g)] * (tpu_tile.ROWS - len(rows))
    x = jnp.stack(rows, axis=3)  # [n b h 8 c]
    x = x.reshape(-1, TILE // c, b, h, tpu_tile.ROWS, c)
    return x.transpose(2, 3, 0, 4, 1, 5).reshape(b, h, -1, tpu_tile.ROWS, TILE)


def _by_token(x, plan: Plan, how: How):
    """`[b h tiles 128]` as `[n b h c]`."""
    b, h, _, _ = x.shape
    return jnp.moveaxis(x.reshape(b, h, -1, how.chunk), 2, 0)
