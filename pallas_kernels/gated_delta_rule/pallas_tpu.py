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
from jax.experimental import pallas as pl

from pallas_kernels.core import chunks, dispatch, tpu
from pallas_kernels.core.chunks import Plan, keep
from pallas_kernels.core.tpu import TpuConfig
from pallas_kernels.gated_delta_rule import tpu_tile
from pallas_kernels.gated_delta_rule.tpu_backward import DBETA, DSUM, backward
from pallas_kernels.gated_delta_rule.tpu_forward import forward
from pallas_kernels.gated_delta_rule.tpu_span import How
from pallas_kernels.gated_delta_rule.tpu_tile import LOWEST, SQUARE, TILE

_MOST = 1024  # tokens of a span
_CHUNKS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens per state inside a span: 16, 32, 64 or 128; at most a block of memories.
        span: tokens per step of the grid, a multiple of 128. One state per span is kept for the
            backward pass.
    """

    chunk: int = 64
    span: int = 512

    def __post_init__(self):
        if self.chunk not in _CHUNKS:
            raise ValueError(f"chunk is {self.chunk}; it must be 16, 32, 64 or 128")
        if self.span < 1 or self.span % TILE:
            raise ValueError(f"span is {self.span}; it must be a multiple of {TILE}")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Chunks of 64; the longest spans that leave vector memory some room.

        Args:
            sizes: t, k, v, m (memories) and itemsize (of q, k and v).
            device_kind: jax's name of the device.
        """
        room = 0.7 * tpu.generation(device_kind).scoped_vmem
        fits = [n for n in range(TILE, _MOST + 1, TILE) if vmem(sizes, n, 64) <= room]
        most = max(fits, default=TILE)
        spans = pl.cdiv(sizes["t"], most)
        span = tpu.round_up(pl.cdiv(sizes["t"], spans), TILE)  # the last one is not half empty
        need = None if fits else int(1.3 * vmem(sizes, TILE, 64))
        return cls(span=span, vmem_limit_bytes=need, device_kind=device_kind)


def vmem(sizes: Mapping[str, int], span: int, chunk: int) -> int:
    """Bytes that the backward kernel, the larger one, takes of vector memory."""
    k, v = (tpu.round_up(sizes[x], tpu.LANES) for x in "kv")
    m, item = sizes["m"], sizes["itemsize"]
    tokens = 2 * span * (4 * k + 3 * v) * item + 4 * span * 32
    states = 4 * k * v * ((3 * m if m > 1 else 2) + 1) + 2 * k * v * item
    kept = span // chunk * k * v * item
    work = span * (4 * v + (v + 3 * k) * item) + 5 * 4 * span * chunk
    return tokens + states + kept + work + 4 * TILE * 3 * k


def _sizes(q, v, s, block_memory) -> dict[str, int]:
    b, t, h, k = q.shape
    m = 1 if block_memory is None else s.shape[1]
    return dict(b=b, t=t, h=h, k=k, v=v.shape[-1], m=m, itemsize=q.dtype.itemsize)


def refuses(shapes, device_kind) -> str | None:
    """Refuses dtypes, blocks and states that it cannot hold."""
    q, k, v, _, _, s, _, _, block_memory = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    if block_memory is not None and q.shape[1] // block_memory.shape[1] < SQUARE:
        return f"blocks of memories have fewer than {SQUARE} tokens"
    need = vmem(_sizes(q, v, s, block_memory), TILE, 64)
    if need > 0.7 * tpu.generation(device_kind).vmem:
        return f"its states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config):
    """See `gated_delta_rule`; s in float32. Returns y, s, last_id."""
    operand = jnp.bfloat16 if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    one_memory, t = block_memory is None, q.shape[1]
    y_dtype, sizes = v.dtype, _sizes(q.astype(operand), v, s, block_memory)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    chunk = min(chunks.fitting(config.chunk, t, block_memory), TILE)
    span = min(config.span, tpu.round_up(t, TILE))
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory, fill=span // chunk)
    how = How(config, chunk, span, scale, masked=plan.valid is not None)

    keys, values = (tpu.round_up(sizes[x], tpu.LANES) for x in "kv")
    pad = lambda x, size: tpu.pad_to(x.astype(operand), 3, size)
    states = s[:, None] if one_memory else s
    states = tpu.pad_to(tpu.pad_to(states, 3, keys), 4, values)
    y, states = _rule((pad(q, keys), pad(k, keys), pad(v, values), g, beta), states, plan, how)
    states = states[..., : sizes["k"], : sizes["v"]]
    y = y[..., : sizes["v"]].astype(y_dtype)
    return y, states[:, 0] if one_memory else states, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs, s, plan: Plan, how: How):
    """y `[b t h v]` and the last states `[b m h k v]`."""
    q, k, v, g, beta = inputs
    gates = _gates(g, beta, plan, how)
    y, s, _ = forward(q, k, v, gates, s, _memory(plan), how, keep=False, cost=_cost(q, v))
    return y, s


def _rule_forward(inputs, s, plan, how):
    q, k, v, g, beta = inputs
    gates = _gates(g, beta, plan, how)
    y, after, starts = forward(q, k, v, gates, s, _memory(plan), how, keep=True, cost=_cost(q, v))
    return (y, after), (inputs, None if plan.memory is None else s, starts, plan)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g, beta), s, starts, plan = residuals
    dy, ds = cotangents
    gates = _gates(g, beta, plan, how)
    dq, dk, dv, dgates, ds = backward(
        *(q, k, v, gates, s, starts, _memory(plan), dy, ds, how), cost=_cost(q, v, backward=True)
    )
    dsum, dbeta = (_by_chunk(dgates[:, :, :, row], how) for row in (DSUM, DBETA))
    # A log decay acts on all that passes its token: sums over what comes after.
    dg = jax.lax.cumsum(dsum, axis=3, reverse=True)
    valid = None if plan.valid is None else plan.valid[:, :, None]
    dg, dbeta = (chunks.join(keep(x, valid), g.shape[1]) for x in (dg, dbeta))
    return (dq, dk, dv, dg.astype(g.dtype), dbeta.astype(beta.dtype)), ds, None


_rule.defvjp(_rule_forward, _rule_backward)


def _cost(q, v, *, backward: bool = False) -> pl.CostEstimate:
    b, t, h, k = q.shape
    states, ends = b * t * h * k * v.shape[-1], b * h * k * v.shape[-1]
    arrays = (4 * q.size + 3 * v.size) if backward else 2 * (q.size + v.size)
    return pl.CostEstimate(
        flops=(16 if backward else 7) * states,
        bytes_accessed=q.dtype.itemsize * arrays + 8 * ends,
        transcendentals=b * t * h,
    )


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
    document = jnp.zeros((n, b, c)) if plan.document is None else plan.document
    valid = jnp.ones((n, b, c)) if plan.valid is None else plan.valid
    rows = [g, beta, start, end, document[:, :, None], valid[:, :, None]]
    rows += [0.0] * (tpu_tile.ROWS - len(rows))
    x = jnp.stack([jnp.broadcast_to(x, g.shape).astype(jnp.float32) for x in rows], axis=3)
    x = x.reshape(-1, how.parts, b, h, tpu_tile.ROWS, c)
    return x.transpose(2, 3, 0, 4, 1, 5).reshape(b, h, -1, tpu_tile.ROWS, TILE)


def _by_chunk(x, how: How):
    """`[b h tiles 128]` as `[n b h c]`."""
    b, h, _, _ = x.shape
    return jnp.moveaxis(x.reshape(b, h, -1, how.chunk), 2, 0)
