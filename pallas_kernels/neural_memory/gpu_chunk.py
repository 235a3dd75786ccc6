"""The closed form of one head and one block as the GPU kernels trace it: dual.py on tiles.

Every matrix is 64 x 64 here and every vector a column `[64 1]` or a row `[1 64]`, filled up with
zeros; a number is a row that repeats it. Products keep one of three forms (tpu_products.py), and
the hidden units of a block of threads are `slice` of several: what is summed over hidden units is
summed over the blocks by `across`. gpu_plan.py and gpu_machine.py run what is traced here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from pallas_kernels.neural_memory.memory import TINY, Rule, Weights
from pallas_kernels.neural_memory.tpu_products import product

SIZE = 64
dot = functools.partial(product, narrow=False)


class Form(NamedTuple):
    """What is static in the traced function.

    Attributes:
        how: settings of the memory.
        width: columns of v that are there.
        blocks: blocks of threads that share the hidden units; 1 for a linear memory.
    """

    how: Rule
    width: int
    blocks: int


class Tokens(NamedTuple):
    """q, k, v `[c 64]`, alpha, eta, theta and what counts (1 or 0) `[1 c]`; or where they lie."""

    q: Any
    k: Any
    v: Any
    alpha: Any
    eta: Any
    theta: Any
    own: Any


def read_and_write(form: Form, start: Weights, now: Weights, momentum: Weights, tokens: Tokens):
    """y `[c 64]`, and weights and momentum after the tokens that count.

    Args:
        form: what is static.
        start: weights that gradients are taken at.
        now, momentum: before the first token.
        tokens: of one block.
    """
    mix = _mixed(tokens)
    found = _gradients(form, start, tokens.k, tokens.v)
    y = _read(form, mix, now, momentum, tokens.q, found)
    return (y * turned(tokens.own), *_written(mix, now, momentum, found))


def write(form: Form, start: Weights, now: Weights, momentum: Weights, tokens: Tokens):
    """The weights and momentum after the tokens that count; q is not looked at."""
    found = _gradients(form, start, tokens.k, tokens.v)
    return _written(_mixed(tokens), now, momentum, found)


# --- The network ---------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Gradients of the tokens: what goes into each matrix, and what comes back to it."""

    inputs: list[jax.Array]
    errors: list[jax.Array]
    by_gamma: Any  # None without gamma


def _gradients(form: Form, start: Weights, k, v) -> _Found:
    how = form.how
    inputs, before = [k], None
    if start.w_in is not None:
        before = dot("nt", k, start.w_in)
        inputs.append(activation(how.activation, before))
    y = across(form, dot("nt", inputs[-1], start.w_out))
    by_gamma = None
    if start.gamma is None:
        error = 2 * (y - v)
    else:
        gain = 1 + start.gamma
        normed, inverse = _standardised(form, y)
        error = 2 * (normed * gain + k - v)
        by_gamma, g = error * normed, error * gain
        error = _there(form, g - _mean(form, g) - normed * _mean(form, g * normed)) * inverse
        by_gamma = by_gamma * _factor(_sum(by_gamma * by_gamma), how)
    if before is None and how.limit != "none":
        error = error * _factor(_sum(error * error) * _sum(k * k), how)
    if before is None:
        return _Found(inputs, [error], by_gamma)
    hidden = dot("nn", error, start.w_out) * slope(how.activation, before)
    if how.limit != "none":
        squares = across(form, _sum(inputs[-1] * inputs[-1])), across(form, _sum(hidden * hidden))
        error = error * _factor(_sum(error * error) * squares[0], how)
        hidden = hidden * _factor(squares[1] * _sum(k * k), how)
    return _Found(inputs, [hidden, error], by_gamma)


def _written(mix: "Mix", now: Weights, momentum: Weights, found: _Found):
    by, by_momentum = turned(mix.last), turned(mix.momenta_of_last)
    keep = lambda w, s: mix.keep_weights * w + mix.add_momentum * s
    fade = lambda s: mix.keep_momentum * s
    last, error = found.inputs[-1], found.errors[-1]
    w_out = keep(now.w_out, momentum.w_out) - dot("tn", by * error, last)
    s_out = fade(momentum.w_out) - dot("tn", by_momentum * error, last)
    w_in = s_in = gamma = s_gamma = None
    if now.w_in is not None:
        first, error = found.inputs[0], found.errors[0]
        w_in = keep(now.w_in, momentum.w_in) - dot("tn", by * error, first)
        s_in = fade(momentum.w_in) - dot("tn", by_momentum * error, first)
    if now.gamma is not None:
        gamma = keep(now.gamma, momentum.gamma) - _over_tokens(by * found.by_gamma)
        s_gamma = fade(momentum.gamma) - _over_tokens(by_momentum * found.by_gamma)
    return Weights(w_out, w_in, None, gamma), Weights(s_out, s_in, None, s_gamma)


def _read(form: Form, mix: "Mix", now: Weights, momentum: Weights, q, found: _Found):
    def layer(x, w, s, inputs, error):
        y = mix.weights * dot("nt", x, w) + mix.momentum * dot("nt", x, s)
        return y - dot("nn", mix.gradients * dot("nt", x, inputs), error)

    x = q
    if now.w_in is not None:
        z = layer(x, now.w_in, momentum.w_in, found.inputs[0], found.errors[0])
        x = activation(form.how.activation, z)
    y = layer(x, now.w_out, momentum.w_out, found.inputs[-1], found.errors[-1])
    y = across(form, y)
    if now.gamma is None:
        return y
    gains = mix.weights * now.gamma + mix.momentum * momentum.gamma
    gains = gains - dot("nn", mix.gradients, found.by_gamma)
    return _standardised(form, y)[0] * (1 + gains) + q


