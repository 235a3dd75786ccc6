"""What forgetting, momentum and step sizes make of the gradients of a chunk, as matrices."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum
from pallas_kernels.neural_memory.memory import dots


class Mix:
    """What is left, at each token, of the weights and the momentum before, and of each gradient.

        M_t = weights_t W + momentum_t S - sum_i gradients_ti u_i

    Attributes:
        weights, momentum: `[b h c]`.
        gradients: `[b h c c]`, C of README.md.
        keep_weights, add_momentum: the first two at the last token, `[b h 1 1]`.
        keep_momentum: what is left of the momentum in the momentum, `[b h 1 1]`.
        momenta_of_last: what of each token's gradient is in the momentum after the last, `[b h c]`.
    """

    def __init__(self, alpha, eta, theta, own):
        forgets, fades = products(jnp.stack([1 - alpha, eta]))  # [b h c 1+c]
        in_weights = fades if own is None else jnp.where(own[..., None], fades, 0)
        both = einsum("bhts,bhsi->bhti", forgets[..., 1:], in_weights)
        self.weights, self.momentum = forgets[..., 0], both[..., 0]
        self.gradients = both[..., 1:] * theta[..., None, :]
        last = lambda x: x[..., -1][..., None, None]
        self.keep_weights, self.add_momentum = last(self.weights), last(self.momentum)
        self.keep_momentum = last(fades[..., 0])
        self.momenta_of_last = fades[..., -1, 1:] * theta


@jax.custom_vjp
def scaled(share: jax.Array, x: jax.Array) -> jax.Array:
    """Rows of `[... c i]` times `[... c]`."""
    return share[..., None] * x


def _scaled_forward(share, x):
    return scaled(share, x), (share, x)


def _scaled_backward(kept, dy):
    share, x = kept
    return dots(dy, x)[..., 0], share[..., None] * dy


scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def products(x: jax.Array) -> jax.Array:
    """Products over stretches of the last axis: `[... c]` gives `[... c 1+c]`.

    Entry (t, 0) is x_0 ... x_t; entry (t, 1+s) is x_{s+1} ... x_t, 1 for s = t and 0 for s > t.
    Products and no differences of logarithms: a factor of 0 is exact, and so is its gradient.
    """
    c = x.shape[-1]
    t, s = jnp.arange(c)[:, None], jnp.arange(-1, c)
    stretches = jnp.cumprod(jnp.where(t > s, x[..., :, None], 1), axis=-2)
    return jnp.where(t >= s, stretches, 0)


def _products_forward(x):
    f = products(x)
    return f, f


def _products_backward(f, df):
    """x_j is in the stretches from s < j to t >= j: what is before it times what follows it."""
    follows = einsum("...tj,...ts->...js", f[..., 1:], df)
    first = jnp.zeros_like(f[..., :1, :]).at[..., 0].set(1)  # nothing is before x_0
    before = jnp.concatenate([first, f[..., :-1, :]], axis=-2)
    return (dots(before, follows)[..., 0],)


products.defvjp(_products_forward, _products_backward)
