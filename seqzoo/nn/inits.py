"""How matrices start. Each maker gives the same object for the same settings, so that the static
parts of two layers compare equal."""

import functools

import jax
from flax import nnx

_scaled = functools.cache(nnx.initializers.variance_scaling)
_normal = functools.cache(nnx.initializers.normal)


def normal(n_residuals: int = 1, std: float | None = None):
    """Normal; the standard deviation is std, None = 1 / sqrt(inputs), divided by the root of the
    number of residual additions."""
    if std is None:
        return _scaled(1.0 / n_residuals, "fan_in", "normal")
    return _normal(std * n_residuals**-0.5)


def uniform(n_residuals: int = 1):
    """Uniform within +- 1 / sqrt(inputs * n_residuals): torch's default for a Linear layer."""
    return _scaled(1 / (3 * n_residuals), "fan_in", "uniform")


def xavier_uniform(gain: float, batch_axis: tuple[int, ...] = ()):
    """Uniform within gain * sqrt(6 / (inputs + outputs)), the axes in batch_axis left out."""
    return _scaled(gain**2, "fan_avg", "uniform", batch_axis=batch_axis)


def uniform_values(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """Values, not a maker: uniform within +- 1 / sqrt(inputs), where shape does not tell inputs."""
    bound = inputs**-0.5
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
