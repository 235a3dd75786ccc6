"""gated_delta_rule as a Mosaic TPU kernel: states stay in vector memory.

The grid goes over rows, heads, and spans of some hundred tokens; README.md ("On a TPU") says what
is moved and kept.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import chunks, dispatch, tpu
from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.tpu import TpuConfig
from pallas_kernels.gated_delta_rule.tpu_backward import backward
from pallas_kernels.gated_delta_rule.tpu_forward import forward
from pallas_kernels.gated_delta_rule.tpu_span import ABSENT, How, Places
from pallas_kernels.gated_delta_rule.tpu_tile import LOWEST, SQUARE, TILE

_LONG = 512  # tokens of a span
# Of the limit on vector memory, what blocks and scratch take; of the memory, what the limit may be.
_SHARE, _MOST = 0.73, 0.85
_CHUNKS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens per state inside a span: 16, 32, 64 or 128; at most a block of memories.
        span: tokens per step of the grid, a multiple of 128. One state per span is kept for the
            backward pass.
        vmem_limit_bytes: of both kernels; None = what each of them needs.
    """

    chunk: int = 64
    span: int = _LONG

    def __post_init__(self):
        if self.chunk not in _CHUNKS:
            raise ValueError(f"chunk is {self.chunk}; it must be 16, 32, 64 or 128")
        if self.span < 1 or self.span % TILE:
            raise ValueError(f"span is {self.span}; it must be a multiple of {TILE}")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """Chunks of 64; spans of 512 tokens, or of what the vector memory can hold.

        Args:
            sizes: t, k, v, m (memories) and itemsize (of q, k and v).
            device_kind: jax's name of the device.
        """
        most = _SHARE * _MOST * tpu.generation(device_kind).vmem
        spans = [
            n for n in range(TILE, _LONG + 1, TILE) if vmem(sizes, n, 64, backward=True) <= most
        ]
        count = pl.cdiv(sizes["t"], max(spans, default=TILE))
        span = tpu.round_up(pl.cdiv(sizes["t"], count), TILE)  # the last one is not half empty
        return cls(span=span, device_kind=device_kind)


def vmem(sizes: Mapping[str, int], span: int, chunk: int, *, backward: bool) -> int:
    """Bytes of vector memory that a kernel's blocks and scratch take.

    Args:
        sizes: as `PallasTpuConfig.heuristic` takes them.
        span, chunk: tokens.
        backward: which kernel.
    """
    k, v = (tpu.round_up(sizes[x], tpu.LANES) for x in "kv")
    m, item = sizes["m"], sizes["itemsize"]
    state, token = k * v, (4 * k + 3 * v if backward else 2 * k + 2 * v) * item
    blocks = 2 * span * (token + 4 * tpu.SUBLANES * (5 if backward else 3))
    blocks += 2 * state * item + 4 * m * state * (3 if backward and m > 1 else 2)
    copies = span * (2 * k + (2 if backward else 1) * v) * item
    work = span * (4 * v + (v + 3 * k) * item) + 4 * (5 if backward else 4) * span * chunk
    if backward:
        work += span // chunk * state * item + 4 * state + 4 * TILE * (3 * k + 3 * TILE)
        work += 4 * chunk * v * item
    return blocks + work + (copies if m > 1 else 0)


def _sizes(q, v, s, block_memory, item: int) -> dict[str, int]:
    b, t, h, k = q.shape
    m = 1 if s is None or block_memory is None else s.shape[1]
    return dict(b=b, t=t, h=h, k=k, v=v.shape[-1], m=m, itemsize=item)


