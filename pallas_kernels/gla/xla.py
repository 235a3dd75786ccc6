"""gla for any device that XLA compiles for: matrix products inside chunks.

The forward pass keeps the state at the start of each chunk; the backward pass takes one chunk after
the other, the last one first, and differentiates its computation anew. README.md has the maths, and
what was tried and measured.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.core import chunks, dispatch
from pallas_kernels.core.chunks import keep
from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.recompute import Masks, over_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        chunk: tokens per chunk, a power of two; at most a block of memories. One state per chunk is
            kept for the backward pass.
    """

    chunk: int = 64

    def __post_init__(self):
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk is {self.chunk}; gla halves it: it must be a power of two")


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `gla`; s in the dtype to compute in. Returns y, s, last_id."""
    del fresh  # zeros are as good
    t = q.shape[1]
    sizes = dict(k=q.shape[3], v=v.shape[3])
    config = XlaConfig.of(config, sizes, dispatch.device_kind(config))
    chunk = min(config.chunk, 1 << (t - 1).bit_length())  # the power of two that holds t
    chunk = chunks.fitting(chunk, t, block_memory)
    plan, last_id = chunks.plan(t, chunk, segment_ids, last_id, block_memory)
    y, s = over_chunks(_chunk, scale, (q, k, v, g), s, plan, chunk)
    return y, s, last_id


def _chunk(scale: float, s, inputs: tuple, masks: Masks):
    """One chunk: from the state before it, s `[b h k v]`, the state after it and y `[b h c v]`."""
    q, k, v, g = (x.astype(s.dtype) for x in inputs)
    scores, start, end = _scores(q, k, g)
    wide = lambda mask: None if mask is None else mask[..., None]
    from_start = keep(jnp.exp(start), wide(masks.start))  # [b h c k]
    to_end = keep(jnp.exp(end), wide(masks.end))
    through = keep(jnp.exp(start[..., -1, :]), wide(masks.through))  # [b h k]

    y = einsum("bhij,bhjv->bhiv", keep(scores, masks.pairs), v)
    y = y + einsum("bhik,bhkv->bhiv", q * from_start, s)
    after = through[..., None] * s + einsum("bhjk,bhjv->bhkv", k * to_end, v)
    return after, (scale * y).astype(inputs[2].dtype)


def _scores(q, k, g):
    """Products of queries with the keys before them, the decays in between included.

    Returns:
        `[b h c c]`, right for j <= i and finite elsewhere; and `[b h c k]`, the sums of log decays
        from the start of the chunk up to each token, and from each token up to the end.
    """
    b, h, c, _ = g.shape
    # A token by itself: nothing decays between it and its own key.
    scores = einsum("bhck,bhck->bhc", q, k)[..., None, None]  # [b h n i j], n blocks of size tokens
    start, end = g[..., None, :], jnp.zeros_like(g)[..., None, :]  # [b h n size k]
    size = 1
    while size < c:
        # Two blocks become one. A pair across them decays from its key to the end of the first,
        # then from the start of the second to its query: two factors of at most 1.
        (_, q_2), (k_1, _), (start_1, start_2), (end_1, end_2) = (
            _halves(x, c // size) for x in (q, k, start, end)
        )
        across = einsum("bhnik,bhnjk->bhnij", q_2 * jnp.exp(start_2), k_1 * jnp.exp(end_1))
        first, second = _halves(scores, c // size)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        scores = jnp.concatenate([above, jnp.concatenate([across, second], axis=-1)], axis=-2)
        whole_1, whole_2 = start_1[..., -1:, :], start_2[..., -1:, :]
        start = jnp.concatenate([start_1, whole_1 + start_2], axis=-2)
        end = jnp.concatenate([end_1 + whole_2, end_2], axis=-2)
        size *= 2
    return tuple(x.reshape(b, h, c, -1) for x in (scores, start, end))


def _halves(x, n: int):
    """`[b h ...]` that holds n blocks of tokens: the first of each two, and the second."""
    b, h, *rest = x.shape
    width = rest[-1]
    x = x.reshape(b, h, n // 2, 2, -1, width)
    return x[:, :, :, 0], x[:, :, :, 1]
