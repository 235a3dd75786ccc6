"""The closed form of neural_memory for the tokens of one chunk, or of a part of one.

All gradients are taken at the same weights, so what forgetting, momentum and step sizes make of
them is one matrix C of tokens by tokens, and no gradient is ever formed: each is an outer product
of a residual and an input, of a matrix each. README.md has the maths.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum
from pallas_kernels.neural_memory.memory import (
    ACTIVATIONS,
    Rule,
    Weights,
    dots,
    factor,
    means,
    standardised,
)


def one_document(how, opening, carry, tokens, mine, place):
    """A chunk of a row that is one document from its start: its gradients are taken at `now`."""
    del opening, place
    start, now, momentum = carry
    # A chunk without tokens fills a span up: it leaves the chunk before it open.
    start = now if mine is None else _choose(jnp.any(mine, axis=1), now, start)
    return _chunk(how, (start, now, momentum), tokens, mine)


def any_documents(how, opening, carry, tokens, mine, place):
    """A part of a chunk; a document may begin with it, or a chunk, in any of the rows."""
    start, now, momentum = carry
    mine = jnp.ones(place.shape, bool) if mine is None else mine
    begins = jnp.any(mine & (place == 0), axis=1)
    now, momentum = _choose(begins, opening, (now, momentum))
    start = _choose(jnp.any(mine & (place % how.chunk == 0), axis=1), now, start)
    return _chunk(how, (start, now, momentum), tokens, mine)


def _choose(rows, a, b):
    """a (`[h ...]` or `[b h ...]`) in some rows (bool `[b]`), else b `[b h ...]`."""
    wide = lambda x: rows.reshape(rows.shape + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda a, b: jnp.where(wide(b), a, b), a, b)


def _chunk(how: Rule, carry, tokens, mine):
    """y `[b c h v]` and the carry after the tokens that are `mine`.

    Args:
        how: static settings.
        carry: weights that gradients are taken at, weights before the first token, momentum.
        tokens: q, k, v `[b c h ...]`, alpha, eta, theta `[b c h]`.
        mine: bool `[b c]`; None = all.
    """
    start, now, momentum = carry
    out_dtype, dtype = tokens[2].dtype, now.w_out.dtype
    own = None if mine is None else mine[:, None]  # [b 1 c]

    def by_head(x, otherwise=0):
        x = jnp.swapaxes(x, 1, 2).astype(dtype)
        return x if own is None else jnp.where(own if x.ndim == 3 else own[..., None], x, otherwise)

    q, k, v, alpha, _, theta = map(by_head, tokens)
    eta = by_head(tokens[4], 1)
    mix = _Mix(alpha, eta, theta, own)
    inputs, errors, slopes = _gradients(how, start, k, v)
    x, layers, momenta = q, [], []
    matrices = list(zip(now.layers(), momentum.layers(), inputs, errors, strict=True))
    for i, (w, s, a, d) in enumerate(matrices):
        z = scaled(mix.weights, einsum("bhci,bhoi->bhco", x, w))
        z = z + scaled(mix.momentum, einsum("bhci,bhoi->bhco", x, s))
        pairs = mix.gradients * einsum("bhci,bhji->bhcj", x, a)
        z = z - einsum("bhcj,bhjo->bhco", pairs, d)
        x = ACTIVATIONS[how.activation][0](z) if i + 1 < len(matrices) else z
        outer = lambda by, d=d, a=a: einsum("bhco,bhci->bhoi", scaled(by, d), a)
        layers.append(
            mix.keep_weights * w + mix.add_momentum * s - outer(mix.gradients[..., -1, :])
        )
        momenta.append(mix.keep_momentum * s - outer(mix.momenta_of_last))
    gain, gain_momentum = now.gamma, momentum.gamma
    if gain is not None:
        u = slopes
        gains = mix.weights[..., None] * gain[..., None, :]
        gains = gains + mix.momentum[..., None] * gain_momentum[..., None, :]
        gains = gains - einsum("bhcj,bhjv->bhcv", mix.gradients, u)
        x = standardised(x, how.norm_eps)[0] * (1 + gains) + q
        gain_momentum = mix.keep_momentum[..., 0] * gain_momentum - einsum(
            "bhc,bhcv->bhv", mix.momenta_of_last, u
        )
        gain = gains[..., -1, :]
    after = (
        start,
        now.rebuilt(tuple(layers), gain),
        momentum.rebuilt(tuple(momenta), gain_momentum),
    )
    return after, jnp.swapaxes(x, 1, 2).astype(out_dtype)


class _Mix:
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


def _gradients(how: Rule, start: Weights, k, v):
    """Of the loss of each token at `start`: per matrix its input and what comes back to it.

    Returns:
        inputs `[b h c i]` and errors `[b h c o]` of each matrix, whose outer products are the
        gradients (limited already), and the gradient by gamma `[b h c v]`, or None.
    """
    phi, slope = ACTIVATIONS[how.activation]
    layers = start.layers()
    inputs, before = [k], []
    for w in layers[:-1]:
        before.append(einsum("bhci,bhoi->bhco", inputs[-1], w))
        inputs.append(phi(before[-1]))
    y = einsum("bhci,bhoi->bhco", inputs[-1], layers[-1])
    by_gamma = None
    if start.gamma is None:
        error = 2 * (y - v)
    else:
        gain = 1 + start.gamma[..., None, :]
        normed, inverse = standardised(y, how.norm_eps)
        error = 2 * (normed * gain + k - v)
        by_gamma, g = error * normed, error * gain
        error = (g - means(g) - normed * (dots(g, normed) / g.shape[-1])) * inverse
        by_gamma = by_gamma * factor(dots(by_gamma, by_gamma), how)
    errors = [error]
    for w, z in zip(layers[:0:-1], before[::-1], strict=True):
        errors.append(einsum("bhco,bhoi->bhci", errors[-1], w) * slope(z))
    errors = errors[::-1]
    if how.limit != "none":
        errors = [
            d * factor(dots(d, d) * dots(a, a), how) for d, a in zip(errors, inputs, strict=True)
        ]
    return inputs, errors, by_gamma
