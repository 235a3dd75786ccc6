"""Dropout by an explicit key: no module keeps random state, so nothing random is to be saved."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets elements to 0 with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
        x: any shape.
        rate: in [0, 1).
        key: a PRNG key; None = off.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
