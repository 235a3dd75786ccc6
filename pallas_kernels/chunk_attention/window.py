"""The sliding-window form for XLA: one block of queries after the other.

A block of queries meets the keys from `window - 1` before its first query to its last one, so time
and memory are tokens times window. The backward pass keeps nothing of it: it computes the weights
of each block again.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.places import PADDING_KEY, PADDING_QUERY, Places, in_order
from pallas_kernels.chunk_attention.scores import products


def run(q, k, v, ring_k, ring_v, count, place: Places, *, scale: float, block: int):
    """y `[b t h v]`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in."""
    b, t, h, _ = q.shape
    g = k.shape[2]
    block = min(block, t)
    keys, documents = in_order(ring_k, k, count, place)
    values, _ = in_order(ring_v, v, count, place)
    padding = -t % block
    more = lambda x, fill=0: jnp.pad(
        x, [(0, padding * (i == 1)) for i in range(x.ndim)], constant_values=fill
    )
    y = banded(
        more(q).reshape(b, t + padding, g, h // g, -1),
        more(keys),
        more(values),
        more(place.queries, PADDING_QUERY),
        more(documents, PADDING_KEY),
        (block, scale, ring_k.dtype),
    )
    return y[:, :t].reshape(b, t, h, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def banded(q, k, v, queries, keys, how):
    """y `[b t g r v]` from q `[b t g r k]`, k `[b l+t g k]`, v `[b l+t g v]`.

    Args:
        queries, keys: the documents of both, int32 `[b t]` and `[b l+t]`.
        how: queries per block (a divisor of t), the scale, the dtype of sums.
    """
    return _forward(q, k, v, queries, keys, how)[0]


def _forward(q, k, v, queries, keys, how):
    block, scale, dtype = how
    reach = k.shape[1] - q.shape[1]  # window - 1
    product = products(q.dtype)

    def one_block(y, i):
        q_c, queries_c = (_cut(x, i * block, block) for x in (q, queries))
        k_c, v_c, keys_c = (_cut(x, i * block, block + reach) for x in (k, v, keys))
        q_c, k_c, v_c = (x.astype(dtype) for x in (q_c, k_c, v_c))
        powers, total = _softmax(scale * product("bcgrk,bsgk->bgrcs", q_c, k_c), queries_c, keys_c)
        y_c = product("bgrcs,bsgv->bgrcv", powers, v_c) / total
        y_c = jnp.moveaxis(y_c, 3, 1).astype(y.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, y_c, i * block, axis=1), None

    y = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    y, _ = jax.lax.scan(one_block, y, jnp.arange(q.shape[1] // block))
    return y, (q, k, v, queries, keys)


def _backward(how, residuals, dy):
    block, scale, dtype = how
    q, k, v, queries, keys = residuals
    reach = k.shape[1] - q.shape[1]
    product = products(q.dtype)

    def one_block(carry, i):
        dq, dk, dv = carry
        q_c, queries_c, dy_c = (_cut(x, i * block, block) for x in (q, queries, dy))
        k_c, v_c, keys_c = (_cut(x, i * block, block + reach) for x in (k, v, keys))
        q_c, k_c, v_c, dy_c = (x.astype(dtype) for x in (q_c, k_c, v_c, dy_c))
        powers, total = _softmax(scale * product("bcgrk,bsgk->bgrcs", q_c, k_c), queries_c, keys_c)
        weights = powers / total
        dv_c = product("bgrcs,bcgrv->bsgv", weights, dy_c)
        dweights = product("bcgrv,bsgv->bgrcs", dy_c, v_c)
        mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
        dscores = scale * weights * (dweights - mean)
        dq_c = product("bgrcs,bsgk->bcgrk", dscores, k_c)
        dk_c = product("bgrcs,bcgrk->bsgk", dscores, q_c)
        # A key is met by the queries of several blocks.
        add = lambda total, part: jax.lax.dynamic_update_slice_in_dim(
            total, _cut(total, i * block, block + reach) + part, i * block, axis=1
        )
        dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_c.astype(dq.dtype), i * block, axis=1)
        return (dq, add(dk, dk_c), add(dv, dv_c)), None

    zeros = (jnp.zeros_like(q), jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype))
    (dq, dk, dv), _ = jax.lax.scan(one_block, zeros, jnp.arange(q.shape[1] // block))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


banded.defvjp(_forward, _backward)


def _softmax(scores, queries, keys):
    """Numerators `[b g r c s]` and denominators `[b g r c 1]`, of c queries and s = c + w - 1 keys.

    A query of padding sees nothing: its numerators are 0 and its denominator 1.
    """
    c, s = scores.shape[-2:]
    ahead = jnp.arange(s) - jnp.arange(c)[:, None]  # of the oldest key that the query sees
    seen = (ahead >= 0) & (ahead <= s - c) & (queries[:, :, None] == keys[:, None, :])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    powers = jnp.exp(scores - jnp.where(largest > -jnp.inf, largest, 0))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers, jnp.where(total > 0, total, 1)


def _cut(x, start, size: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
