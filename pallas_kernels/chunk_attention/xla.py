"""chunk_attention for any device that XLA compiles for: one block of queries after the other.

Time and memory are tokens times window or chunk. The backward pass keeps nothing of a block: it
computes the weights again. README.md has the maths, and what was tried and measured.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from pallas_kernels.chunk_attention import chunked, one_token, window
from pallas_kernels.chunk_attention.places import after, places
from pallas_kernels.core import dispatch
from pallas_kernels.core.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        block: queries per block.
    """

    block: int = 64

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> "XlaConfig":
        """On a CPU what was measured; else blocks that fill a matrix unit."""
        del sizes
        return cls(block=64 if device_kind == "cpu" else 128, device_kind=device_kind)


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, bias, ring_k, ring_v, count, last_id, segment_ids, *, form, config):
    """See `chunk_attention`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in.

    form is a `Form`; what looks both ways has a ring too, which is empty and comes back so.
    """
    b, t, _, _ = q.shape
    if t == 1 and segment_ids is None and form.causal:
        y, ring_k, ring_v = one_token.run(
            q,
            k,
            v,
            bias,
            ring_k,
            ring_v,
            count,
            chunk=form.chunk,
            score=form.score,
            scale=form.scale,
        )
        return y, ring_k, ring_v, count + 1, last_id
    block = XlaConfig.of(config, {}, dispatch.device_kind(config)).block
    place = places(segment_ids, last_id, count, b, t)
    if place.valid is not None:  # a nan at padding times a weight of 0 would stay
        q, k, v = (jnp.where(place.valid[:, :, None, None], x, 0) for x in (q, k, v))
    if form.chunk is None:
        y = window.run(q, k, v, ring_k, ring_v, count, place, scale=form.scale, block=block)
    else:
        y = chunked.run(q, k, v, bias, ring_k, ring_v, count, place, form=form, block=block)
    if place.valid is not None:
        y = jnp.where(place.valid[:, :, None, None], y, 0)
    if not form.causal:
        return y, ring_k, ring_v, count, last_id
    return y, after(ring_k, k, place), after(ring_v, v, place), place.total, place.last_id
