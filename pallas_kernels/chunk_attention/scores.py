"""What makes weights of scores: a softmax over the keys in sight, or a function of each score."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.core import numerics

SCORES = ("softmax", "laplace", "relu2")
# The cumulative normal distribution that is tangent to relu2 at sqrt(1/2), as MEGA rounds it.
MEAN, DEVIATION = 0.707107, 0.282095


def weigh(score: str, products, bias, seen, scale: float):
    """Weights `[... c s]` of c queries and s keys; 0 where a key is not in sight.

        softmax     softmax(scale q.k + bias) over the keys in sight
        laplace     f(scale q.k / n + bias),  f(x) = (1 + erf((x - mu) / (sigma sqrt 2))) / 2
        relu2       f(scale q.k / n + bias),  f(x) = max(x, 0)^2

    n is how many keys the query has in sight.

    Args:
        score: one of SCORES.
        products: q.k, float32 or float64.
        bias: to be added, or None.
        seen: bool, broadcasts against products; a query that sees nothing has weights of 0.
        scale: factor of the products.
    """
    if score != "softmax":
        n = jnp.sum(seen, axis=-1, keepdims=True, dtype=jnp.int32)
        products = products / jnp.maximum(n, 1).astype(products.dtype)
    scores = scale * products if bias is None else scale * products + bias
    if score == "relu2":
        return jnp.where(seen, jnp.square(jnp.maximum(scores, 0)), 0)
    if score == "laplace":
        deviations = (scores - MEAN) / (DEVIATION * math.sqrt(2))
        return jnp.where(seen, 0.5 * (1 + jax.lax.erf(deviations)), 0)
    return _softmax(jnp.where(seen, scores, -jnp.inf))


@jax.custom_jvp
def _softmax(scores):
    """Over the last axis; 0 where all scores are -inf."""
    largest = jnp.max(scores, axis=-1, keepdims=True)
    powers = jnp.exp(scores - jnp.where(largest > -jnp.inf, largest, 0))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


@_softmax.defjvp
def _softmax_tangent(primals, tangents):
    """Exactly 0 where there is one key, which a quotient's own derivative is not."""
    (scores,), (dscores,) = primals, tangents
    weights = _softmax(scores)
    return weights, weights * (dscores - jnp.sum(weights * dscores, axis=-1, keepdims=True))


def products(dtype):
    """Products in float32; of bfloat16 inputs an accelerator may round what they multiply."""
    exact = jnp.promote_types(dtype, jnp.float32) == dtype
    return numerics.einsum if exact else jnp.einsum
