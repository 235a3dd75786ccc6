"""One convolution of one document, whichever way it is computed, with its own backward pass.

A kernel is an array of lags `[m e]`, the first of them of lag `low` (negative = ahead):

    y_i = sum_{j=low}^{low+m-1} lags[j-low] v_{i-j}        i < t, v_s = 0 outside of what is given
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp


class Way(Protocol):
    """What computes it: a module, or an object that hashes by what it holds."""

    def convolve(self, v: jax.Array, lags: jax.Array, low: int, t: int) -> jax.Array:
        """y `[b t e]` from v `[b s e]` and lags `[m e]`."""
        ...

    def correlate(self, v: jax.Array, dy: jax.Array, low: int, count: int) -> jax.Array:
        """`[m e]`, m = count: sums over rows and places i of dy_i v_{i-j}, j = low, low + 1, ..."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def convolve(way: Way, v: jax.Array, lags: jax.Array, low: int, t: int) -> jax.Array:
    """y `[b t e]`; keeps v and lags for the backward pass, no spectrum.

    Args:
        way: what computes it.
        v: `[b s e]`.
        lags: `[m e]`.
        low: of the first lag.
        t: outputs wanted.
    """
    return way.convolve(v, lags, low, t)


def _forward(way, v, lags, low, t):
    return way.convolve(v, lags, low, t), (v, lags)


def _backward(way, low, t, residuals, dy):
    v, lags = residuals
    count = lags.shape[0]
    high = low + count - 1
    dv = way.convolve(dy, jnp.flip(lags, axis=0), -high, v.shape[1])
    return dv, way.correlate(v, dy, low, count)


convolve.defvjp(_forward, _backward)
