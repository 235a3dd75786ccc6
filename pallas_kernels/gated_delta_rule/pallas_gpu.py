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

from pallas_kernels.core import chunks, dispatch, gpu_chunks
from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.gpu import GpuConfig
from pallas_kernels.core.gpu_chunks import CHUNK, THROUGH, How
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.tpu import pad_to, round_up
from pallas_kernels.gated_delta_rule import gpu_grads as grads
from pallas_kernels.gated_delta_rule.gpu_parts import BETA
from pallas_kernels.gated_delta_rule.gpu_solve import solve
from pallas_kernels.gated_delta_rule.gpu_walk import walk
from pallas_kernels.gated_delta_rule.gpu_walk_back import walk_back

_KEYS, _VALUES = 128, 64  # widths are filled up to multiples of these
_MOST_KEYS = 256  # more, and the state of a block of threads is more than its registers


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
    return gpu_chunks.refuses(shapes, device_kind, _MOST_KEYS)


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
        return gpu_chunks.only_tokens(pad_to(pad_to(x, 1, whole), 3, size), plan)

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
    gates, bounds = _gates(g, beta, plan), gpu_chunks.bounds_of(plan, s)
    solved = solve(k, gates, how)
    found = walk(q, k, v, solved, gates, s, bounds, how, keep=False)
    return (found.y, found.states), (inputs, s, plan, solved)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g, beta), s, plan, solved = residuals
    dy, ds = cotangents
    gates, bounds = _gates(g, beta, plan), gpu_chunks.bounds_of(plan, s)
    dy = gpu_chunks.only_tokens(dy.astype(v.dtype), plan)
    found = walk(q, k, v, solved, gates, s, bounds, how, keep=True)
    back = walk_back(q, k, v, dy, solved, gates, ds, bounds, how)
    of = grads.gradients(
        *(q, k, dy, found.written, back.dmissing, found.starts, back.dends, gates, how)
    )
    dg, dbeta = _numbers(of.sums, back.by_values, gates)
    dg, dbeta = (
        gpu_chunks.by_token(x, plan).astype(like.dtype) for x, like in ((dg, g), (dbeta, beta))
    )
    return (of.dq, of.dk, back.dv, dg, dbeta), back.ds, None


_rule.defvjp(_rule_forward, _rule_backward)


# --- What XLA makes: numbers per token ------------------------------------------------------------


def _gates(g: jax.Array, beta: jax.Array, plan: Plan) -> jax.Array:
    """The numbers of chunks, float32 `[b h n 6 c]`."""
    g, beta = (gpu_chunks.by_chunk(x, plan) for x in (g, beta))
    return jnp.stack([*gpu_chunks.numbers_of(g, plan), beta], axis=3)


def _numbers(sums: jax.Array, by_values: jax.Array, gates: jax.Array) -> tuple[Any, Any]:
    """The gradients of g and beta, `[b h n c]`."""
    sums = jnp.sum(sums, axis=3)
    by_query, by_written, by_seen, by_end, by_state = (sums[:, :, :, i] for i in range(grads.SUMS))
    beta, through = gates[..., BETA, :], gates[..., THROUGH, :1]
    dbeta = jnp.sum(by_values, axis=3) + by_written
    # A log decay acts on all that passes its token: sums over what comes after.
    dsum = by_query + beta * by_written - by_seen
    at_end = jnp.sum(by_end + through * by_state, axis=-1, keepdims=True)
    dg = einsum("ij,...i->...j", jnp.tri(CHUNK, dtype=jnp.float32), dsum) + at_end
    return dg, dbeta
