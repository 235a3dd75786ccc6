"""A convolution inside chunks, channel by channel: products with small Toeplitz matrices."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum

FEW = 8  # lags by shifted adds, where documents change inside chunks


def chunk_conv(x: jax.Array, kernel: jax.Array, documents: jax.Array | None = None) -> jax.Array:
    """y_t = sum_{s <= t} kernel[t - s] x_s, over s of the same chunk and document.

    Args:
        x: `[d b i c]`: channels, rows, chunks, tokens.
        kernel: `[d c]`, lag 0 first.
        documents: int32 `[b i c]`, ascending along a row but for -1 = padding (x is 0 there); None
            = one document.

    Returns:
        `[d b i c]`; any number at padding.
    """
    if documents is None:
        return einsum("dbis,dst->dbit", x, toeplitz(kernel))
    return _packed(x, kernel, documents)


def toeplitz(kernel: jax.Array) -> jax.Array:
    """`[d s t]` with kernel[t - s], 0 where s > t, of a kernel `[d c]`.

    Without a gather, whose gradient would be a scatter: rows of c zeros and the kernel, written one
    place further back each time.
    """
    d, c = kernel.shape
    line = jnp.pad(kernel, ((0, 0), (c, 1)))
    lines = jnp.broadcast_to(line[:, None], (d, c, 2 * c + 1)).reshape(d, -1)
    return lines[:, c : c + 2 * c * c].reshape(d, c, 2 * c)[:, :, :c]


@functools.partial(jax.checkpoint, prevent_cse=False)
def _packed(x, kernel, documents):
    """By halves: at each middle one document crosses, so that who sees whom is a mask on the left
    half and one on the right half. Small pieces by shifted adds."""
    d, b, i, c = x.shape
    size = FEW
    while size < c:
        size *= 2
    fill = lambda a, value=0: jnp.pad(
        a, [(0, 0)] * (a.ndim - 1) + [(0, size - c)], constant_values=value
    )
    x, kernel, documents = fill(x), fill(kernel), fill(documents, -1)
    matrix = toeplitz(kernel)
    pieces = lambda a, half: a.reshape(*a.shape[:-1], -1, half)
    parts, names = pieces(x, FEW), pieces(documents, FEW)
    y = kernel[:, 0, None, None, None, None] * parts
    for lag in range(1, FEW):
        shift = lambda a, lag=lag: jnp.pad(a[..., :-lag], [(0, 0)] * (a.ndim - 1) + [(lag, 0)])
        same = (shift(names) == names) & (jnp.arange(FEW) >= lag)
        y = y + kernel[:, lag, None, None, None, None] * jnp.where(same, shift(parts), 0)
    y, half = y.reshape(x.shape), FEW
    while half < size:
        parts, names = pieces(x, half), pieces(documents, half)
        left, right = names[..., 0::2, :], names[..., 1::2, :]
        middle = left[..., -1:]
        middle = jnp.where(middle < 0, -2, middle)
        crosses = einsum(
            "dbips,dst->dbipt",
            jnp.where(left == middle, parts[..., 0::2, :], 0),
            matrix[:, :half, half : 2 * half],
        )
        crosses = jnp.where(right == middle, crosses, 0)
        y = y + jnp.stack([jnp.zeros_like(crosses), crosses], axis=4).reshape(y.shape)
        half *= 2
    return y[..., :c]
