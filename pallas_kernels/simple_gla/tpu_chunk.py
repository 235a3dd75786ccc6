"""What simple_gla's TPU kernels compute in one chunk of c tokens, tokens on lanes."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.tpu import SUBLANES
from pallas_kernels.core.tpu_parts import dot
from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.core.tpu_tokens import NN, NT


def parts(x: jax.Array) -> list[jax.Array]:
    """Three float32 arrays that bfloat16 holds exactly, and whose sum is x."""
    found = []
    for _ in range(3):
        found.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - found[-1]
    return found


def sums(x: jax.Array, ones: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """x times a matrix of ones and zeros, to float32's last digits by three bfloat16 products."""
    return sum_up(dot(part.astype(jnp.bfloat16), ones, dims) for part in parts(x))


def sum_up(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of some arrays."""
    return functools.reduce(jnp.add, terms)


def before(c: int, *, strictly: bool = False) -> jax.Array:
    """bfloat16 `[l i]`, 1 where l <= i, or l < i."""
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    mask = first < second if strictly else first <= second
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


class Order(NamedTuple):
    """Matrices of ones and zeros, `before(c)` and strictly so.

    A kernel makes them once and multiplies with them: masks of pairs would not fit the registers.
    """

    upto: Any
    strict: Any


def decays(g: jax.Array, masks: Seen, order: Order) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of log decays g `[1 c]`: what decays between tokens, and sums to the ends of the chunk.

    Each sum is made of its own terms alone (core/decays.py says why).

    Returns:
        `[j i]`, exp of the sum over the tokens after j up to i, 0 where i does not see j; `[1 c]`,
        the sum from the start of the chunk up to a token; `[1 c]`, after a token up to the end.
    """
    c = g.shape[1]
    upto, strict = order.upto[...], order.strict[...]
    first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, c), 0) == 0

    def terms(part):  # those of pairs, and below them g itself
        rows = (part * strict.astype(jnp.float32), jnp.where(first, part, 0))
        return jnp.concatenate(rows, axis=0).astype(jnp.bfloat16)

    found = sum_up(dot(terms(part), upto, NN) for part in parts(g))
    pairs = jnp.exp(found[:c])
    pairs = pairs * upto.astype(jnp.float32) if masks.valid is None else only(masks.pairs, pairs)
    return pairs, found[c : c + 1], sums(jnp.where(first, g, 0), strict, NT)[:1]


def pairs_gradient(dpairs: jax.Array, order: Order) -> jax.Array:
    """`[1 c]`, the gradient of g from that of its sums between tokens, `[j i]`."""
    after = sums(dpairs, order.upto[...], NT)  # [j l]: over i >= l
    return jnp.sum(after * order.strict[...].astype(jnp.float32), axis=0, keepdims=True)


def ends_gradient(start: jax.Array, end: jax.Array, order: Order) -> jax.Array:
    """`[n c]`, the gradient of g from those of its sums from the start and to the end `[n c]`."""
    return sums(start, order.upto[...], NT) + sums(end, order.strict[...], NN)


def ends(start: jax.Array, end: jax.Array, masks: Seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What decays from the chunk's start to a token `[1 c]`, from it to the end, and through all.

    From the sums of log decays; 0 where the masks are false.
    """
    start, end = jnp.exp(start), jnp.exp(end)
    through = start[:, start.shape[1] - 1 :]
    return only(masks.head, start), only(masks.tail, end), only(masks.kept, through)
