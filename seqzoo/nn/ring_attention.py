"""Softmax attention over rows that are cut over devices: keys and values go round in a ring.

Each device keeps its queries. Its keys and values pass from device to device, and what every
query has seen so far is kept as a sum, its weight and the largest score. Backward the keys go
round once more, with their gradients. A device holds the keys of one shard at a time, and no
scores but those of one shard by another.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889).
Differs from source: documents can be packed; a shard that lies wholly ahead of the queries is
passed on unread, so that of n devices the first has the least to do.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.axes import axes
from seqzoo.nn.sequence_parallel import Call, Rule
from seqzoo.nn.shards import Documents, Shard


def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to all (earlier) tokens of the document; scores are divided by k^1/2.

    Args:
        q: `[b t h k]`.
        k: `[b t g k]`; g divides h, head i looks at key-value head i // (h / g).
        v: `[b t g k]`.
        causal: a query sees no later key.
        segment_ids: int32 `[b t]`, 0 = padding (a document of its own); None = one document.
        implementation: of jax.nn.dot_product_attention; of no matter where rows are cut.

    Returns:
        `[b t h k]` in the dtype of q.
    """
    same = None
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, mask=same, implementation=implementation
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is static of the ring: mesh axis, devices, and whether queries see later keys."""

    axis: str
    n: int
    causal: bool

    def on(self, tree):
        """What the device to the left holds; the last one's for the first."""
        pairs = [(i, (i + 1) % self.n) for i in range(self.n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)


class _Seen(NamedTuple):
    """What queries have seen: the sum `[b g r t k]`, its weight and the largest score."""

    sum: jax.Array
    weight: jax.Array
    most: jax.Array


def _run(call: Call, args, state, documents: Documents, shard: Shard):
    ring = _Ring(shard.axis, shard.n, call.options["causal"])
    return _ring_attention(ring, *args, documents.ids), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, q, k, v, ids):
    return _forward(ring, q, k, v, ids)[0]


def _forward(ring: _Ring, q, k, v, ids):
    queries = _grouped(q, k.shape[2])
    b, t, g, r, _ = queries.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    none = jnp.full((b, g, r, t), -jnp.inf, dtype)
    seen = _Seen(jnp.zeros((*none.shape, v.shape[-1]), dtype), jnp.zeros(none.shape, dtype), none)
    index = jax.lax.axis_index(ring.axis)

    def turn(carry, i):
        k, v, seen = carry
        there = (index - i) % ring.n
        look = lambda seen: _look(ring, queries, k, v, ids, index, there, seen)
        # Nothing of a shard ahead is seen.
        seen = (
            jax.lax.cond(there > index, lambda seen: seen, look, seen)
            if ring.causal
            else look(seen)
        )
        return (*ring.on((k, v)), seen), None

    (*_, seen), _ = jax.lax.scan(turn, (k, v, seen), jnp.arange(ring.n))
    weight = seen.weight[..., None]
    y = jnp.where(weight > 0, seen.sum / jnp.where(weight > 0, weight, 1), 0)
    # exp(score - total) is the share of a key; where nothing was seen it is 0.
    total = jnp.where(seen.weight > 0, seen.most + jnp.log(seen.weight), jnp.inf)
    return _joined(y, q.dtype), (q, k, v, ids, y, total)


def _look(ring, queries, k, v, ids, index, there, seen: _Seen) -> _Seen:
    scores = _scores(ring, queries, k, ids, index, there)
    most = jnp.maximum(seen.most, jnp.max(scores, axis=-1))
    at = jnp.where(jnp.isfinite(most), most, 0)
    shares = jnp.exp(scores - at[..., None])
    kept = jnp.exp(seen.most - at)
    new = _product("bgrts,bsgk->bgrtk", shares.astype(v.dtype), v, shares.dtype)
    return _Seen(
        seen.sum * kept[..., None] + new, seen.weight * kept + jnp.sum(shares, axis=-1), most
    )


def _backward(ring: _Ring, kept, dy):
    q, k, v, ids, y, total = kept
    queries, dy = _grouped(q, k.shape[2]), jnp.moveaxis(_grouped(dy, k.shape[2]), 1, 3)
    dtype = y.dtype
    dy = dy.astype(dtype)
    middle = jnp.sum(dy * y, axis=-1)
    index = jax.lax.axis_index(ring.axis)
    scale = q.shape[-1] ** -0.5

    def look(grads, k, v, there):
        dq, dk, dv = grads
        shares = jnp.exp(_scores(ring, queries, k, ids, index, there) - total[..., None])
        dv += _product("bgrts,bgrtk->bsgk", shares, dy, dtype)
        back = _product("bgrtk,bsgk->bgrts", dy, v.astype(dtype), dtype)
        back = scale * shares * (back - middle[..., None])
        dq += _product("bgrts,bsgk->btgrk", back, k.astype(dtype), dtype)
        dk += _product("bgrts,btgrk->bsgk", back, queries.astype(dtype), dtype)
        return dq, dk, dv

    def turn(carry, i):
        k, v, dq, dk, dv = carry
        there = (index - i) % ring.n
        one = lambda grads: look(grads, k, v, there)
        grads = (dq, dk, dv)
        grads = jax.lax.cond(there > index, lambda g: g, one, grads) if ring.causal else one(grads)
        dq, *others = grads
        k, v, dk, dv = ring.on((k, v, *others))
        return (k, v, dq, dk, dv), None

    zeros = [jnp.zeros(x.shape, dtype) for x in (queries, k, v)]
    (_, _, dq, dk, dv), _ = jax.lax.scan(turn, (k, v, *zeros), jnp.arange(ring.n))
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring_attention.defvjp(_forward, _backward)


def _scores(ring: _Ring, queries, k, ids, index, there):
    """`[b g r t s]` of the queries here by the keys of a shard; -inf where one is not seen."""
    t = k.shape[1]
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    scores = queries.shape[-1] ** -0.5 * _product("btgrk,bsgk->bgrts", queries, k, dtype)
    places = jnp.arange(t)
    seen = jnp.ones((1, t, t), bool)
    if ring.causal:
        seen = ((index * t + places)[:, None] >= there * t + places)[None]
    if ids is not None:
        mine, theirs = (
            jax.lax.dynamic_slice_in_dim(ids, place * t, t, axis=1) for place in (index, there)
        )
        seen = seen & (mine[:, :, None] == theirs[:, None, :])
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _product(equation, a, b, dtype):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _grouped(q, g: int):
    """`[b t h k]` as `[b t g r k]`."""
    return q.reshape(*q.shape[:2], g, -1, q.shape[-1])


def _joined(y, dtype):
    """`[b g r t k]` as `[b t h k]`."""
    y = jnp.moveaxis(y, 3, 1)
    return y.reshape(*y.shape[:2], -1, y.shape[-1]).astype(dtype)


full_attention.axes = axes(  # type: ignore[attr-defined]
    "b t h k, b t g k, b t g k -> b t h k", independent="b h g"
)
full_attention.sequence_rule = Rule(_run)  # type: ignore[attr-defined]
