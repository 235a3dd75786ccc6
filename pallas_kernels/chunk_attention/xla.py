"""chunk_attention for any device that XLA compiles for: one block of queries after the other.

A block of queries meets the keys from `window - 1` before its first query to its last one, so time
and memory are tokens times window. The backward pass keeps nothing of it: it computes the weights
of each block again. README.md has the maths, and what was tried and measured.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, numerics
from pallas_kernels.core.config import Config
from pallas_kernels.core.segments import boundaries

# Documents of a call are counted from 0; these see nobody and are seen by nobody.
_PADDING_QUERY, _PADDING_KEY = -1, -2


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


def run(q, k, v, ring_k, ring_v, count, last_id, segment_ids, *, window, scale, config):
    """See `chunk_attention`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in."""
    b, t, h, _ = q.shape
    g = k.shape[2]
    if t == 1 and segment_ids is None:
        y, ring_k, ring_v = _one_token(q, k, v, ring_k, ring_v, count, scale)
        return y, ring_k, ring_v, count + 1, last_id
    config = XlaConfig.of(config, {}, dispatch.device_kind(config))
    block = min(config.block, t)
    place = _places(segment_ids, last_id, count, b, t)
    if place.valid is not None:  # a nan at padding times a weight of 0 would stay
        q, k, v = (jnp.where(place.valid[:, :, None, None], x, 0) for x in (q, k, v))
    keys, documents = _in_order(ring_k, k, count, place)
    values, _ = _in_order(ring_v, v, count, place)
    padding = -t % block
    more = lambda x, fill=0: jnp.pad(
        x, [(0, padding * (i == 1)) for i in range(x.ndim)], constant_values=fill
    )
    y = _banded(
        more(q).reshape(b, t + padding, g, h // g, -1),
        more(keys),
        more(values),
        more(place.queries, _PADDING_QUERY),
        more(documents, _PADDING_KEY),
        (block, scale, ring_k.dtype),
    )
    y = y[:, :t].reshape(b, t, h, -1)
    if place.valid is not None:
        y = jnp.where(place.valid[:, :, None, None], y, 0)
    after = (_after(ring_k, k, place), _after(ring_v, v, place))
    return y, *after, place.total, place.last_id


# --- One token: write it, then read the ring as it lies ------------------------------------------


def _one_token(q, k, v, ring_k, ring_v, count, scale: float):
    """y `[b 1 h v]` and the ring after the token; the order of keys is of no matter here."""
    b, _, h, _ = q.shape
    g, slots = ring_k.shape[1:3]
    slot = count % slots
    ring_k, ring_v = _write(ring_k, k[:, 0], slot), _write(ring_v, v[:, 0], slot)
    # One product per sequence and key-value head, in the order in which the ring lies: with an
    # einsum over all axes, XLA may turn it round first.
    flat = lambda x: x.reshape(b * g, *x.shape[2:])
    scores = numerics.einsum(
        "xrk,xlk->xrl",
        scale * q.astype(ring_k.dtype).reshape(b * g, h // g, -1),
        flat(ring_k),
    )
    reached = jnp.repeat(jnp.arange(slots) <= count[:, None], g, axis=0)[:, None]
    weights = jax.nn.softmax(jnp.where(reached, scores, -jnp.inf), axis=-1)
    y = numerics.einsum("xrl,xlv->xrv", weights, flat(ring_v))
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


# --- Where tokens stand ------------------------------------------------------------------------


class _Places(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        valid: `[b t]`, not padding; None = nothing is.
        queries: int32 `[b t]`, the document of each token, counted in this call; 0 = the state's.
        leading: int32 `[b]`, padding before the first token.
        first: int32 `[b]`, where the last document begins in this call.
        end: int32 `[b]`, the last token; -1 = there is none.
        reset: `[b]`, whether a document began that leaves the state's behind.
        total: int32 `[b]`, tokens of the last document, those before this call included.
        last_id: int32 `[b]`, its id.
    """

    valid: jax.Array | None
    queries: jax.Array
    leading: jax.Array
    first: jax.Array
    end: jax.Array
    reset: jax.Array
    total: jax.Array
    last_id: jax.Array


