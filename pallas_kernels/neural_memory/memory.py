"""The network that remembers: its weights, and what it answers.

linear        M(k) = W_out k
two layers    M(k) = W_out phi(W_in k)
deeper        M(k) = W_out phi(W_hidden[-1] ... phi(W_in k))
with a norm   M(k) = LayerNorm(net(k)) (1 + gamma) + k
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum


class Weights(NamedTuple):
    """The weights of a memory, or numbers of the same shapes (momenta).

    Attributes:
        w_out: `[... h v n]`, the last layer; n = m, or k of a linear memory.
        w_in: `[... h m k]`, the first layer; None = the memory is linear.
        w_hidden: `[... h l m m]`, the layers between; None = there are none.
        gamma: `[... h v]`, gain of the norm less 1; None = no norm and no residual.
    """

    w_out: jax.Array
    w_in: jax.Array | None = None
    w_hidden: jax.Array | None = None
    gamma: jax.Array | None = None

    def layers(self) -> tuple[jax.Array, ...]:
        """The matrices from the first layer to the last, each `[... outputs inputs]`."""
        if self.w_in is None:
            return (self.w_out,)
        hidden = () if self.w_hidden is None else jnp.moveaxis(self.w_hidden, -3, 0)
        return (self.w_in, *hidden, self.w_out)

    def rebuilt(self, layers: tuple[jax.Array, ...], gamma: jax.Array | None) -> "Weights":
        """The weights whose layers these are."""
        *first, w_out = layers
        if not first:
            return Weights(w_out, gamma=gamma)
        hidden = None if self.w_hidden is None else jnp.stack(first[1:], axis=-3)
        return Weights(w_out, first[0], hidden, gamma)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _gelu_slope(x):
    density = jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * density


def _silu_slope(x):
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


# phi and its slope. Both are differentiated again: no relu.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (_gelu, _gelu_slope),
    "silu": (jax.nn.silu, _silu_slope),
}


class Rule(NamedTuple):
    """What of a call is static.

    Attributes:
        chunk: tokens whose gradients are taken at the same weights.
        activation, norm_eps: of the network.
        limit: "none", "clip" or "normalise", of each token's gradient by each matrix (and gamma).
        max_norm: to which.
        detach_norm: whether the norm counts as a constant when differentiated.
    """

    chunk: int
    activation: str
    norm_eps: float
    limit: str
    max_norm: float
    detach_norm: bool


# A gradient much shorter than this is not lengthened to max_norm: one of 0 stays 0.
TINY = 1e-6


def factor(square: jax.Array, how: Rule) -> jax.Array:
    """By what a gradient is multiplied, from its squared norm."""
    if how.limit == "none":
        return jnp.ones_like(square)
    if how.detach_norm:
        square = jax.lax.stop_gradient(square)
    if how.limit == "clip":  # min(1, max_norm / norm), without a root of 0
        return how.max_norm * jax.lax.rsqrt(jnp.maximum(square, how.max_norm**2))
    return how.max_norm * jax.lax.rsqrt(square + TINY**2)


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of x y over the last axis, `[... 1]`: a product, which XLA adds up five times faster on
    a CPU than what it makes of jnp.sum."""
    return einsum("...i,...i->...", x, y)[..., None]


def means(x: jax.Array) -> jax.Array:
    """Over the last axis, `[... 1]`."""
    n = x.shape[-1]
    return einsum("...i,i->...", x, jnp.full((n,), 1 / n, x.dtype))[..., None]


def standardised(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / sigma over the last axis, and 1 / sigma `[... 1]`."""
    x = x - means(x)
    inverse = jax.lax.rsqrt(dots(x, x) / x.shape[-1] + eps)
    return x * inverse, inverse


def recall(
    weights: Weights, q: jax.Array, *, activation: str = "gelu", norm_eps: float = 1e-5
) -> jax.Array:
    """What a memory answers, nothing written: `[... c v]` of queries `[... c k]`.

    Args:
        weights: with the same leading axes as q (batch and heads, say).
        q: queries.
        activation: "gelu" (by erf) or "silu".
        norm_eps: added to the variance under the root of the norm.
    """
    phi, _ = ACTIVATIONS[activation]
    *first, w_out = weights.layers()
    x = q
    for w in first:
        x = phi(einsum("...ci,...oi->...co", x, w))
    y = einsum("...ci,...oi->...co", x, w_out)
    if weights.gamma is None:
        return y
    return standardised(y, norm_eps)[0] * (1 + weights.gamma[..., None, :]) + q
