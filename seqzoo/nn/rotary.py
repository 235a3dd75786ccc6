"""Rotary positions."""

import jax
import jax.numpy as jnp


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
