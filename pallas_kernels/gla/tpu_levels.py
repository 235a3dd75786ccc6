"""Pairs of a chunk's tokens by halves of halves, as gla's TPU kernels make them; tokens on lanes.

For n = 1, 2, 4, ... a chunk of c tokens is cut into blocks of 2 n. A pair with its key in a block's
first half and its query in the second one decays from the key to the end of the first half, and
from the start of the second to the query: one exponent <= 0 per token and channel,

    w_n = sum of g from the start of its half up to it     in a second half
          sum of g after it up to the end of its half      in a first half
    z_n = exp(w_n) q  in a second half,  exp(w_n) k  in a first half

The pair (j, i) is entry [j i] of z_n^T z_n for the n that is the highest bit of j xor i.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu_parts import dot, each
from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.core.tpu_tokens import LOWEST, NN, ROWS, TN

_STRIP = 32  # channels that are in registers at a time


def sizes(c: int) -> list[int]:
    """Of the halves of a chunk: 1, 2, ... c / 2."""
    return [1 << level for level in range(c.bit_length() - 1)]


def number(at) -> None:
    """Writes what masks are made of: the tokens' numbers, and j xor i, below 0 where j > i.

    In scratch they are read where they are used: masks of a whole kernel would fill the registers.
    """
    c = at["order"].shape[0]
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    at["order"][...] = jnp.where(first <= second, first ^ second, -(first ^ second))
    at["token"][...] = second[:1]


def in_order(at, masks: Seen) -> jax.Array:
    """`[j i]`, whether token i sees token j."""
    return at["order"][...] >= 0 if masks.valid is None else masks.pairs


def each_strip(at, body: Callable) -> None:
    """Runs body(rows) for some channels after the others."""
    k = at["q"].shape[2]
    strip = _STRIP if k % _STRIP == 0 else ROWS
    each(k, strip, lambda first: body(pl.ds(first, strip)))


def taken(at, name: str, rows, here, masks: Seen) -> jax.Array:
    """Channels `rows` of tokens `here` of an array of keys, in float32; 0 where no token is."""
    x = at[name][0, 0, rows, here].astype(jnp.float32)
    return only(masks.valid, jnp.maximum(x, LOWEST) if name == "g" else x)


def is_second(at, n: int, like: jax.Array) -> jax.Array:
    """Whether a token is in the second half of its block of 2 n, `[k c]`."""
    return (jnp.broadcast_to(at["token"][...], like.shape) & n) != 0


def other(x: jax.Array, n: int, second: jax.Array) -> jax.Array:
    """At each token, x `[k c]` of the token whose number differs in bit n alone."""
    c = x.shape[1]
    back = pltpu.roll(x, n, 1)
    return back if 2 * n == c else jnp.where(second, back, pltpu.roll(x, c - n, 1))


def sums(at, g: jax.Array, visit: Callable | None = None) -> tuple[jax.Array, jax.Array]:
    """Sums of log decays `[k c]`, each made of its own terms alone.

    Args:
        at: references.
        g: `[k c]`.
        visit: called with a level's number, its second halves and w_n, the lowest level first.

    Returns:
        From the start of the chunk up to each token, and after it up to the end.
    """
    start, end = g, jnp.zeros_like(g)
    for level, n in enumerate(sizes(g.shape[1])):
        second = is_second(at, n, g)
        if visit is not None:
            visit(level, second, jnp.where(second, start, end))
        across = other(start + end, n, second)  # all of the other half
        start = start + jnp.where(second, across, 0)
        end = end + jnp.where(second, 0, across)
    return start, end


def factors(at, here, look: Callable[[], Seen], dtype, *, pairs: bool = True) -> None:
    """What a chunk's keys and queries are multiplied with.

    Written: `z` `[levels k c]` (and exp(w) in `decays`, where the kernel has it); `to_end` and
    `from_start` `[k c]`, keys times their decay to the end of the chunk and queries times that from
    its start (and the decays in `end` and `start`); `through` `[k 1]`. Without pairs only `to_end`
    and `through`.
    """

    def strip(rows):
        masks = look()
        k, g = (taken(at, name, rows, here, masks) for name in "kg")
        q = taken(at, "q", rows, here, masks) if pairs else k  # without pairs nobody reads it

        def visit(level, second, w):
            decay = jnp.exp(w)
            at["z"][level, rows] = (jnp.where(second, q, k) * decay).astype(dtype)
            if "decays" in at:
                at["decays"][level, rows] = decay

        start, end = (jnp.exp(x) for x in sums(at, g, visit if pairs else None))
        at["through"][rows] = only(masks.kept, start[:, start.shape[1] - 1 :])
        end = only(masks.tail, end)
        at["to_end"][rows] = (k * end).astype(dtype)
        if not pairs:
            return
        start = only(masks.head, start)
        at["from_start"][rows] = (q * start).astype(dtype)
        if "decays" in at:
            at["start"][rows], at["end"][rows] = start, end

    each_strip(at, strip)


def scores(at, here, look: Callable[[], Seen], dtype) -> None:
    """Writes `pairs` `[j i]`: products of keys and queries with the decay between them."""
    masks = look()
    q, k = (taken(at, name, slice(None), here, masks) for name in "qk")
    at["sum"][...] = jnp.broadcast_to(jnp.sum(q * k, axis=0, keepdims=True), at["sum"].shape)
    for level, n in enumerate(sizes(q.shape[1])):
        z = at["z"][level]
        at["sum"][...] = jnp.where(at["order"][...] >= n, dot(z, z, TN), at["sum"][...])
    at["pairs"][...] = only(in_order(at, look()), at["sum"][...]).astype(dtype)


def scores_gradient(at, dtype) -> None:
    """Writes the gradients of `z` `[levels k c]` into `dz`.

    From `sum` `[j i]`, the gradient of `pairs` and beside it its own transpose.
    """
    for level, n in enumerate(sizes(at["sum"].shape[0])):
        bit = jnp.abs(at["order"][...])
        ds = jnp.where((bit >= n) & (bit < 2 * n), at["sum"][...], 0).astype(dtype)
        at["dz"][level] = dot(at["z"][level], ds, NN)


def keys_gradient(at, here, look: Callable[[], Seen]) -> None:
    """Gradients of a chunk's queries, keys and decays, from those of what they were made into.

    `dz` holds those of all z, and of `from_start` and `to_end`; `own` `[1 c]` those of a query's
    product with its own key; `dthrough` `[k 1]` that by the chunk's whole sum of log decays.
    """

    def strip(rows):
        masks, levels = look(), sizes(at["order"].shape[0])
        q, k = (taken(at, name, rows, here, masks) for name in "qk")
        dq = at["start"][rows] * at["dz"][len(levels), rows]
        dk = at["end"][rows] * at["dz"][len(levels) + 1, rows]
        dstart, dend = q * dq, k * dk  # by the sums from the chunk's start and to its end
        dq, dk = dq + at["own"][...] * k, dk + at["own"][...] * q
        for level, n in reversed(list(enumerate(levels))):
            second = is_second(at, n, q)
            dx = at["decays"][level, rows] * at["dz"][level, rows]
            dw = jnp.where(second, q, k) * dx
            across = other(jnp.where(second, dstart, dend), n, second)
            dstart = dstart + across + jnp.where(second, dw, 0)
            dend = dend + across + jnp.where(second, 0, dw)
            dq = dq + jnp.where(second, dx, 0)
            dk = dk + jnp.where(second, 0, dx)
        for name, found in (("dq", dq), ("dk", dk), ("dg", dstart + at["dthrough"][rows])):
            at[name][0, 0, rows, here] = only(masks.valid, found).astype(at[name].dtype)

    each_strip(at, strip)
