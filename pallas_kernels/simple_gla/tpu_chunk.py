"""What simple_gla's TPU kernels compute in one chunk of c tokens, tokens on lanes."""

import jax
import jax.numpy as jnp

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


def up_to(c: int) -> jax.Array:
    """`[l i]`, 1 where l <= i."""
    first, second = order(c)
    return (first <= second).astype(jnp.float32).astype(jnp.bfloat16)


def decays(g: jax.Array, masks: Seen) -> jax.Array:
    """exp of the sums of g `[1 c]` over the tokens after j up to i, `[j i]`; 0 where i sees no j.

    Each sum is made of its own terms alone (core/decays.py says why).
    """
    c = g.shape[1]
    first, second = order(c)
    terms = jnp.where(second > first, jnp.broadcast_to(g, (c, c)), 0)
    return jnp.where(masks.pairs, jnp.exp(sums(terms, up_to(c), NN)), 0)


def between_gradient(pairs: jax.Array) -> jax.Array:
    """`[1 c]`, the gradient of g from that of the sums that `decays` makes, `[j i]`."""
    c = pairs.shape[0]
    first, second = order(c)
    after = sums(pairs, up_to(c), NT)  # [j l]: over i >= l
    return jnp.sum(jnp.where(second > first, after, 0), axis=0, keepdims=True)


def ends(rows: jax.Array, masks: Seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What decays from the chunk's start to a token `[1 c]`, from it to the end, and through all.

    Args:
        rows: `[3 c]`: log decays, their sums from the start up to a token, and after it to the end.
        masks: 0 where they are false.
    """
    start, end = jnp.exp(rows[1:2]), jnp.exp(rows[2:3])
    through = start[:, rows.shape[1] - 1 :]
    return only(masks.head, start), only(masks.tail, end), only(masks.kept, through)
