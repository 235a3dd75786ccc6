"""A rule over chunks whose backward pass computes each chunk again, the last one first.

The forward pass keeps the state at the start of each chunk and nothing else; what a chunk needs in
between lives for one chunk only. So a rule is written once, as a function of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_chunks(rule: Callable, how: Any, inputs: tuple, s: jax.Array, plan: Plan):
    """Runs `rule(how, s, one chunk's inputs, masks) -> (s, y)` over all chunks in order.

    Args:
        rule: a function of a module (hashable, and equal from call to call) of s `[b h k v]` and
            inputs `[b h c ...]`; gives s after the chunk and y `[b h c v]`.
        how: static numbers for the rule, hashable.
        inputs: arrays `[n b h c ...]`.
        s: `[b h k v]`, with memories `[b m h k v]`.
        plan: from `chunks.plan`.

    Returns:
        y `[n b h c v]` and the last state. Differentiable in inputs and s.
    """
    return _forward(rule, how, inputs, s, plan)[0]


def _forward(rule, how, inputs, s, plan):
    def step(s, x):
        inputs, document = x
        after, y = rule(how, s, inputs, _masks(document, inputs))
        return after, (y, s)

    last, (y, starts) = chunks.carry(step, s, (inputs, plan.document), plan.memory)
    return (y, last), (inputs, starts, plan)


def _backward(rule, how, residuals, cotangents):
    inputs, starts, plan = residuals
    dy, ds = cotangents

    def step(ds, x):
        inputs, s, dy, document = x
        _, pull = jax.vjp(
            lambda s, inputs: rule(how, s, inputs, _masks(document, inputs)), s, inputs
        )
        return pull((ds, dy))

    backward = (inputs, starts, dy, plan.document)
    ds, dinputs = chunks.carry(step, ds, backward, plan.memory, reverse=True)
    return dinputs, ds, None


over_chunks.defvjp(_forward, _backward)


def _masks(document: jax.Array | None, inputs: tuple) -> Masks:
    """Of one chunk, from its `[b c]`; where there is no token, inputs are 0 already."""
    c = inputs[0].shape[2]
    if document is None:
        return Masks(chunks.sees(Plan(None, None, None), c), None, None, None)
    plan = Plan(None, document[None], None)
    parts = (chunks.sees(plan, c), chunks.sees_start(plan), chunks.reaches_end(plan))
    return Masks(*(x[0] for x in (*parts, chunks.start_reaches_end(plan))))
