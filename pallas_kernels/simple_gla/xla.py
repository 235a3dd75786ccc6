"""simple_gla for any device that XLA compiles for: matrix products inside chunks.

The forward pass keeps the state at the start of each chunk; the backward pass takes one chunk after
the other, the last one first, and differentiates its computation anew. README.md has the maths, and
what was tried and measured.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.core import chunks, decays, dispatch
from pallas_kernels.core.chunks import keep
from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.recompute import Masks, over_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        chunk: tokens per chunk; it divides the blocks of memories. One state per chunk is kept for
            the backward pass, and chunk^2 numbers per head for the chunk in hand.
    """

    chunk: int = 64

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1")


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `simple_gla`; s in the dtype to compute in. Returns y, s, last_id."""
    del fresh  # zeros are as good
    t = q.shape[1]
    sizes = dict(k=q.shape[3], v=v.shape[3])
    config = XlaConfig.of(config, sizes, dispatch.device_kind(config))
    chunk = chunks.fitting(min(config.chunk, t), t, block_memory)
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory)
    y, s = over_chunks(_chunk, scale, (q, k, v, g), s, plan, chunk)
    return y, s, last_id


def _chunk(scale: float, s, inputs: tuple, masks: Masks):
    """One chunk: from the state before it, s `[b h k v]`, the state after it and y `[b h c v]`."""
    q, k, v, g = (x.astype(s.dtype) for x in inputs)
    groups = q.shape[1]  # heads of q and k, each shared by r heads
    by_group = lambda x: x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [b h ...]: [b g r ...]
    sums = decays.between(g)  # [b h i j]
    start = jnp.cumsum(g, axis=-1)
    pairs = keep(jnp.exp(sums), masks.pairs)
    from_start = keep(jnp.exp(start), masks.start)  # [b h c]
    to_end = keep(jnp.exp(sums[..., -1, :]), masks.end)
    through = keep(jnp.exp(start[..., -1]), masks.through)  # [b h]

    scores = einsum("bgik,bgjk->bgij", q, k)[:, :, None] * by_group(pairs)
    y = einsum("bgrij,bgrjv->bgriv", scores, by_group(v))
    y = y + by_group(from_start)[..., None] * einsum("bgik,bgrkv->bgriv", q, by_group(s))
    brought = einsum("bgjk,bgrjv->bgrkv", k, by_group(to_end[..., None] * v))
    after = through[..., None, None] * s + brought.reshape(s.shape)
    return after, (scale * y).reshape(v.shape).astype(inputs[2].dtype)