def _operand(*arrays):
    """What the matrix units are given: bfloat16 where all arrays are."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def refuses(shapes, device_kind) -> str | None:
    """Refuses dtypes, blocks and states that it cannot hold."""
    q, k, v, _, _, s, _, _, block_memory = shapes
    if reason := tpu.refuses_dtypes(shapes):
        return reason
    if block_memory is not None and q.shape[1] // block_memory.shape[1] < SQUARE:
        return f"blocks of memories have fewer than {SQUARE} tokens"
    item = jnp.dtype(_operand(q, k, v)).itemsize
    need = vmem(_sizes(q, v, s, block_memory, item), TILE, 64, backward=True)
    if need > _SHARE * _MOST * tpu.generation(device_kind).vmem:
        return f"its states and tokens take {need / tpu.MIB:.0f} MiB of vector memory"
    return None


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config, fresh):
    """See `gated_delta_rule`; s in float32, zeros if `fresh`. Returns y, s, last_id."""
    operand, t, y_dtype = _operand(q, k, v), q.shape[1], v.dtype
    sizes = _sizes(q, v, s, block_memory, jnp.dtype(operand).itemsize)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    chunk = min(chunks.fitting(config.chunk, t, block_memory), TILE)
    span = min(config.span, tpu.round_up(t, TILE))
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory, fill=span // chunk)
    how = How(config, chunk, span, scale, masked=plan.valid is not None)

    keys, values = (tpu.round_up(sizes[x], tpu.LANES) for x in "kv")
    pad = lambda x, size: tpu.pad_to(x.astype(operand), 3, size)
    states = None
    if not fresh:
        states = s[:, None] if block_memory is None else s
        states = tpu.pad_to(tpu.pad_to(states, 3, keys), 4, values)
    y, states = _rule((pad(q, keys), pad(k, keys), pad(v, values), g, beta), states, plan, how)
    states = states[..., : sizes["k"], : sizes["v"]]
    y = y[..., : sizes["v"]].astype(y_dtype)
    return y, states[:, 0] if block_memory is None else states, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs, s, plan: Plan, how: How):
    """y `[b t h v]` and the last states `[b m h k v]`; s None = zeros, of one memory."""
    return _forward(inputs, s, plan, how, keep=False)[:2]


def _forward(inputs, s, plan, how, *, keep):
    q, k, v, g, beta = inputs
    how = _with_room(how, q, v, s, plan, backward=False)
    places = _places(g, beta, plan, how)
    return forward(q, k, v, places, s, _memory(plan), how, keep=keep, cost=_cost(q, v))


def _rule_forward(inputs, s, plan, how):
    y, after, starts = _forward(inputs, s, plan, how, keep=True)
    return (y, after), (inputs, None if plan.memory is None else s, starts, plan, s is None)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g, beta), s, starts, plan, fresh = residuals
    dy, ds = cotangents
    how = _with_room(how, q, v, ds, plan, backward=True)
    places, t = _places(g, beta, plan, how), g.shape[1]
    *dinputs, dg, dbeta, ds = backward(
        *(q, k, v, places, s, starts, _memory(plan), dy.astype(k.dtype), ds, how),
        cost=_cost(q, v, backward=True),
    )
    valid = _valid(plan, t)
    for x, like in ((dg, g), (dbeta, beta)):
        x = jnp.swapaxes(x[:, :, 0, :t], 1, 2)
        x = x if valid is None else jnp.where(valid, x, 0)
        dinputs.append(x.astype(like.dtype))
    return tuple(dinputs), None if fresh else ds, None


_rule.defvjp(_rule_forward, _rule_backward)


def _with_room(how: How, q, v, s, plan: Plan, *, backward: bool) -> How:
    """With the limit that a kernel needs, where the config says none.

    The forward kernel takes shorter spans where it needs no other limit then.
    """
    sizes = _sizes(q, v, s, plan.memory, q.dtype.itemsize)
    room = _SHARE * tpu.generation(dispatch.device_kind(how.config)).scoped_vmem
    need = functools.partial(vmem, sizes, chunk=how.chunk, backward=backward)
    if not backward:
        shorter = [n for n in range(TILE, how.span, TILE) if how.span % n == 0]
        fits = [n for n in shorter if need(n) <= room]
        if need(how.span) > room and fits:
            how = how._replace(span=max(fits), stride=how.span // max(fits))
    if how.config.vmem_limit_bytes is not None or need(how.span) <= room:
        return how
    limit = tpu.round_up(int(need(how.span) / _SHARE), tpu.MIB)
    return how._replace(config=dataclasses.replace(how.config, vmem_limit_bytes=limit))


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


def _valid(plan: Plan, t: int):
    """`[b t 1]`, or None = everywhere."""
    if plan.valid is None:
        return None
    return jnp.swapaxes(plan.valid, 0, 1).reshape(plan.valid.shape[1], -1)[:, :t, None]


def _places(g, beta, plan: Plan, how: How) -> Places:
    """g and beta, 0 where there is no token, and the documents of chunks; whole spans."""
    valid, whole = _valid(plan, g.shape[1]), tpu.round_up(g.shape[1], how.span)
    rows = []
    for x in (g, beta):
        x = x.astype(jnp.float32)
        x = x if valid is None else jnp.where(valid, x, 0)
        rows.append(tpu.pad_to(jnp.swapaxes(x, 1, 2), 2, whole)[:, :, None])
    document = None
    if plan.valid is not None:
        document = jnp.zeros(plan.valid.shape) if plan.document is None else plan.document
        document = (document + jnp.where(plan.valid, 0, ABSENT)).astype(jnp.float32)
        document = jnp.swapaxes(document, 0, 1).reshape(document.shape[1], 1, -1)
    return Places(jnp.maximum(rows[0], LOWEST), rows[1], document)
