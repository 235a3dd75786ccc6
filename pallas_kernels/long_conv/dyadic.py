"""The convolution of packed documents, exactly, in O(t log^2 t).

Any two tokens lie in the left and the right half of one dyadic block (of 2, 4, 8, ... tokens). Only
one document crosses the middle of a block: one mask per half makes one convolution from half to
half exact. A token by itself is lag 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.long_conv.convolution import Way, convolve

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
    z = kernel[0] * v
    half = 1
    while half < v.shape[1]:
        z = z + _from_half_to_half(pick, v, kernel, reverse, document, half)
        half = 2 * half
    return z


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
