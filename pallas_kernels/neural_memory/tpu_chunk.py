"""The closed form of one head and one chunk as a TPU kernel traces it: dual.py on matrices.

The same equations as dual.py and mixing.py, of two-dimensional arrays, out of what Mosaic lowers:
products of shares by shift and multiply, no transposes outside of matrix products. Weights lie as
products want them: `w_in` is transposed, `[k m]`, and `gamma` a row, `[1 v]`. Numbers of tokens
come as rows `[1 c]`, which is how they lie in memory without padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neural_memory.memory import Rule, Weights, factor


class Tokens(NamedTuple):
    """Of one head and chunk: q, k `[c k]` and v `[c v]` in float32, alpha, eta, theta `[1 c]`."""

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    alpha: jax.Array
    eta: jax.Array
    theta: jax.Array


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
    mix = _mix(tokens, mine)
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
    return _written(dot, _mix(tokens, mine), now, momentum, found)


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
    by_gamma: jax.Array | None


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


def _written(dot, mix: "_Mix", now: Weights, momentum: Weights, found: _Found):
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


def _read(how: Rule, dot, mix: "_Mix", now: Weights, momentum: Weights, q, found: _Found):
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


# --- Shares --------------------------------------------------------------------------------------


class _Mix(NamedTuple):
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


def _mix(tokens: Tokens, mine) -> _Mix:
    (forgets, weights), (fades, fade) = products(column(1 - tokens.alpha), column(tokens.eta))
    in_weights, own = fades, fade
    if mine is not None:  # the momentum is not added to the weights at tokens that are not there
        here = column(mine)
        in_weights, own = here * fades, here * fade
    gradients = product("nn", forgets, in_weights, narrow=False) * tokens.theta
    momentum = jnp.sum(forgets * row(own), axis=1, keepdims=True)
    return _Mix(
        weights,
        momentum,
        gradients,
        _last_row(gradients),
        _last_row(weights),
        _last_row(momentum),
        _last_row(fade),
        _last_row(fades) * tokens.theta,
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
    behind_first = jnp.sum(jnp.where(s == 0, stretches, 0.0), axis=1, keepdims=True)
    return stretches, behind_first * _over_tokens(jnp.where(_numbers(x.shape[0]) == 0, x, 0.0))


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
    return dx + before * column(_over_tokens(stretches * dwhole))


products.defvjp(_products_forward, _products_backward)


# --- Products ------------------------------------------------------------------------------------

_CONTRACTED = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


def product(form: str, a, b, exact: str = "", *, narrow: bool):
    """a b ("nn"), a b^T ("nt") or a^T b ("tn"); gradients are products of these forms, too.

    Args:
        form: which.
        a, b: float32 matrices.
        exact: "a", "b" or "ab": those came as bfloat16.
        narrow: whether operands go to the matrix unit as the sum of two bfloat16 numbers (one if
            exact): 16 bits of them, in two or three passes instead of six.
    """
    return _product(form, exact if narrow else None, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(form, exact, a, b):
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(_CONTRACTED[form], ((), ())),
        preferred_element_type=jnp.float32,
    )
    if exact is None:
        return dot(a, b, precision=jax.lax.Precision.HIGHEST)
    (a, *rest_a), (b, *rest_b) = _halves(a, "a" in exact), _halves(b, "b" in exact)
    return sum((dot(x, b) for x in rest_a), sum((dot(a, x) for x in rest_b), dot(a, b)))


def _halves(x, exact: bool):
    """A float32 matrix as a sum of bfloat16 ones."""
    if exact:
        return (x.astype(jnp.bfloat16),)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _product_forward(form, exact, a, b):
    return _product(form, exact, a, b), (a, b)


def _product_backward(form, exact, kept, dz):
    a, b = kept
    known = lambda which, place: None if exact is None else place if which in exact else ""
    if form == "nn":
        return _product("nt", known("b", "b"), dz, b), _product("tn", known("a", "a"), a, dz)
    if form == "nt":
        return _product("nn", known("b", "b"), dz, b), _product("tn", known("a", "b"), dz, a)
    return _product("nt", known("b", "a"), b, dz), _product("nn", known("a", "a"), a, dz)


_product.defvjp(_product_forward, _product_backward)
