"""The convolution as it stands: products with Toeplitz matrices, a few outputs at a time.

What a token does not see is multiplied by exactly 0, so that outputs before a token that changes
stay the same to the bit.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum

_OUTPUTS = 32  # in one matrix


def convolve(v, lags, low: int, t: int):
    """See `convolution.Way`."""
    c = min(t, _OUTPUTS)
    matrix = _toeplitz(lags, c)
    y = jax.lax.map(
        lambda window: einsum("bwe,iwe->bie", window, matrix), _windows(v, lags.shape[0], low, t, c)
    )
    return _join(y)[:, :t]


def correlate(v, dy, low: int, count: int):
    """See `convolution.Way`."""
    t = dy.shape[1]
    c = min(t, _OUTPUTS)
    blocks = -(-t // c)
    dy = jnp.pad(dy, ((0, 0), (0, blocks * c - t), (0, 0)))
    dy = jnp.moveaxis(dy.reshape(dy.shape[0], blocks, c, -1), 1, 0)

    def add(total, x):
        window, dy = x
        return total + einsum("bwe,bie->iwe", window, dy), None

    total = jnp.zeros((c, c - 1 + count, v.shape[2]), v.dtype)
    total, _ = jax.lax.scan(add, total, (_windows(v, count, low, t, c), dy))
    return _diagonals(total, count)


def _windows(v, count: int, low: int, t: int, c: int):
    """`[n b w e]`: for each c outputs the w = c-1+count inputs that they see."""
    blocks = -(-t // c)
    high = low + count - 1
    edges = ((0, 0, 0), (high, blocks * c - low - v.shape[1], 0), (0, 0, 0))  # negative: cut
    padded = jax.lax.pad(v, jnp.zeros((), v.dtype), edges)
    if blocks == 1:
        return padded[None]
    places = c * jnp.arange(blocks)[:, None] + jnp.arange(c - 1 + count)
    return jnp.moveaxis(padded[:, places], 1, 0)


def _toeplitz(lags, c: int):
    """`[c w e]`: lags[i + m-1 - w] at (i, w), 0 where there is no such lag.

    Rows of a width one above w, laid end to end and cut into rows of w, move by one place each.
    """
    m, e = lags.shape
    row = jnp.pad(jnp.flip(lags, axis=0), ((0, c), (0, 0)))
    rows = jnp.broadcast_to(row, (c, m + c, e)).reshape(c * (m + c), e)
    return rows[: c * (m + c - 1)].reshape(c, m + c - 1, e)


def _diagonals(matrix, m: int):
    """The transpose of `_toeplitz`: sums over the diagonals, `[m e]`."""
    c, w, e = matrix.shape
    rows = jnp.pad(matrix.reshape(c * w, e), ((0, c), (0, 0)))
    return jnp.flip(jnp.sum(rows.reshape(c, w + 1, e), axis=0)[:m], axis=0)


def _join(y):
    n, b, c, e = y.shape
    return jnp.moveaxis(y, 0, 1).reshape(b, n * c, e)
