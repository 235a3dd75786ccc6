"""A rule over chunks whose backward pass computes each chunk again, the last one first.

The forward pass keeps the state at the start of each chunk and nothing else; what a chunk needs in
between lives for one chunk only. So a rule is written once, as a function of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks
from pallas_kernels.core.chunks import Plan


class Masks(NamedTuple):
    """Who sees whom in one chunk of c tokens; None = everybody.

    Attributes:
        pairs: token i sees token j, `[b 1 c c]` or `[c c]`.
        start: token i sees the state before the chunk, `[b 1 c]`.
        end: the state after the chunk sees token j, `[b 1 c]`.
        through: the state before lives on in the state after, `[b 1]`.
    """

    pairs: jax.Array
    start: jax.Array | None
    end: jax.Array | None
    through: jax.Array | None


def over_chunks(
    rule: Callable, how: Any, inputs: tuple, s: jax.Array, plan: Plan, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Runs `rule(how, s, one chunk's inputs, masks) -> (s, y)` over all chunks in order.

    Args:
        rule: a function of a module (hashable, and equal from call to call) of s `[b h k v]` and
            inputs `[b h c ...]`, 0 where there is no token; gives s after the chunk and y
            `[b h c v]`.
        how: static numbers for the rule, hashable.
        inputs: arrays `[b t h ...]`.
        s: `[b h k v]`, with memories `[b m h k v]`.
        plan: from `chunks.plan`.
        chunk: tokens per chunk.

    Returns:
        y `[b t h v]`, 0 where there is no token, and the last state. Differentiable in inputs and
        s.
    """
    t = inputs[0].shape[1]
    fill = lambda x: jnp.pad(x, [(0, -t % chunk * (i == 1)) for i in range(x.ndim)])
    y, s = _over_chunks(rule, how, chunk, tuple(map(fill, inputs)), s, plan)
    return y[:, :t], s


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _over_chunks(rule, how, chunk, inputs, s, plan):
    return _forward(rule, how, chunk, inputs, s, plan)[0]


def _forward(rule, how, chunk, inputs, s, plan):
    def step(s, x):
        i, valid, document = x
        after, y = rule(how, s, _cut(inputs, i, chunk, valid), _masks(document, chunk))
        return after, (_uncut(y, valid), s)

    last, (y, starts) = chunks.carry(step, s, _numbered(inputs, chunk, plan), plan.memory)
    return (_join(y), last), (inputs, starts, plan)


def _backward(rule, how, chunk, residuals, cotangents):
    inputs, starts, plan = residuals
    dy, ds = cotangents

    def step(ds, x):
        s, (i, valid, document) = x
        run = functools.partial(rule, how, masks=_masks(document, chunk))
        _, pull = jax.vjp(run, s, _cut(inputs, i, chunk, valid))
        ds, dinputs = pull((ds, *_cut((dy,), i, chunk, valid)))
        return ds, tuple(_uncut(x, valid) for x in dinputs)

    x = (starts, _numbered(inputs, chunk, plan))
    ds, dinputs = chunks.carry(step, ds, x, plan.memory, reverse=True)
    return tuple(map(_join, dinputs)), ds, None


_over_chunks.defvjp(_forward, _backward)


def _numbered(inputs: tuple, chunk: int, plan: Plan) -> tuple:
    """What a step is told of its chunk: its number, where there are tokens, its documents."""
    return jnp.arange(inputs[0].shape[1] // chunk), plan.valid, plan.document


def _cut(arrays: tuple, i: jax.Array, chunk: int, valid: jax.Array | None) -> tuple:
    """Chunk i of `[b t h ...]` arrays as `[b h c ...]`; 0 where there is no token.

    Cut out of the whole array and turned around then: turning the whole would be one more copy.
    """
    parts = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in arrays)
    return tuple(jnp.swapaxes(_tokens(x, valid), 1, 2) for x in parts)


def _uncut(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`[b h c ...]` as `[b c h ...]`, 0 where there is no token."""
    return _tokens(jnp.swapaxes(x, 1, 2), valid)


def _tokens(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`[b c ...]` with 0 where there is no token, whatever stands there."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)


def _join(x: jax.Array) -> jax.Array:
    """`[n b c h ...]` as `[b t h ...]`."""
    n, b, c, *rest = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(b, n * c, *rest)


def _masks(document: jax.Array | None, chunk: int) -> Masks:
    """Of one chunk, from its `[b c]`; where there is no token, inputs are 0 already."""
    if document is None:
        return Masks(chunks.sees(Plan(None, None, None), chunk), None, None, None)
    plan = Plan(None, document[None], None)
    start, end, through = (
        None if mask is None else mask[0]
        for mask in (
            chunks.sees_start(plan),
            chunks.reaches_end(plan),
            chunks.start_reaches_end(plan),
        )
    )
    return Masks(chunks.sees(plan, chunk)[0], start, end, through)
