"""What simple_gla's TPU kernels compute in one chunk of c tokens, tokens on lanes."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.tpu import SUBLANES
from pallas_kernels.core.tpu_parts import dot
from pallas_kernels.core.tpu_places import Seen, only

NN, NT, TN = (1, 0), (1, 1), (0, 0)
LOWEST = -1e30  # exp of it is 0 in any precision, and sums of it are finite


def product_dtype(*arrays: jax.Array):
    """What the matrix units are given: bfloat16 where all arrays are."""
    return jnp.bfloat16 if all(a.dtype == jnp.bfloat16 for a in arrays) else jnp.float32


def sums(x: jax.Array, lower: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """x times a matrix of ones and zeros, to float32's last digits by three bfloat16 products."""
    total, rest = jnp.zeros((), jnp.float32), x
    for _ in range(3):
        part = rest.astype(jnp.bfloat16)
        rest = rest - part.astype(jnp.float32)
        total = total + dot(part, lower, dims)
    return total


def order(c: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, int32 `[c c]`."""
    shape = (c, c)
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return iota(0), iota(1)


def before(c: int, *, strictly: bool = False) -> jax.Array:
    """`[l i]`, 1 where l <= i, or l < i."""
    first, second = order(c)
    mask = first < second if strictly else first <= second
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


def between(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of g `[1 c]`, each made of its own terms alone (core/decays.py says why).

    Returns:
        `[j i]`, over the tokens after j up to i; `[1 c]`, from the start of the chunk up to a
        token; `[1 c]`, after a token up to the end.
    """
    c = g.shape[1]
    first, second = order(c)
    terms = jnp.where(second > first, jnp.broadcast_to(g, (c, c)), 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, c), 0) == 0
    terms = jnp.concatenate([terms, jnp.where(row, g, 0)], axis=0)
    found = sums(terms, before(c), NN)
    pairs, start = found[:c], found[c : c + 1]
    # The last column, laid along the lanes.
    end = jnp.sum(jnp.where(first == second, pairs[:, c - 1 :], 0), axis=0, keepdims=True)
    return pairs, start, end


def between_gradient(pairs: jax.Array) -> jax.Array:
    """`[1 c]`, the gradient of g from that of its sums between tokens, `[j i]`."""
    c = pairs.shape[0]
    first, second = order(c)
    after = sums(pairs, before(c), NT)  # [j l]: over i >= l
    return jnp.sum(jnp.where(second > first, after, 0), axis=0, keepdims=True)


def ends_gradient(start: jax.Array, end: jax.Array) -> jax.Array:
    """`[n c]`, the gradient of g from those of its sums from the start and to the end `[n c]`."""
    c = start.shape[1]
    return sums(start, before(c), NT) + sums(end, before(c, strictly=True), NN)


def ends(start: jax.Array, end: jax.Array, masks: Seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What decays from the chunk's start to a token `[1 c]`, from it to the end, and through all.

    From the sums of log decays; 0 where the masks are false.
    """
    start, end = jnp.exp(start), jnp.exp(end)
    through = start[:, start.shape[1] - 1 :]
    return only(masks.head, start), only(masks.tail, end), only(masks.kept, through)
