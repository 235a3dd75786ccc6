"""Rows read block by block, for rules that count from each document's start.

neural_memory takes its gradients at the weights of every n-th token, MAC attends within segments. A
row that is one document from its start is cut into blocks of fixed length, each of which is
computed at once; so is a single token of a stream. windows.py has all other rows.

The forward pass keeps what is carried at the start of every `span` blocks and nothing else; the
backward pass runs a span's blocks again, the last one first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


class Parts(NamedTuple):
    """How rows are cut.

    Attributes:
        place: int32 `[b t]`, tokens of its document before each token; None = its number in the
            row.
        part: int32 `[b t]`, the part of its block that a token is in, -1 = there is no token;
            None = each block is one part.
    """

    place: jax.Array | None
    part: jax.Array | None


def places(
    segment_ids: jax.Array | None, count: jax.Array, last_id: jax.Array, t: int
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Where tokens stand in their documents.

    Args:
        segment_ids: int32 `[b t]`, 0 = padding; None = the stream stays in its document.
        count: int32 `[b]`, tokens that the stream has read of its document.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
        t: tokens, at least 1.

    Returns:
        int32 `[b t]`, tokens of the document before each one (any number at padding); bool `[b t]`,
        where there is a token, None = everywhere; count and last_id after the last token.
    """
    if segment_ids is None:
        return count[:, None] + jnp.arange(t, dtype=jnp.int32), None, count + t, last_id
    reset, valid, last_id = boundaries(segment_ids, last_id)
    place = count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    place = place - jax.lax.cummax(jnp.where(reset, place, 0), axis=1)
    return place, valid, place[:, -1] + valid[:, -1], last_id


def cut(place: jax.Array, valid: jax.Array | None, block: int, every: int) -> Parts:
    """Parts of blocks: a new one begins wherever place is a multiple of `every`."""
    valid = jnp.ones(place.shape, bool) if valid is None else valid
    place, valid = (_blocks(x, block) for x in (place, valid))  # [n b c], filled up with False
    begins = valid & (place % every == 0)
    number = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
    first = jnp.min(jnp.where(valid, number, place.shape[-1]), axis=-1, keepdims=True)
    return Parts(_rows(place), _rows(jnp.where(valid, number - first, -1)))


