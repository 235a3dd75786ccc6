"""chunk_attention by its definition: masked weights over everything, a ring that takes tokens.

Slow and obvious.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.scores import weigh
from pallas_kernels.core.segments import boundaries

counted_as = "xla"  # tokens times window or chunk, not the t^2 pairs of this


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, bias, ring_k, ring_v, count, last_id, segment_ids, *, form, config):
    """See `chunk_attention`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in."""
    del config
    dtype, out_dtype, size = ring_k.dtype, q.dtype, form.slots
    b, t, h, _ = q.shape
    if segment_ids is None:
        reset, valid = jnp.zeros((b, t), bool), jnp.ones((b, t), bool)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    q, k, v = (jnp.where(valid[:, :, None, None], x, 0).astype(dtype) for x in (q, k, v))

    before_k, before_v = ring_k, ring_v
    if not form.causal:  # no stream: the ring is there for the count of positions alone
        ring_k, ring_v = (jnp.zeros((b, k.shape[2], size, x.shape[-1]), dtype) for x in (k, v))

    # Every key with its document (0 = the one of the state) and its position in it.
    slots = jnp.arange(size)
    reached = count[:, None] - 1
    ring_position = reached - (reached - slots) % size
    ring_document = jnp.where(ring_position >= 0, 0, -1)

    def token(carry, inputs):
        ring_k, ring_v, count, document = carry
        k_t, v_t, reset_t, valid_t = inputs
        document = document + reset_t
        fresh = lambda ring: jnp.where(reset_t[:, None, None, None], 0, ring)
        ring_k, ring_v, place = fresh(ring_k), fresh(ring_v), jnp.where(reset_t, 0, count)
        here = (slots == place[:, None] % size) & valid_t[:, None]  # [b l]
        here = here[:, None, :, None]
        ring_k = jnp.where(here, k_t[:, :, None], ring_k)
        ring_v = jnp.where(here, v_t[:, :, None], ring_v)
        return (ring_k, ring_v, place + valid_t, document), (place, document)

    by_time = lambda x: jnp.swapaxes(x, 0, 1)
    before = (ring_k, ring_v, count, jnp.zeros_like(count))
    tokens = tuple(map(by_time, (k, v, reset, valid)))
    (after_k, after_v, after, _), (position, document) = jax.lax.scan(token, before, tokens)
    position, document = by_time(position), by_time(document)

    both = lambda ring, new: jnp.concatenate([jnp.swapaxes(ring, 1, 2), new], axis=1)
    keys = jnp.repeat(both(ring_k, k), h // k.shape[2], axis=2)
    values = jnp.repeat(both(ring_v, v), h // k.shape[2], axis=2)
    key_document = jnp.concatenate([ring_document, jnp.where(valid, document, -1)], axis=1)
    key_position = jnp.concatenate([ring_position, position], axis=1)
    lag = position[:, :, None] - key_position[:, None, :]
    seen = document[:, :, None] == key_document[:, None, :]
    if form.chunk is None:
        seen &= (lag >= 0) & (lag < size)
    else:
        seen &= position[:, :, None] // size == key_position[:, None, :] // size
        seen &= (lag >= 0) | (not form.causal)
    if bias is not None:
        bias = bias.astype(dtype)[:, jnp.clip(size - 1 - lag, 0, 2 * size - 2)]  # [h b t s]
        bias = jnp.moveaxis(bias, 0, 1)
    products = jnp.einsum("bthk,bshk->bhts", q, keys)
    weights = weigh(form.score, products, bias, seen[:, None], form.scale)
    y = jnp.where(valid[:, :, None, None], jnp.einsum("bhts,bshv->bthv", weights, values), 0)
    if not form.causal:
        return y.astype(out_dtype), before_k, before_v, count, last_id
    return y.astype(out_dtype), after_k, after_v, after, last_id
