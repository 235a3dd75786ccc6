"""The closed form of one head and one block as the GPU kernels trace it: dual.py on tiles.

The hidden units of a block of threads are some of several blocks'; what is summed over hidden units
is summed over the blocks by `across`. gpu_plan.py and gpu_machine.py run what is traced here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory import gpu_tiles
from pallas_kernels.neural_memory.gpu_phi import activation, slope
from pallas_kernels.neural_memory.gpu_shares import Mix, mixed
from pallas_kernels.neural_memory.gpu_tiles import (
    SIZE,
    dot,
    indices,
    over_tokens,
    total,
    turned,
    wide,
)
from pallas_kernels.neural_memory.memory import TINY, Rule, Weights


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
    mix = mixed(*tokens[3:])
    found = _gradients(form, start, tokens.k, tokens.v)
    y = _read(form, mix, now, momentum, tokens.q, found)
    return (y * turned(tokens.own), *_written(mix, now, momentum, found))


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
        by_gamma = by_gamma * _factor(total(by_gamma * by_gamma), how)
    if before is None and how.limit != "none":
        error = error * _factor(total(error * error) * total(k * k), how)
    if before is None:
        return _Found(inputs, [error], by_gamma)
    hidden = dot("nn", error, start.w_out) * slope(how.activation, before)
    if how.limit != "none":
        squares = _two_across(form, total(inputs[-1] * inputs[-1]), total(hidden * hidden))
        error = error * _factor(total(error * error) * squares[0], how)
        hidden = hidden * _factor(squares[1] * total(k * k), how)
    return _Found(inputs, [hidden, error], by_gamma)


def _written(mix: Mix, now: Weights, momentum: Weights, found: _Found):
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
        gamma = keep(now.gamma, momentum.gamma) - over_tokens(by * found.by_gamma)
        s_gamma = fade(momentum.gamma) - over_tokens(by_momentum * found.by_gamma)
    return Weights(w_out, w_in, None, gamma), Weights(s_out, s_in, None, s_gamma)


def _read(form: Form, mix: Mix, now: Weights, momentum: Any, q, found: _Found):
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
    return x if form.width == SIZE else jnp.where(indices()[1] < form.width, x, 0)


def _mean(form: Form, x):
    return total(x) * (1 / form.width)


def across(form: Form, x):
    """The sum over the blocks that share the hidden units."""
    return gpu_tiles.across(form.blocks, x)


def _two_across(form: Form, a, b):
    """Of two columns at once, as two columns of a tile."""
    if form.blocks == 1:
        return a, b
    first, second = (indices()[1] == i for i in range(2))
    both = across(form, jnp.where(first, wide(a), jnp.where(second, wide(b), 0)))
    return tuple(total(jnp.where(which, both, 0)) for which in (first, second))
