"""The inverse of I + L for strictly lower triangular L, as chunked delta rules need it.

By substitution inside blocks of 16 rows, and by merging blocks. The tempting product of powers,
(I - L)(I + L^2)(I + L^4)..., cancels: with one repeated key its powers grow like binomials, and the
result is wrong by 1e10 in float32 although no entry of the inverse is larger than 1.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum

ROWS = 16


def inverse(lower: jax.Array) -> jax.Array:
    """(I + L)^-1.

    Args:
        lower: `[... c c]`, strictly lower triangular; c is 16 times a power of two, or at most 16.
            What stands on and above the diagonal must be 0.

    Returns:
        `[... c c]`, lower triangular with ones on the diagonal.

    Raises:
        ValueError: c is another number.
    """
    *batch, c, _ = lower.shape
    size = min(c, ROWS)
    if c % size or (c // size) & (c // size - 1):
        raise ValueError(f"c is {c}; it must be at most {ROWS}, or {ROWS} times a power of two")
    lower = lower.reshape(-1, c, c)
    on_diagonal = _blocks(lower, size, 0, c // size)
    found = _substitute(on_diagonal.reshape(-1, size, size)).reshape(on_diagonal.shape)
    while size < c:
        first, second = found[:, 0::2], found[:, 1::2]
        between = _blocks(lower, size, size, c // (2 * size))
        corner = -einsum("naij,najk->naik", einsum("naij,najk->naik", second, between), first)
        found = jnp.concatenate(
            [
                jnp.concatenate([first, jnp.zeros_like(first)], axis=-1),
                jnp.concatenate([corner, second], axis=-1),
            ],
            axis=-2,
        )
        size *= 2
    return found.reshape(*batch, c, c)


def _blocks(lower: jax.Array, size: int, below: int, count: int) -> jax.Array:
    """`[n count size size]`: squares on the diagonal, or that far below it, evenly spaced."""
    step = lower.shape[1] // count
    squares = [
        lower[:, i + below : i + below + size, i : i + size] for i in range(0, count * step, step)
    ]
    return jnp.stack(squares, axis=1)


def _substitute(lower: jax.Array) -> jax.Array:
    """Row after row, `[n r r]`: x_i = e_i - sum_{j < i} L_ij x_j."""
    identity = jnp.eye(lower.shape[-1], dtype=lower.dtype)

    def row(i, x):
        weights = jax.lax.dynamic_index_in_dim(lower, i, axis=1, keepdims=False)
        x_i = identity[i] - einsum("nj,njk->nk", weights, x)  # rows from i on are still 0
        return jax.lax.dynamic_update_index_in_dim(x, x_i, i, axis=1)

    return jax.lax.fori_loop(0, len(identity), row, jnp.zeros_like(lower))
