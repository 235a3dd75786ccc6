"""The decay of a state per head, chosen by the token, as Mamba-2 and Gated DeltaNet have it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.param import param


class SoftplusDecay(nnx.Module):
    """g = -exp(A_log) softplus(a + dt_bias), the log of the decay per head and token; float32.

    exp(A_log) is a rate per second, softplus(...) a step size in seconds.

    Args:
        n_heads: heads (h).
        a_min, a_max: rates start uniform between them; a_min > 0 keeps their logarithm finite.
        dt_min, dt_max: step sizes at the start (for a = 0) are log-uniform between them.
        dt_init_floor: no step size starts below it.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060); the layer of Yang et al.,
    "Gated Delta Networks" (arXiv 2412.06464).
    """

    def __init__(
        self,
        n_heads: int,
        *,
        a_min: float = 1e-3,
        a_max: float = 16.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        rngs: nnx.Rngs,
    ):
        if not 0 < a_min <= a_max:
            raise ValueError(f"a_min is {a_min} and a_max {a_max}; 0 < a_min <= a_max")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min is {dt_min} and dt_max {dt_max}; 0 < dt_min <= dt_max")
        rates = jax.random.uniform(rngs.params(), (n_heads,), minval=a_min, maxval=a_max)
        self.A_log = param(jnp.log(rates), axes=("heads",), decay=False)
        log_dt = jax.random.uniform(
            rngs.params(), (n_heads,), minval=math.log(dt_min), maxval=math.log(dt_max)
        )
        dt = jnp.maximum(jnp.exp(log_dt), dt_init_floor)
        inverse_softplus = dt + jnp.log(-jnp.expm1(-dt))
        self.dt_bias = param(inverse_softplus, axes=("heads",), decay=False)

    def __call__(self, a: jax.Array) -> jax.Array:
        """Maps `[... h]`, any float type, to log decays `[... h]` <= 0, float32."""
        return -self.rates() * self.step_sizes(a)

    def rates(self) -> jax.Array:
        """exp(A_log) `[h]`, > 0."""
        return jnp.exp(self.A_log[...])

    def step_sizes(self, a: jax.Array) -> jax.Array:
        """softplus(a + dt_bias) `[... h]` > 0, float32."""
        a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
        return jax.nn.softplus(a + self.dt_bias[...])