def _places(segment_ids, last_id, count, b: int, t: int) -> _Places:
    if segment_ids is None:
        none = jnp.zeros((b,), jnp.int32)
        queries = jnp.zeros((b, t), jnp.int32)
        return _Places(None, queries, none, none, none + t - 1, none > 0, count + t, last_id)
    reset, valid, last_id = boundaries(segment_ids, last_id)
    places = jnp.arange(t, dtype=jnp.int32)
    leading = jnp.min(jnp.where(valid, places, t), axis=1)
    end = jnp.max(jnp.where(valid, places, -1), axis=1)
    first = jnp.max(jnp.where(reset, places, -1), axis=1)
    began = first >= 0
    first = jnp.where(began, first, leading)
    length = jnp.where(end < 0, 0, end + 1 - first)
    return _Places(
        valid,
        jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), _PADDING_QUERY),
        leading,
        first,
        end,
        began,
        jnp.where(began, 0, count) + length,
        last_id,
    )


def _in_order(ring, x, count, place: _Places):
    """The keys that came before and are still in sight, oldest first, right before the first token.

    Returns:
        them and those of this call `[b w-1+t ...]`, in the dtype of x, and the document of each.
    """
    window = ring.shape[2]
    earlier = jnp.arange(window - 1)
    position = count[:, None] - (window - 1) + earlier
    old = jnp.swapaxes(ring, 1, 2)
    old = jnp.take_along_axis(old, (position % window)[..., None, None], axis=1).astype(x.dtype)
    old_documents = jnp.where(position >= 0, 0, _PADDING_KEY)
    if place.valid is None:
        join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        return join(old, x), join(old_documents, place.queries)

    def lay(old, new, fill):
        widths = [(0, 0), (window - 1, 0)] + [(0, 0)] * (new.ndim - 2)
        room = jnp.pad(new, widths, constant_values=fill)
        put = lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0)
        return jax.vmap(put)(room, old.astype(new.dtype), place.leading)

    documents = jnp.where(place.valid, place.queries, _PADDING_KEY)
    return lay(old, x, 0), lay(old_documents, documents, _PADDING_KEY)


def _after(ring, x, place: _Places):
    """The ring after the last token: a slot takes the last token of its own, or stays."""
    window = ring.shape[2]
    back = (place.total[:, None] - 1 - jnp.arange(window)) % window  # tokens before the last one
    source = place.end[:, None] - back
    new = jnp.take_along_axis(x, jnp.maximum(source, 0)[..., None, None], axis=1)
    new = jnp.swapaxes(new, 1, 2).astype(ring.dtype)
    old = jnp.where(place.reset[:, None, None, None], 0, ring)
    return jnp.where((source >= place.first[:, None])[:, None, :, None], new, old)


# --- Blocks ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _banded(q, k, v, queries, keys, how):
    """y `[b t g r v]` from q `[b t g r k]`, k `[b l+t g k]`, v `[b l+t g v]`.

    Args:
        queries, keys: the documents of both, int32 `[b t]` and `[b l+t]`.
        how: queries per block (a divisor of t), the scale, the dtype of sums.
    """
    return _banded_forward(q, k, v, queries, keys, how)[0]


def _banded_forward(q, k, v, queries, keys, how):
    block, scale, dtype = how
    reach = k.shape[1] - q.shape[1]  # window - 1
    product = _products(q.dtype)

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


def _banded_backward(how, residuals, dy):
    block, scale, dtype = how
    q, k, v, queries, keys = residuals
    reach = k.shape[1] - q.shape[1]
    product = _products(q.dtype)

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


_banded.defvjp(_banded_forward, _banded_backward)


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


def _products(dtype):
    """Products in float32; of bfloat16 inputs an accelerator may round what they multiply."""
    exact = jnp.promote_types(dtype, jnp.float32) == dtype
    return numerics.einsum if exact else jnp.einsum


def _cut(x, start, size: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
