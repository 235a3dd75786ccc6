"""Rotary positions."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


def rotate(x: jax.Array, positions: jax.Array, *, theta: float = 10000.0) -> jax.Array:
    """Turns each pair (x_i, x_{i+k/2}) of a head by the angle position * theta^(-2 i / k).

    Args:
        x: `[b t h k]`, k even, any float type.
        positions: int32 `[b t]`, tokens since the start of the document.
        theta: base of the wavelengths.

    Returns:
        `[b t h k]` in the dtype of x; the turning itself is in float32.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.4.2. Halves are paired as Llama does
    (i with i + k/2), where the paper pairs neighbours.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions[..., None].astype(dtype) * frequency  # [b t k/2]
    cos, sin = (f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def count_positions(
    segment_ids: jax.Array | None, count: jax.Array, last_id: jax.Array, t: int
) -> tuple[jax.Array, jax.Array]:
    """Tokens since the start of its document, for each of t new tokens.

    Args:
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = the stream stays
            in its document.
        count: int32 `[b]`, tokens that the stream has read of its document.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
        t: tokens.

    Returns:
        int32 `[b t]` (any number at padding), and the count after the last token.
    """
    if segment_ids is None:
        return count[:, None] + jnp.arange(t, dtype=jnp.int32), count + t
    reset, valid, _ = boundaries(segment_ids, last_id)
    place = count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    start = jax.lax.cummax(jnp.where(reset, place, 0), axis=1)
    place = place - start
    return place, place[:, -1] + valid[:, -1] if t else count