def over_parts(
    rule: Callable,
    how: Any,
    params: Any,
    carry: Any,
    inputs: tuple[jax.Array, ...],
    parts: Parts,
    *,
    block: int,
    span: int = 1,
    kept: Callable = lambda carry: carry,
    regained: Callable = lambda kept: kept,
) -> tuple[Any, Any]:
    """Runs `rule(how, params, carry, tokens, mine, place) -> (carry, y)` over all blocks in order.

    Args:
        rule: a function of a module (hashable). It gets the tokens of a block, of which those
            that are there are `mine` (bool `[b c]`, None = all), with their `place` `[b c]`. Rows
            without such a token must come out as they went in. y is a tree of arrays `[b c ...]`,
            of which only what is `mine` is taken.
        how: static, hashable, for the rule.
        params: tree of arrays that all blocks share.
        carry: tree of floating-point arrays.
        inputs: arrays `[b t ...]`.
        parts: from `cut`, of calls of one token; places and parts of None are one document from
            its start.
        block: tokens per block.
        span: blocks per carry that is kept.
        kept: what of the carry at the start of a block has to be kept.
        regained: makes a carry of that; what was not kept must not matter to the rule.

    Returns:
        The last carry and y, arrays `[b t ...]`, 0 where there is no token. Differentiable in
        params, carry and inputs.
    """
    t = inputs[0].shape[1]
    n = -(-t // block)
    span = min(span, n)
    fill = -t % (block * span)
    if parts.part is None and fill:  # tokens that are not there are nobody's
        here = jnp.arange(t + fill) < t
        parts = Parts(
            None, jnp.broadcast_to(jnp.where(here, 0, -1), (inputs[0].shape[0], t + fill))
        )
    more = lambda x, with_: jnp.pad(
        x, [(0, (t + fill - x.shape[1]) * (i == 1)) for i in range(x.ndim)], constant_values=with_
    )
    place = None if parts.place is None else more(parts.place, 0)
    part = None if parts.part is None else more(parts.part, -1)
    form = (rule, how, block, span, kept, regained)
    carry, y = _over_parts(form, params, carry, tuple(more(x, 0) for x in inputs), place, part)
    return carry, jax.tree.map(lambda x: x[:, :t], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_parts(form, params, carry, inputs, place, part):
    return _forward(form, params, carry, inputs, place, part)[0]


def _forward(form, params, carry, inputs, place, part):
    *_, kept, regained = form

    def one_span(carry, x):
        after, y = jax.lax.scan(lambda c, x: _block(form, params, c, x), carry, x)
        return after, (y, kept(carry))

    xs = _by_span(form, inputs, place, part)
    last, (y, starts) = jax.lax.scan(one_span, carry, xs)
    return (last, _from_spans(y)), (params, starts, inputs, place, part)


def _backward(form, residuals, cotangents):
    params, starts, inputs, place, part = residuals
    dlast, dy = cotangents
    *_, span, kept, regained = form

    def one_span(carry, x):
        start, xs, dy = x
        start = regained(start)
        if span == 1:
            starts = jax.tree.map(lambda a: a[None], start)
        else:
            keep = lambda c, x: (_block(form, params, c, x)[0], c)
            _, starts = jax.lax.scan(keep, start, xs)

        def one_block(carry, x):
            dparams, dcarry = carry
            more, dcarry, dinputs = _block_backward(form, params, dcarry, *x)
            return (jax.tree.map(jnp.add, dparams, more), dcarry), dinputs

        return jax.lax.scan(one_block, carry, (starts, xs, dy), reverse=True)

    zeros = jax.tree.map(jnp.zeros_like, params)
    xs = _by_span(form, inputs, place, part)
    dy = jax.tree.map(lambda x: _to_spans(x, form), dy)
    (dparams, dcarry), dinputs = jax.lax.scan(
        one_span, (zeros, dlast), (starts, xs, dy), reverse=True
    )
    return dparams, dcarry, _from_spans(dinputs), None, None


_over_parts.defvjp(_forward, _backward)


# --- A block ------------------------------------------------------------------------------------


def _block(form, params, carry, x):
    """The carry after a block, and y."""
    rule, how, *_ = form
    tokens, place, part = x
    mine = None if part is None else part == 0
    carry, y = rule(how, params, carry, tokens, mine, place)
    return carry, y if mine is None else jax.tree.map(lambda a: _where(mine, a, 0), y)


def _block_backward(form, params, dcarry, start, x, dy):
    """Gradients by params, by the carry before the block, and by its tokens."""
    rule, how, *_ = form
    tokens, place, part = x
    mine = None if part is None else part == 0
    run = lambda params, carry, tokens: rule(how, params, carry, tokens, mine, place)
    _, back = jax.vjp(run, params, start, tokens)
    return back((dcarry, dy if mine is None else jax.tree.map(lambda a: _where(mine, a, 0), dy)))


# --- Shapes -------------------------------------------------------------------------------------


def _where(mask, a, b):
    """a where the `[b c]` mask is true, else b."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, b)


def _blocks(x, block: int):
    """`[b t ...]` as `[n b c ...]`, filled up with zeros."""
    b, t, *rest = x.shape
    x = jnp.pad(x, [(0, (-t % block) * (i == 1)) for i in range(x.ndim)])
    return jnp.swapaxes(x.reshape(b, -1, block, *rest), 0, 1)


def _rows(x):
    """`[n b c ...]` as `[b t ...]`."""
    n, b, c, *rest = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(b, n * c, *rest)


def _to_spans(x, form):
    """`[b t ...]` as `[n/span span b c ...]`."""
    _, _, block, span, *_ = form
    x = _blocks(x, block)
    return x.reshape(-1, span, *x.shape[1:])


def _by_span(form, inputs, place, part):
    return jax.tree.map(lambda x: _to_spans(x, form), (inputs, place, part))


def _from_spans(tree):
    return jax.tree.map(lambda x: _rows(x.reshape(-1, *x.shape[2:])), tree)
