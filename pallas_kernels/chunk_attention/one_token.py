"""One token of a stream: write its key and value, then read the ring as it lies."""

import jax.numpy as jnp

from pallas_kernels.chunk_attention.scores import weigh
from pallas_kernels.core import numerics


def run(q, k, v, bias, ring_k, ring_v, count, *, chunk: int | None, score: str, scale: float):
    """y `[b 1 h v]` and the ring after the token; the order of keys is of no matter here.

    Args:
        bias: `[h 2 chunk - 1]` by distance, or None.
        count: int32 `[b]`, the token's position in its document.
        chunk: tokens of a chunk; None = a window, which sees every slot that was reached.
    """
    b, _, h, _ = q.shape
    g, slots = ring_k.shape[1:3]
    slot = count % slots
    ring_k, ring_v = _write(ring_k, k[:, 0], slot), _write(ring_v, v[:, 0], slot)
    # One product per sequence and key-value head, in the order in which the ring lies: with an
    # einsum over all axes, XLA may turn it round first.
    flat = lambda x: x.reshape(b * g, *x.shape[2:])
    scores = numerics.einsum(
        "xrk,xlk->xrl", q.astype(ring_k.dtype).reshape(b * g, h // g, -1), flat(ring_k)
    )
    reached = jnp.arange(slots) <= (count if chunk is None else slot)[:, None]  # [b l]
    if bias is not None:
        distance = jnp.arange(slots) - slot[:, None] + slots - 1
        bias = jnp.moveaxis(bias.astype(ring_k.dtype)[:, distance], 0, 1)  # [b h l]
        bias = bias.reshape(b * g, h // g, slots)
    seen = jnp.repeat(reached, g, axis=0)[:, None]
    y = numerics.einsum("xrl,xlv->xrv", weigh(score, scores, bias, seen, scale), flat(ring_v))
    return y.reshape(b, 1, h, -1).astype(q.dtype), ring_k, ring_v


def _write(ring, x, slot):
    """Puts `[b g k]` into a slot `[b]` of each row."""
    b, g, slots, _ = ring.shape
    x, slot = x[:, :, None].astype(ring.dtype), slot[:, None]
    if b * g == 1:
        # A single row would be no scatter but an update, which XLA does once for each reader of the
        # ring, on copies of it: beside a second row, which is dropped, it stays a scatter.
        x = jnp.concatenate([x, x], axis=2)
        slot = jnp.concatenate([slot, jnp.full_like(slot, slots)], axis=1)
    at = (jnp.arange(b)[:, None, None], jnp.arange(g)[:, None], slot[:, None])
    return ring.at[at].set(x, mode="drop")
