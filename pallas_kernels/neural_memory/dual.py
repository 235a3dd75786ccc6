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
from pallas_kernels.neural_memory.mixing import Mix, scaled


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
    mix = Mix(alpha, eta, theta, own)
    inputs, errors, by_gamma = _gradients(how, start, k, v)
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
        gains = mix.weights[..., None] * gain[..., None, :]
        gains = gains + mix.momentum[..., None] * gain_momentum[..., None, :]
        gains = gains - einsum("bhcj,bhjv->bhcv", mix.gradients, by_gamma)
        x = standardised(x, how.norm_eps)[0] * (1 + gains) + q
        gain_momentum = mix.keep_momentum[..., 0] * gain_momentum - einsum(
            "bhc,bhcv->bhv", mix.momenta_of_last, by_gamma
        )
        gain = gains[..., -1, :]
    after = (
        start,
        now.rebuilt(tuple(layers), gain),
        momentum.rebuilt(tuple(momenta), gain_momentum),
    )
    return after, jnp.swapaxes(x, 1, 2).astype(out_dtype)


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
