"""gated_delta_rule as Mosaic GPU kernels for Hopper: states walk through chunks in registers.

Forward T of all chunks, then a walk for y; backward the walk again for states, one back for their
gradients, then the rest for all chunks at once. README.md ("On a GPU") says what is moved and kept.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks, dispatch, gpu
from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.gpu import GpuConfig
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.tpu import pad_to, round_up
from pallas_kernels.gated_delta_rule import gpu_grads as grads
from pallas_kernels.gated_delta_rule.gpu_parts import CHUNK, GATES, LOWEST, How
from pallas_kernels.gated_delta_rule.gpu_solve import solve
from pallas_kernels.gated_delta_rule.gpu_walk import walk
from pallas_kernels.gated_delta_rule.gpu_walk_back import walk_back

_KEYS, _VALUES = 128, 64  # widths are filled up to multiples of these
_MOST_KEYS = 256  # more, and the state of a block of threads is more than its registers
# A log decay below is as good as none is left; sums of 64 such keep three digits behind the point.
_LEAST = -60.0
# What parts documents in sums of log decays: exp(-100) of a state is nothing.
_APART = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(GpuConfig):
    """Chunks are of 64 tokens, blocks of 64 columns: there is nothing to choose."""

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasGpuConfig":
        """The only one."""
        del sizes
        return cls(device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """Refuses devices, dtypes, short blocks of memories and wide keys."""
    q, k, v, _, _, _, _, _, block_memory = shapes
    if reason := gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes):
        return reason
    if not all(x.dtype == jnp.bfloat16 for x in (q, k, v)):
        return (
            "q, k or v is float32; the factors of its products are bfloat16 (tf32, the unit's "
            "kind for float32, keeps three digits)"
        )
    if k.shape[-1] > _MOST_KEYS:
        return f"keys have {k.shape[-1]} columns; states of up to {_MOST_KEYS} fit"
    if block_memory is not None and q.shape[1] // block_memory.shape[1] < CHUNK:
        return f"blocks of memories have fewer than {CHUNK} tokens"
    return None


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config, fresh):
    """See `gated_delta_rule`; s in float32, zeros if `fresh`. Returns y, s, last_id."""
    del fresh
    b, t, h, width = q.shape
    sizes = dict(b=b, t=t, h=h, k=width, v=v.shape[-1])
    config = PallasGpuConfig.of(config, sizes, dispatch.device_kind(config))
    plan, last_id = chunks.plan(t, CHUNK, segment_ids, last_id, block_memory)
    whole = round_up(t, CHUNK)
    keys, values = round_up(width, _KEYS), round_up(v.shape[-1], _VALUES)

    def fill(x, size):
        x = pad_to(pad_to(x, 1, whole), 3, size)
        return x if plan.valid is None else jnp.where(_valid(plan)[..., None], x, 0)

    states = s[:, None] if block_memory is None else s
    states = pad_to(pad_to(states, 3, keys), 4, values)
    gates = tuple(pad_to(x, 1, whole) for x in (g, beta))
    y, states = _rule(
        (fill(q, keys), fill(k, keys), fill(v, values), *gates), states, plan, How(config, scale)
    )
    states = states[..., :width, : v.shape[-1]]
    y = y[:, :t, :, : v.shape[-1]]
    return y, states[:, 0] if block_memory is None else states, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs, s, plan: Plan, how: How):
    """y `[b t h v]` and the last states `[b m h k v]`; t is whole chunks."""
    return _rule_forward(inputs, s, plan, how)[0]


def _rule_forward(inputs, s, plan, how):
    q, k, v, g, beta = inputs
    gates, bounds = _gates(g, beta, plan), _bounds(plan, s)
    solved = solve(k, gates, how)
    found = walk(q, k, v, solved, gates, s, bounds, how, keep=False)
    return (found.y, found.states), (inputs, s, plan, solved)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g, beta), s, plan, solved = residuals
    dy, ds = cotangents
    gates, bounds = _gates(g, beta, plan), _bounds(plan, s)
    dy = dy.astype(v.dtype)
    if plan.valid is not None:
        dy = jnp.where(_valid(plan)[..., None], dy, 0)
    found = walk(q, k, v, solved, gates, s, bounds, how, keep=True)
    back = walk_back(q, k, v, dy, solved, gates, ds, bounds, how)
    of = grads.gradients(
        *(q, k, dy, found.written, back.dmissing, found.starts, back.dends, gates, how)
    )
    dg, dbeta = _numbers(of.sums, back.by_values, gates)
    dg, dbeta = (_by_token(x, plan).astype(like.dtype) for x, like in ((dg, g), (dbeta, beta)))
    return (of.dq, of.dk, back.dv, dg, dbeta), back.ds, None


_rule.defvjp(_rule_forward, _rule_backward)


# --- What XLA makes: numbers per token ------------------------------------------------------------


def _valid(plan: Plan) -> jax.Array:
    """`[b t 1]`."""
    assert plan.valid is not None
    return jnp.swapaxes(plan.valid, 0, 1).reshape(plan.valid.shape[1], -1, 1)


def _bounds(plan: Plan, s: jax.Array) -> jax.Array | None:
    """int32 `[b m 2]`, the first chunk of each memory and the one after its last; None = one."""
    if plan.memory is None:
        return None
    memory, each = plan.memory[:, :, None], jnp.arange(s.shape[1])
    count = lambda x: jnp.sum(x, axis=0, dtype=jnp.int32)
    return jnp.stack([count(memory < each), count(memory <= each)], axis=-1)


def _gates(g: jax.Array, beta: jax.Array, plan: Plan) -> jax.Array:
    """The numbers of chunks, float32 `[b h n 6 c]`, in the order of gpu_parts."""
    g, beta = (_by_chunk(x.astype(jnp.float32), plan) for x in (g, beta))
    g = jnp.maximum(g, _LEAST)
    lower = jnp.tri(CHUNK, dtype=jnp.float32)
    sums = einsum("ij,...j->...i", lower, g)
    start, upto, after = jnp.exp(sums), sums, sums
    end = jnp.exp(einsum("ij,...j->...i", jnp.tri(CHUNK, k=-1, dtype=jnp.float32).T, g))
    through = start[..., -1:]
    if plan.document is not None:
        document = jnp.moveaxis(plan.document, 0, 1)[:, None]
        last = document[..., -1:]
        start, end = jnp.where(document == 0, start, 0), jnp.where(document == last, end, 0)
        through = jnp.where(last == 0, through, 0)
        upto, after = (x - _APART * document for x in (upto, after))
    if plan.valid is not None:
        valid = jnp.moveaxis(plan.valid, 0, 1)[:, None]
        start, upto = jnp.where(valid, start, 0), jnp.where(valid, upto, LOWEST)
    through = jnp.pad(through, [(0, 0)] * 3 + [(0, CHUNK - 1)])
    rows = (upto, after, beta, start, end, through)
    assert len(rows) == GATES
    return jnp.stack(rows, axis=3)


def _numbers(sums: jax.Array, by_values: jax.Array, gates: jax.Array) -> tuple[Any, Any]:
    """The gradients of g and beta, `[b h n c]`."""
    sums = jnp.sum(sums, axis=3)
    by_query, by_written, by_seen, by_end, by_state = (sums[:, :, :, i] for i in range(grads.SUMS))
    beta, through = gates[..., 2, :], gates[..., 5, :1]
    dbeta = jnp.sum(by_values, axis=3) + by_written
    # A log decay acts on all that passes its token: sums over what comes after.
    dsum = by_query + beta * by_written - by_seen
    at_end = jnp.sum(by_end + through * by_state, axis=-1, keepdims=True)
    dg = einsum("ij,...i->...j", jnp.tri(CHUNK, dtype=jnp.float32), dsum) + at_end
    return dg, dbeta


def _by_chunk(x: jax.Array, plan: Plan) -> jax.Array:
    """`[b t h]` as `[b h n c]`, 0 where there is no token."""
    if plan.valid is not None:
        x = jnp.where(_valid(plan), x, 0)
    b, t, h = x.shape
    return jnp.moveaxis(x.reshape(b, t // CHUNK, CHUNK, h), 3, 1)


def _by_token(x: jax.Array, plan: Plan) -> jax.Array:
    """`[b h n c]` as `[b t h]`, 0 where there is no token."""
    b, h, n, c = x.shape
    x = jnp.moveaxis(x, 1, 3).reshape(b, n * c, h)
    return x if plan.valid is None else jnp.where(_valid(plan), x, 0)
