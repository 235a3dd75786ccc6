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
    c, blocks = _cut(t)
    matrix, windows = _toeplitz(lags, c), _Windows(v, lags.shape[0], low, c, blocks)
    y = jax.lax.map(lambda i: einsum("bwe,iwe->bie", windows(i), matrix), jnp.arange(blocks))
    return jnp.moveaxis(y, 0, 1).reshape(v.shape[0], blocks * c, -1)[:, :t]


def correlate(v, dy, low: int, count: int):
    """See `convolution.Way`."""
    b, t, e = dy.shape
    c, blocks = _cut(t)
    dy = jnp.pad(dy, ((0, 0), (0, blocks * c - t), (0, 0))).reshape(b, blocks, c, e)
    windows = _Windows(v, count, low, c, blocks)

    def add(total, x):
        i, dy = x
        return total + einsum("bwe,bie->iwe", windows(i), dy), None

    total = jnp.zeros((c, c - 1 + count, e), v.dtype)
    total, _ = jax.lax.scan(add, total, (jnp.arange(blocks), jnp.moveaxis(dy, 1, 0)))
    return _diagonals(total, count)


def _cut(t: int) -> tuple[int, int]:
    """Outputs per matrix, and how many times."""
    c = min(t, _OUTPUTS)
    return c, -(-t // c)


class _Windows:
    """Of the i-th c outputs, the c-1+count inputs that they see, `[b w e]`."""

    def __init__(self, v, count: int, low: int, c: int, blocks: int):
        high = low + count - 1
        edges = ((0, 0, 0), (high, blocks * c - low - v.shape[1], 0), (0, 0, 0))  # negative: cut
        self.padded = jax.lax.pad(v, jnp.zeros((), v.dtype), edges)
        self.c, self.width = c, c - 1 + count

    def __call__(self, i):
        return jax.lax.dynamic_slice_in_dim(self.padded, i * self.c, self.width, axis=1)


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
