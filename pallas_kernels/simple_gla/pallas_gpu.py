"""simple_gla as Mosaic GPU kernels for Hopper: states walk through chunks in registers.

Forward one walk, for y; backward the walk again for states, one back for their gradients and that
of v, then those of q, k and g for all chunks at once. README.md ("On a GPU") says what is moved and
kept.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks, dispatch, gpu_chunks
from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.gpu import GpuConfig
from pallas_kernels.core.gpu_chunks import CHUNK, THROUGH, How
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.tpu import pad_to, round_up
from pallas_kernels.simple_gla import gpu_grads as grads
from pallas_kernels.simple_gla.gpu_walk import Way, walk

_VALUES = 64  # widths are filled up to multiples of it
KEYS = (64, 128, 256)  # more, and the state of a block of threads is more than its registers


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
    return gpu_chunks.refuses(shapes, device_kind, KEYS[-1])


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `simple_gla`; s in float32. Returns y, s, last_id."""
    del fresh
    config = PallasGpuConfig.of(config, {}, dispatch.device_kind(config))
    rule = functools.partial(_rule, How(config, float(scale)))
    return over_chunks(rule, (q, k, v, g), s, last_id, segment_ids, block_memory)


def over_chunks(rule, inputs, s, last_id, segment_ids, block_memory):
    """Runs `rule(inputs, states, plan) -> (y, states)` on whole chunks of filled up arrays.

    Args:
        rule: takes inputs 0 where there is no token and states `[b m h k v]`.
        inputs: q, k, v, and g `[b t h]` or `[b t h k]`.
        s: `[b h k v]`, with memories `[b m h k v]`.
        last_id: int32 `[b]`, or `[b m]`.
        segment_ids: int32 `[b t]` or None.
        block_memory: int32 `[b blocks]` or None.

    Returns:
        y, s, last_id.
    """
    _, k, v, _ = inputs
    t, width, columns = v.shape[1], k.shape[-1], v.shape[-1]
    plan, last_id = chunks.plan(t, CHUNK, segment_ids, last_id, block_memory)
    keys, values = next(n for n in KEYS if n >= width), round_up(columns, _VALUES)

    def fill(x, size):
        x = pad_to(x, 1, round_up(t, CHUNK))
        return gpu_chunks.only_tokens(x if x.ndim < 4 else pad_to(x, 3, size), plan)

    states = s[:, None] if block_memory is None else s
    states = pad_to(pad_to(states, 3, keys), 4, values)
    sizes = (keys, keys, values, keys)
    y, states = rule(tuple(map(fill, inputs, sizes)), states, plan)
    states = states[..., :width, :columns]
    return y[:, :t, :, :columns], states[:, 0] if block_memory is None else states, last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(how: How, inputs, s, plan: Plan):
    """y `[b t h v]` and the last states `[b m h k v]`; t is whole chunks."""
    return _rule_forward(how, inputs, s, plan)[0]


def _rule_forward(how, inputs, s, plan):
    q, k, v, g = inputs
    way = Way("simple_gla_forward")
    found = walk(q, k, v, _gates(g, plan), s, gpu_chunks.bounds_of(plan, s), how, way)
    return (found.read, found.states), (inputs, s, plan)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g), s, plan = residuals
    dy, ds = cotangents
    gates, bounds = _gates(g, plan), gpu_chunks.bounds_of(plan, s)
    dy = gpu_chunks.only_tokens(dy.astype(v.dtype), plan)
    way = Way("simple_gla_states", reads=False, keep=True)
    starts = walk(q, k, v, gates, s, bounds, how, way).kept
    way = Way("simple_gla_states_back", back=True, keep=True)
    dv, ds, dends = walk(q, k, dy, gates, ds, bounds, how, way)
    dq, dk, sums = grads.gradients(q, k, v, dy, starts, dends, gates, how)
    dg = gpu_chunks.by_token(_of_decays(sums, gates), plan).astype(g.dtype)
    return (dq, dk, dv, dg), ds, None


_rule.defvjp(_rule_forward, _rule_backward)


def _gates(g: jax.Array, plan: Plan) -> jax.Array:
    """The numbers of chunks, float32 `[b h n 5 c]`."""
    return jnp.stack(gpu_chunks.numbers_of(gpu_chunks.by_chunk(g, plan), plan), axis=3)


def _of_decays(sums: jax.Array, gates: jax.Array) -> jax.Array:
    """The gradient of g, `[b h n c]`: a log decay acts on all that passes its token."""
    by_pairs, by_start, by_end, by_state = (
        jnp.sum(sums[..., i, :], axis=3) for i in range(grads.SUMS)
    )
    after = einsum("ij,...i->...j", jnp.tri(CHUNK), by_pairs + by_start)
    before = einsum("ij,...j->...i", jnp.tri(CHUNK, k=-1), by_end)
    return after + before + gates[..., THROUGH, :1] * jnp.sum(by_state, axis=-1, keepdims=True)
