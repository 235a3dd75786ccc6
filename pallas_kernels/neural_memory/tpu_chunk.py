"""The closed form of one head and one chunk as a TPU kernel traces it: dual.py on matrices.

The same equations as dual.py and mixing.py, of two-dimensional arrays, out of what Mosaic lowers:
products of shares by shift and multiply, no transposes outside of matrix products. Weights lie as
products want them: `w_in` is transposed, `[k m]`, and `gamma` a row, `[1 v]`. Numbers of tokens
come as rows `[1 c]`, which is how they lie in memory without padding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.memory import Rule, Weights, factor
from pallas_kernels.neural_memory.tpu_products import product
from pallas_kernels.neural_memory.tpu_shares import Mix, column, mixed


class Tokens(NamedTuple):
    """Of one head and chunk: q, k `[c k]` and v `[c v]` in float32, alpha, eta, theta `[1 c]`.

    Or their shapes, or views of them in memory.
    """

    q: Any
    k: Any
    v: Any
    alpha: Any
    eta: Any
    theta: Any


def read_and_write(how: Rule, narrow: bool, start, now, momentum, tokens: Tokens, mine=None):
    """y `[c v]` and the weights and momentum after the tokens.

    Args:
        how: static settings.
        narrow: whether products take bfloat16 (and add up in float32).
        start: weights that gradients are taken at.
        now, momentum: before the first token.
        tokens: of which those that are `mine` count.
        mine: 1 or 0 in float32 `[1 c]`; None = all.
    """
    dot = functools.partial(product, narrow=narrow)
    if mine is not None:
        tokens = _masked(tokens, mine)
    mix = mixed(*tokens[3:], mine)
    found = _gradients(how, dot, start, tokens.k, tokens.v)
    after = _written(dot, mix, now, momentum, found)
    y = _read(how, dot, mix, now, momentum, tokens.q, found)
    return *after, y if mine is None else jnp.where(column(mine) > 0, y, 0)


def write(how: Rule, narrow: bool, start, now, momentum, tokens: Tokens, mine=None):
    """The weights and momentum after the tokens; q is not looked at."""
    dot = functools.partial(product, narrow=narrow)
    if mine is not None:
        tokens = _masked(tokens, mine)
    found = _gradients(how, dot, start, tokens.k, tokens.v)
    return _written(dot, mixed(*tokens[3:], mine), now, momentum, found)


def _masked(tokens: Tokens, mine) -> Tokens:
    """Tokens that are not there are 0; they forget nothing, keep the momentum, make no step."""
    here = column(mine) > 0
    q, k, v = (None if x is None else jnp.where(here, x, 0) for x in tokens[:3])
    alpha, eta, theta = (
        jnp.where(mine > 0, x, otherwise)
        for x, otherwise in zip(tokens[3:], (0, 1, 0), strict=True)
    )
    return Tokens(q, k, v, alpha, eta, theta)


# --- The network ---------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Gradients of the chunk's tokens: what goes into each matrix, and what comes back to it."""

    inputs: list[jax.Array]
    errors: list[jax.Array]
    by_gamma: Any  # None without gamma


def _gradients(how: Rule, dot, start: Weights, k, v) -> _Found:
    inputs, before = [k], None
    if start.w_in is not None:
        before = dot("nn", k, start.w_in, "a")
        inputs.append(activation(how.activation, before))
    y = dot("nt", inputs[-1], start.w_out)
    by_gamma = None
    if start.gamma is None:
        error = 2 * (y - v)
    else:
        gain = 1 + start.gamma
        normed, inverse = _standardised(y, how.norm_eps)
        error = 2 * (normed * gain + k - v)
        by_gamma, g = error * normed, error * gain
        error = (g - _mean(g) - normed * _mean(g * normed)) * inverse
        by_gamma = by_gamma * factor(_sum(by_gamma * by_gamma), how)
    errors = [error]
    if before is not None:
        errors = [dot("nn", error, start.w_out) * slope(how.activation, before), error]
    if how.limit != "none":
        errors = [
            d * factor(_sum(d * d) * _sum(a * a), how) for d, a in zip(errors, inputs, strict=True)
        ]
    return _Found(inputs, errors, by_gamma)


def _written(dot, mix: Mix, now: Weights, momentum: Any, found: _Found):
    by, by_momentum = column(mix.last), column(mix.momenta_of_last)
    (first, *_), (first_error, *_) = found.inputs, found.errors
    keep = lambda w, s: mix.keep_weights * w + mix.add_momentum * s
    last, last_error = found.inputs[-1], found.errors[-1]
    w_out = keep(now.w_out, momentum.w_out) - dot("tn", by * last_error, last)
    s_out = mix.keep_momentum * momentum.w_out - dot("tn", by_momentum * last_error, last)
    w_in = s_in = gamma = s_gamma = None
    if now.w_in is not None:
        w_in = keep(now.w_in, momentum.w_in) - dot("tn", first, by * first_error, "a")
        s_in = mix.keep_momentum * momentum.w_in - dot("tn", first, by_momentum * first_error, "a")
    if now.gamma is not None:
        gamma = keep(now.gamma, momentum.gamma) - _over_tokens(by * found.by_gamma)
        s_gamma = mix.keep_momentum * momentum.gamma - _over_tokens(by_momentum * found.by_gamma)
    return Weights(w_out, w_in, None, gamma), Weights(s_out, s_in, None, s_gamma)


def _read(how: Rule, dot, mix: Mix, now: Weights, momentum: Any, q, found: _Found):
    x = q
    if now.w_in is not None:
        z = mix.weights * dot("nn", x, now.w_in, "a")
        z = z + mix.momentum * dot("nn", x, momentum.w_in, "a")
        z = z - dot("nn", mix.gradients * dot("nt", x, found.inputs[0], "ab"), found.errors[0])
        x = activation(how.activation, z)
    y = mix.weights * dot("nt", x, now.w_out) + mix.momentum * dot("nt", x, momentum.w_out)
    y = y - dot("nn", mix.gradients * dot("nt", x, found.inputs[-1]), found.errors[-1])
    if now.gamma is None:
        return y
    gains = mix.weights * now.gamma + mix.momentum * momentum.gamma
    gains = gains - dot("nn", mix.gradients, found.by_gamma)
    return _standardised(y, how.norm_eps)[0] * (1 + gains) + q


def _standardised(x, eps: float):
    x = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(x * x) + eps)
    return x * inverse, inverse


def _sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _mean(x):
    return _sum(x) * (1 / x.shape[1])


def _over_tokens(x):
    return jnp.sum(x, axis=0, keepdims=True)


def activation(name: str, x):
    if name == "silu":
        return x * jax.nn.sigmoid(x)
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


def slope(name: str, x):
    if name == "silu":
        s = jax.nn.sigmoid(x)
        return s * (1 + x * (1 - s))
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