def _standardised(form: Form, x):
    x = _there(form, x - _mean(form, x))
    inverse = jax.lax.rsqrt(_mean(form, x * x) + form.how.norm_eps)
    return x * inverse, inverse


def _factor(square, how: Rule):
    """memory.factor; its maximum is a choice, whose slope is 0 or 1."""
    if how.limit == "none":
        return 1.0
    if how.detach_norm:
        square = jax.lax.stop_gradient(square)
    if how.limit == "clip":
        most = how.max_norm**2
        return how.max_norm * jax.lax.rsqrt(jnp.where(square > most, square, most))
    return how.max_norm * jax.lax.rsqrt(square + TINY**2)


def _there(form: Form, x):
    """0 in the columns that fill up."""
    return x if form.width == SIZE else jnp.where(_indices()[1] < form.width, x, 0)


def _sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _mean(form: Form, x):
    return _sum(x) * (1 / form.width)


def _over_tokens(x):
    return jnp.sum(x, axis=0, keepdims=True)


# --- phi -----------------------------------------------------------------------------------------


def activation(name: str, x):
    if name == "silu":
        return x * _sigmoid(x)
    return 0.5 * x * (1 + _erf(x * 2**-0.5))


def slope(name: str, x):
    if name == "silu":
        s = _sigmoid(x)
        return s * (1 + x * (1 - s))
    return 0.5 * (1 + _erf(x * 2**-0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


# erf(x) / x as a ratio of polynomials in x^2, to the last digit of float32, as XLA has it.
_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


@jax.custom_vjp
def _erf(x):
    """There is none in a Mosaic GPU body."""
    x = jnp.where(x > 4.0, 4.0, jnp.where(x < -4.0, -4.0, x))
    w = x * x
    above, below = (
        functools.reduce(lambda sum_, c: sum_ * w + c, by[1:], by[0]) for by in (_ABOVE, _BELOW)
    )
    return x * above / below


_erf.defvjp(lambda x: (_erf(x), x), lambda x, d: (d * (2 * jnp.pi**-0.5) * jnp.exp(-x * x),))


# --- Shares --------------------------------------------------------------------------------------


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


def _mixed(tokens: Tokens) -> Mix:
    """The momentum is not added to the weights at tokens that do not count."""
    own = tokens.own
    alpha, theta = jnp.where(own > 0, tokens.alpha, 0), jnp.where(own > 0, tokens.theta, 0)
    eta = jnp.where(own > 0, tokens.eta, 1)
    forgets, weights = _products(1 - alpha)
    fades, fade = _products(eta)
    here = turned(own)
    gradients = dot("nn", forgets, here * fades) * theta
    momentum = _sum(forgets * turned(here * fade))
    return Mix(
        weights,
        momentum,
        gradients,
        _last_row(gradients),
        _last(weights),
        _last(momentum),
        _last(fade),
        _last_row(fades) * theta,
    )


def _indices():
    t = jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 0)
    return t, jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 1)


def _wide(x):
    return jnp.broadcast_to(x, (SIZE, SIZE))


_turn_p = Primitive("turn")
_turn_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[::-1], x.dtype))
_turn_p.def_impl(jnp.transpose)


@jax.custom_vjp
def turned(x):
    """A row as a column, or a column as a row: the same numbers in memory."""
    return _turn_p.bind(x)


turned.defvjp(lambda x: (turned(x), None), lambda _, d: (turned(d),))


def _last_row(x):
    return _over_tokens(jnp.where(_indices()[0] == SIZE - 1, x, 0))


def _last(x):
    """The last of a column, as a number."""
    return _last_row(_wide(x))


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
    dx = _sum(before * dot("tn", stretches, dstretches))
    return (turned(dx + whole * turned(_over_tokens(stretches * dwhole))),)


_products.defvjp(_products_forward, _products_backward)


def _up_to(x, *, strictly: bool):
    """Columns: sums of logarithms up to each token (or before it), and how many factors are 0."""
    t, s = _indices()
    zero = x <= 0
    each = jnp.log(jnp.where(zero, 1, x)), jnp.where(zero, 1.0, 0.0)
    return tuple(_sum(jnp.where(s < t if strictly else s <= t, _wide(a), 0)) for a in each)


def _stretches(upper, lower, *, strictly: bool):
    """exp(upper_t - lower_s), 0 where a factor of 0 lies between; and exp(upper_t)."""
    t, s = _indices()
    along = [_wide(turned(x)) for x in lower]
    inside = (s < t if strictly else s <= t) & (_wide(upper[1]) == along[1])
    found = jnp.exp(jnp.where(inside, _wide(upper[0]) - along[0], -1e4))
    return found, jnp.exp(jnp.where(upper[1] > 0, -1e4, upper[0]))


# --- Sums over the blocks of a cluster -----------------------------------------------------------

_across_p = Primitive("across")
_across_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
_across_p.def_impl(lambda x: x)  # of one block


@jax.custom_vjp
def _across(x):
    return _across_p.bind(x)


# Each block has a share of what depends on the sum, so its gradient is a sum as well.
_across.defvjp(lambda x: (_across(x), None), lambda _, d: (_across(d),))


def across(form: Form, x):
    """The sum over the blocks that share the hidden units."""
    return x if form.blocks == 1 else _across(x)
