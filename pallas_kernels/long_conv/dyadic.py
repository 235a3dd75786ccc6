"""The convolution of packed documents, exactly, in O(t log^2 t).

Two tokens of one document that are not in one short block lie in the left and the right half of one
dyadic block. Only one document crosses the middle of a block: one mask per half, and one
convolution from half to half. In a short block every lag is a shifted product with its own mask.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.long_conv.convolution import Way, convolve

SHORT = 16

# The way to take for so many inputs, lags and outputs.
Pick = Callable[[int, int, int], Way]


def packed(
    pick: Pick,
    v: jax.Array,
    kernel: jax.Array,
    reverse: jax.Array | None,
    document: jax.Array,
) -> jax.Array:
    """z `[b t e]`: sums over the tokens of the same document only.

    Args:
        pick: of each convolution from half to half.
        v: `[b t e]`, 0 at padding.
        kernel: lags 0, 1, ... `[l e]`.
        reverse: lags -1, -2, ... `[l e]`, or None.
        document: int32 `[b t]`, never falling; padding bears the number of the document before it.
    """
    t = v.shape[1]
    z = kernel[0] * v
    for lag in range(1, min(SHORT, t, kernel.shape[0])):
        z = z + kernel[lag] * _near(v, document, lag)
    if reverse is not None:
        for lag in range(1, min(SHORT, t, reverse.shape[0] + 1)):
            z = z + reverse[lag - 1] * _near(v, document, -lag)
    half = SHORT
    while half < t:
        z = z + _from_half_to_half(pick, v, kernel, reverse, document, half)
        half = 2 * half
    return z


def _near(v, document, lag: int):
    """v_{i-lag} at place i, where that is of the same document and short block."""
    t = v.shape[1]
    places = jnp.arange(t) % SHORT - lag
    cut = slice(None, t - lag) if lag > 0 else slice(-lag, None)
    pad = (max(lag, 0), max(-lag, 0))
    shifted = jnp.pad(v[:, cut], ((0, 0), pad, (0, 0)))
    other = jnp.pad(document[:, cut], ((0, 0), pad), constant_values=-1)
    same = (document == other) & (places >= 0) & (places < SHORT)
    return jnp.where(same[..., None], shifted, 0)


def _from_half_to_half(pick, v, kernel, reverse, document, half: int):
    """What the halves of blocks of 2 half tokens give each other."""
    b, t, e = v.shape
    blocks = -(-t // (2 * half))
    size = t if blocks == 1 else 2 * half  # the only block may be shorter
    fill = ((0, 0), (0, blocks * size - t))
    v = jnp.pad(v, (*fill, (0, 0))).reshape(b * blocks, size, e)
    document = jnp.pad(document, fill, mode="edge").reshape(b * blocks, size)

    # Tokens that no lag brings across the middle are left out.
    longest = max(kernel.shape[0] - 1, 0 if reverse is None else reverse.shape[0])
    left = slice(half - min(half, longest), half)
    right = slice(half, half + min(size - half, longest))
    s, r = left.stop - left.start, right.stop - right.start
    if longest == 0:
        return jnp.zeros((), v.dtype)
    in_left = document[:, left] == document[:, half, None]
    in_right = document[:, right] == document[:, half - 1, None]

    before, after = left.start, size - right.stop
    if reverse is None:
        to_left = jnp.zeros((b * blocks, s, e), v.dtype)
    else:
        lags = jnp.flip(reverse[: s + r - 1], axis=0)
        inputs = jnp.where(in_right[..., None], v[:, right], 0)
        way = pick(r, lags.shape[0], s)
        to_left = convolve(way, inputs, lags, s - lags.shape[0], s)
        to_left = jnp.where(in_left[..., None], to_left, 0)
    lags = kernel[1 : s + r]
    if lags.shape[0]:
        inputs = jnp.where(in_left[..., None], v[:, left], 0)
        to_right = convolve(pick(s, lags.shape[0], r), inputs, lags, 1 - s, r)
        to_right = jnp.where(in_right[..., None], to_right, 0)
    else:
        to_right = jnp.zeros((b * blocks, r, e), v.dtype)
    z = jnp.concatenate([to_left, to_right], axis=1)
    z = jnp.pad(z, ((0, 0), (before, after), (0, 0)))
    return z.reshape(b, blocks * size, e)[:, :t]
