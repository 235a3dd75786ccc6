"""Step sizes of discretised state spaces: how they start."""

import math

import jax
import jax.numpy as jnp

SPREADS = ("random", "uniform")


def check_step_sizes(dt_min: float, dt_max: float, dt_init: str = "random") -> None:
    """Refuses bounds out of order, and a spread that there is not.

    Raises:
        ValueError: says what is allowed.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min is {dt_min} and dt_max {dt_max}; 0 < dt_min <= dt_max")
    if dt_init not in SPREADS:
        raise ValueError(f"dt_init is {dt_init!r}; allowed: {', '.join(SPREADS)}")


def log_step_sizes(
    key: jax.Array, width: int, dt_min: float, dt_max: float, dt_init: str = "random"
) -> jax.Array:
    """Logarithms `[width]` between those of dt_min and dt_max: drawn uniformly, or equally far."""
    low, high = math.log(dt_min), math.log(dt_max)
    if dt_init == "uniform":
        return jnp.linspace(low, high, width)
    return jax.random.uniform(key, (width,), minval=low, maxval=high)
