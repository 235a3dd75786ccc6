"""gla as Mosaic GPU kernels for Hopper: pairs, then states walk.

Forward pairs of tokens, and q and k with decays in them, of all chunks, then simple_gla's walk;
backward that walk again for states, one back for their gradients and that of v, then those of q, k
and g for all chunks at once. README.md ("On a GPU") says what is moved and kept.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, gpu_chunks
from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.gpu import GpuConfig
from pallas_kernels.core.gpu_chunks import CHUNK, How
from pallas_kernels.gla import gpu_parts
from pallas_kernels.gla.gpu_grads import gradients
from pallas_kernels.gla.gpu_pairs import make
from pallas_kernels.simple_gla.gpu_walk import Ready, Way, walk
from pallas_kernels.simple_gla.pallas_gpu import KEYS, over_chunks


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
    """See `gla`; s in float32. Returns y, s, last_id."""
    del fresh
    config = PallasGpuConfig.of(config, {}, dispatch.device_kind(config))
    rule = functools.partial(_rule, How(config, float(scale)))
    return over_chunks(rule, (q, k, v, g), s, last_id, segment_ids, block_memory)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(how: How, inputs, s, plan: Plan):
    """y `[b t h v]` and the last states `[b m h k v]`; t is whole chunks."""
    return _rule_forward(how, inputs, s, plan)[0]


def _rule_forward(how, inputs, s, plan):
    q, k, v, g = inputs
    decay = _parts(g)
    made = make(q, k, decay, _marks(plan, g), how)
    ready, bounds = Ready(made.pairs, _through(decay, plan)), gpu_chunks.bounds_of(plan, s)
    found = walk(made.q, made.k, v, ready, s, bounds, how, Way("gla_forward"))
    return (found.read, found.states), (inputs, made, s, plan)


def _rule_backward(how, residuals, cotangents):
    (q, k, v, g), made, s, plan = residuals
    dy, ds = cotangents
    decay = _parts(g)
    through, bounds = _through(decay, plan), gpu_chunks.bounds_of(plan, s)
    dy = gpu_chunks.only_tokens(dy.astype(v.dtype), plan)
    over = lambda values, s, way: walk(
        made.q, made.k, values, Ready(made.pairs, through), s, bounds, how, way
    )
    starts = over(v, s, Way("gla_states", reads=False, keep=True)).kept
    dv, ds, dends = over(dy, ds, Way("gla_states_back", back=True, keep=True))
    of = gradients(q, k, decay, v, dy, starts, dends, through, _marks(plan, g), how)
    dg = gpu_chunks.only_tokens(of.dg, plan).astype(g.dtype)
    return (of.dq, of.dk, dv, dg), ds, None


_rule.defvjp(_rule_forward, _rule_backward)


# --- What XLA makes -------------------------------------------------------------------------------


def _parts(g: jax.Array) -> tuple[jax.Array, ...]:
    """Log decays as one or two parts in bfloat16, which keep 8 or 16 bits."""
    g = jnp.maximum(g, gpu_chunks.LEAST)
    return (g,) if g.dtype == jnp.bfloat16 else gpu_chunks.split(g.astype(jnp.float32))


def _through(decay: tuple[jax.Array, ...], plan: Plan) -> jax.Array:
    """The decays all through chunks, float32 `[b h n k]`; 0 where a document begins."""
    b, t, h, width = decay[0].shape
    g = sum(x.astype(jnp.float32) for x in decay)
    sums = jnp.sum(jnp.reshape(g, (b, t // CHUNK, CHUNK, h, width)), axis=2)
    through = jnp.exp(jnp.swapaxes(sums, 1, 2))
    if plan.document is None:
        return through
    goes_on = jnp.swapaxes(plan.document[..., -1] == 0, 0, 1)
    return jnp.where(goes_on[:, None, :, None], through, 0)


def _marks(plan: Plan, g: jax.Array) -> jax.Array:
    """The marks of chunks, float32 `[b n 4 c]`, in the order of gpu_parts."""
    if plan.document is None:
        document = jnp.zeros((g.shape[0], g.shape[1] // CHUNK, CHUNK), jnp.int32)
    else:
        document = jnp.swapaxes(plan.document, 0, 1)
    marks = (document, document == 0, document == document[..., -1:], jnp.zeros_like(document))
    assert len(marks) == gpu_parts.MARKS
    return jnp.stack([x.astype(jnp.float32) for x in marks], axis=2)
