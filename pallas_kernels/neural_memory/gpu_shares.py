"""What forgetting, momentum and steps make of the gradients of a chunk: mixing.py on tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_tiles import (
    dot,
    indices,
    last,
    last_row,
    over_tokens,
    total,
    turned,
    wide,
)


class Mix(NamedTuple):
    """What is left of weights, momentum and gradients; see mixing.py.

    Attributes:
        weights, momentum: at each token, columns.
        gradients: C of README.md.
        last: its last row.
        keep_weights, add_momentum, keep_momentum: at the last token, numbers.
        momenta_of_last: what of each token's gradient is in the last momentum, a row.
    """

    weights: jax.Array
    momentum: jax.Array
    gradients: jax.Array
    last: jax.Array
    keep_weights: jax.Array
    add_momentum: jax.Array
    keep_momentum: jax.Array
    momenta_of_last: jax.Array


def mixed(alpha, eta, theta, own) -> Mix:
    """Of rows; the momentum is not added to the weights at tokens that do not count (own is 0)."""
    alpha, theta = jnp.where(own > 0, alpha, 0), jnp.where(own > 0, theta, 0)
    eta = jnp.where(own > 0, eta, 1)
    forgets, weights = _products(1 - alpha)
    fades, fade = _products(eta)
    here = turned(own)
    gradients = dot("nn", forgets, here * fades) * theta
    momentum = total(forgets * turned(here * fade))
    return Mix(
        weights,
        momentum,
        gradients,
        last_row(gradients),
        last(weights),
        last(momentum),
        last(fade),
        last_row(fades) * theta,
    )


@jax.custom_vjp
def _products(x):
    """Products over stretches of a row of factors from 0 to 1: (t, s) is x_{s+1} ... x_t, 1 for
    s = t and 0 for s > t; and the column x_0 ... x_t.

    By sums of logarithms; factors of 0 are counted apart, so that they are exact.
    """
    up_to = _up_to(x, strictly=False)
    return _stretches(up_to, up_to, strictly=False)


def _products_forward(x):
    found = _products(x)
    return found, (x, *found)


def _products_backward(kept, cotangents):
    """x_j is in the stretches from s < j to t >= j: what is before it times what follows it."""
    x, stretches, _ = kept
    dstretches, dwhole = cotangents
    up_to = (_up_to(x, strictly=strictly) for strictly in (True, False))
    before, whole = _stretches(*up_to, strictly=True)
    dx = total(before * dot("tn", stretches, dstretches))
    return (turned(dx + whole * turned(over_tokens(stretches * dwhole))),)


_products.defvjp(_products_forward, _products_backward)


def _up_to(x, *, strictly: bool):
    """Columns: sums of logarithms up to each token (or before it), and how many factors are 0."""
    t, s = indices()
    zero = x <= 0
    each = jnp.log(jnp.where(zero, 1, x)), jnp.where(zero, 1.0, 0.0)
    return tuple(total(jnp.where(s < t if strictly else s <= t, wide(a), 0)) for a in each)


def _stretches(upper, lower, *, strictly: bool):
    """exp(upper_t - lower_s), 0 where a factor of 0 lies between; and exp(upper_t)."""
    t, s = indices()
    along = [wide(turned(x)) for x in lower]
    inside = (s < t if strictly else s <= t) & (wide(upper[1]) == along[1])
    found = jnp.exp(jnp.where(inside, wide(upper[0]) - along[0], -1e4))
    return found, jnp.exp(jnp.where(upper[1] > 0, -1e4, upper[0]))
