"""What forgetting, momentum and steps make of the gradients of a chunk: mixing.py in a kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neural_memory.tpu_products import product


class Mix(NamedTuple):
    """What is left of weights, momentum and gradients; see mixing.py.

    Attributes:
        weights, momentum: at each token, `[c 1]`.
        gradients: C of README.md, `[c c]`.
        last: its last row, `[1 c]`.
        keep_weights, add_momentum, keep_momentum: at the last token, `[1 1]`.
        momenta_of_last: what of each token's gradient is in the last momentum, `[1 c]`.
    """

    weights: jax.Array
    momentum: jax.Array
    gradients: jax.Array
    last: jax.Array
    keep_weights: jax.Array
    add_momentum: jax.Array
    keep_momentum: jax.Array
    momenta_of_last: jax.Array


def mixed(alpha, eta, theta, mine) -> Mix:
    (forgets, weights), (fades, fade) = products(column(1 - alpha), column(eta))
    in_weights, own = fades, fade
    if mine is not None:  # the momentum is not added to the weights at tokens that are not there
        here = column(mine)
        in_weights, own = here * fades, here * fade
    gradients = product("nn", forgets, in_weights, narrow=False) * theta
    momentum = jnp.sum(forgets * row(own), axis=1, keepdims=True)
    return Mix(
        weights,
        momentum,
        gradients,
        _last_row(gradients),
        _last_row(weights),
        _last_row(momentum),
        _last_row(fade),
        _last_row(fades) * theta,
    )


def _indices(c: int):
    t = jax.lax.broadcasted_iota(jnp.int32, (c, c), 0)
    return t, jax.lax.broadcasted_iota(jnp.int32, (c, c), 1)


def _numbers(c: int):
    return jax.lax.broadcasted_iota(jnp.int32, (c, 1), 0)


def column(x):
    """`[1 c]` as `[c 1]`."""
    t, s = _indices(x.shape[1])
    return jnp.sum(jnp.where(t == s, x, 0), axis=1, keepdims=True)


def row(x):
    """`[c 1]` as `[1 c]`."""
    t, s = _indices(x.shape[0])
    return jnp.sum(jnp.where(t == s, x, 0), axis=0, keepdims=True)


def _last_row(x):
    t = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.sum(jnp.where(t == x.shape[0] - 1, x, 0), axis=0, keepdims=True)


@jax.custom_vjp
def products(x, y):
    """Products over stretches of two columns `[c 1]`: of each a pair, of which (t, s) of `[c c]` is
    x_{s+1} ... x_t, 1 for s = t and 0 for s > t; and (t, 0) of `[c 1]` is x_0 ... x_t.
    """
    c = x.shape[0]
    t = jax.lax.broadcasted_iota(jnp.int32, (c, 2 * c), 0)
    s = jax.lax.broadcasted_iota(jnp.int32, (c, 2 * c), 1)  # x's columns, then y's
    first, s = s < c, jnp.where(s < c, s, s - c)
    both = jnp.where(t > s, jnp.where(first, x, y), 1.0)
    shift = 1
    while shift < c:
        both = both * jnp.where(t >= shift, pltpu.roll(both, shift, axis=0), 1.0)
        shift *= 2
    both = jnp.where(t >= s, both, 0.0)
    return _with_whole(both[:, :c], x), _with_whole(both[:, c:], y)


def _with_whole(stretches, x):
    t, s = _indices(x.shape[0])
    first = jnp.where(_numbers(x.shape[0]) == 0, x, 0.0)
    behind_first = jnp.sum(jnp.where(s == 0, stretches, 0.0), axis=1, keepdims=True)
    return stretches, behind_first * jnp.sum(first, axis=0, keepdims=True)


def _products_forward(x, y):
    found = products(x, y)
    return found, found


def _products_backward(found, cotangents):
    return tuple(map(_one_backward, found, cotangents))


def _one_backward(found, cotangents):
    """x_j is in the stretches from s < j to t >= j: what is before it times what follows it."""
    stretches, whole = found
    dstretches, dwhole = cotangents
    t, _ = _indices(stretches.shape[0])
    before = jnp.where(t > 0, pltpu.roll(stretches, 1, axis=0), 0.0)
    follows = product("tn", stretches, dstretches, narrow=False)
    dx = jnp.sum(before * follows, axis=1, keepdims=True)
    before = jnp.where(_numbers(whole.shape[0]) > 0, pltpu.roll(whole, 1, axis=0), 1.0)
    return dx + before * column(jnp.sum(stretches * dwhole, axis=0, keepdims=True))


products.defvjp(_products_forward, _products_backward)
