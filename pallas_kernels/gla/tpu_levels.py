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


def differing(c: int) -> jax.Array:
    """int32 `[j i]`, j xor i."""
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    return first ^ second


def strip_of(k: int) -> int:
    """How many of k channels, a multiple of 16, are in registers at a time."""
    return _STRIP if k % _STRIP == 0 else ROWS


def each_strip(at, body: Callable) -> None:
    """Runs body(rows) for some channels after the others."""
    k = at["q"].shape[2]
    strip = strip_of(k)
    each(k, strip, lambda first: body(pl.ds(first, strip)))


def taken(at, name: str, rows, here, masks: Seen) -> jax.Array:
    """Channels `rows` of tokens `here` of an array of keys, in float32; 0 where no token is."""
    x = at[name][0, 0, rows, here].astype(jnp.float32)
    return only(masks.valid, jnp.maximum(x, LOWEST) if name == "g" else x)


def is_second(n: int, shape: tuple[int, ...]) -> jax.Array:
    """Whether a token is in the second half of its block of 2 n."""
    return (jax.lax.broadcasted_iota(jnp.int32, shape, 1) & n) != 0


def other(x: jax.Array, n: int) -> jax.Array:
    """At each token, x `[k c]` of the token whose number differs in bit n alone."""
    c = x.shape[1]
    back = pltpu.roll(x, n, 1)
    return back if 2 * n == c else jnp.where(is_second(n, x.shape), back, pltpu.roll(x, c - n, 1))


def sums(g: jax.Array, visit: Callable | None = None) -> tuple[jax.Array, jax.Array]:
    """Sums of log decays `[k c]`, each made of its own terms alone.

    Args:
        g: `[k c]`.
        visit: called with a level's number, its n and w_n, the lowest level first.

    Returns:
        From the start of the chunk up to each token, and after it up to the end.
    """
    start, end = g, jnp.zeros_like(g)
    for level, n in enumerate(sizes(g.shape[1])):
        second = is_second(n, g.shape)
        if visit is not None:
            visit(level, n, jnp.where(second, start, end))
        across = other(start + end, n)  # all of the other half
        start = start + jnp.where(second, across, 0)
        end = end + jnp.where(second, 0, across)
    return start, end


def sums_gradient(dstart: jax.Array, dend: jax.Array, of_level: Callable) -> jax.Array:
    """The gradient of g from those of its sums, the highest level first.

    Args:
        dstart: `[k c]`, by the sums from the start of the chunk.
        dend: `[k c]`, by those to its end.
        of_level: of a level's number: the gradient by w_n.
    """
    for level, n in reversed(list(enumerate(sizes(dstart.shape[1])))):
        second = is_second(n, dstart.shape)
        across = other(jnp.where(second, dstart, dend), n)
        dw = of_level(level)
        dstart = dstart + across + jnp.where(second, dw, 0)
        dend = dend + across + jnp.where(second, 0, dw)
    return dstart


def factors(at, here, masks: Seen, dtype, *, pairs: bool = True) -> None:
    """What a chunk's keys and queries are multiplied with.

    Written: `z` `[levels k c]` (and exp(w) in `decays`, where the kernel has it); `to_end` and
    `from_start` `[k c]`, keys times their decay to the end of the chunk and queries times that from
    its start; `through` `[k 1]`. Without pairs only `to_end` and `through`.
    """

    def strip(rows):
        q, k, g = (taken(at, name, rows, here, masks) for name in "qkg")

        def visit(level, n, w):
            decay = jnp.exp(w)
            at["z"][level, rows] = (jnp.where(is_second(n, q.shape), q, k) * decay).astype(dtype)
            if "decays" in at:
                at["decays"][level, rows] = decay

        start, end = sums(g, visit if pairs else None)
        start, end = jnp.exp(start), jnp.exp(end)
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


def scores(at, here, masks: Seen, dtype) -> None:
    """Writes `pairs` `[j i]`: products of keys and queries with the decay between them."""
    q, k = (taken(at, name, slice(None), here, masks) for name in "qk")
    at["sum"][...] = jnp.broadcast_to(jnp.sum(q * k, axis=0, keepdims=True), at["sum"].shape)
    for level, n in enumerate(sizes(q.shape[1])):
        z = at["z"][level]
        at["sum"][...] = jnp.where(at["differing"][...] >= n, dot(z, z, TN), at["sum"][...])
    at["pairs"][...] = only(masks.pairs, at["sum"][...]).astype(dtype)


def scores_gradient(at, here, masks: Seen, dtype) -> None:
    """From `sum` `[j i]`, the gradient of `pairs` beside its own transpose, 0 at j = i.

    Adds to `dq` and `dk` `[k c]`, and puts the gradient of w_n in the place of `decays`.
    """
    for level, n in enumerate(sizes(at["sum"].shape[0])):
        at_level = (at["differing"][...] >= n) & (at["differing"][...] < 2 * n)
        ds = jnp.where(at_level, at["sum"][...], 0).astype(dtype)
        at["dz"][...] = dot(at["z"][level], ds, NN)

        def strip(rows, level=level, n=n):
            dx = at["decays"][level, rows] * at["dz"][rows]
            second = is_second(n, dx.shape)
            q, k = (taken(at, name, rows, here, masks) for name in "qk")
            at["decays"][level, rows] = jnp.where(second, q, k) * dx
            at["dq_sum"][rows] += jnp.where(second, dx, 0)
            at["dk_sum"][rows] += jnp.where(second, 0, dx)

        each_strip(at, strip)
