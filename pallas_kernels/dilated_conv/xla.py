"""dilated_conv as shifted adds: documents and state; stack.py and level.py have the sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries
from pallas_kernels.dilated_conv import reference
from pallas_kernels.dilated_conv import ring as rings
from pallas_kernels.dilated_conv.stack import Sights, Stack, in_parts, one_level


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(
    x,
    weight,
    bias,
    ring,
    count,
    last_id,
    segment_ids,
    *,
    config,
    dilations,
    activation,
    symmetric,
    fresh,
):
    """See `dilated_conv`; gives y, ring, count, last_id (symmetric: y alone)."""
    b, t, e = x.shape
    dtype, out_dtype = ring.dtype, x.dtype
    stack = Stack(dilations, activation, symmetric)
    if t == 1 and not symmetric:  # one token of a stream: its definition is the fast form
        return reference.run(
            x, weight, bias, ring, count, last_id, segment_ids,
            config=config, fresh=fresh, **stack._asdict(),
        )  # fmt: skip
    weight = weight.astype(dtype)
    bias = jnp.zeros((len(weight), e), dtype) if bias is None else bias.astype(dtype)
    call = after_call(x, count, last_id, segment_ids)
    sights, first, end, held, reset = call.sights, call.first, call.end, call.held, call.reset
    before, count, last_id = count, call.count, call.last_id
    if sights is not None:
        x = jnp.where(sights.valid[..., None], x, 0)

    y = in_parts(x, weight, bias, sights, stack) if fresh else None
    if symmetric:
        return y
    # Of a fresh call this is for the state alone: nothing is computed where nobody wants it.
    s, taps, new = x.astype(dtype), weight.shape[1], []
    for i, at in enumerate(rings.places(taps, dilations)):
        new.append(rings.after(ring[:, at], s, count, end, held, reset))
        past = None
        if not fresh:
            past = rings.seen_lags(
                ring[:, at], before, jnp.arange((taps - 1) * dilations[i], 0, -1)
            )
        if not fresh or i + 1 < len(dilations):
            s = one_level(s, i, weight, bias, sights, stack, past, first)
    y = s.astype(out_dtype) if y is None else y
    return y, jnp.concatenate(new, axis=1), count, last_id


class Call(NamedTuple):
    """Where the tokens of a call lie, int32 `[b]`, and what a state says after it.

    Attributes:
        sights: see Sights; None = one document.
        first, end: places of the first and the last token.
        held: tokens of the last document that lie in the call.
        reset: bool, it began in the call.
        count: its tokens so far.
        last_id: its id.
    """

    sights: Sights | None
    first: jax.Array
    end: jax.Array
    held: jax.Array
    reset: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def after_call(x, count, last_id, segment_ids) -> Call:
    """The Call of x `[b t e]`; count and last_id as before it."""
    b, t, _ = x.shape
    first = jnp.zeros((b,), jnp.int32)
    if segment_ids is None:
        return Call(None, first, first + (t - 1), first + t, first > 0, count + t, last_id)
    starts, valid, last_id = boundaries(segment_ids, last_id)
    behind, ahead = sights_of(segment_ids, starts, valid, count)
    places = jnp.arange(t, dtype=jnp.int32)
    first = jnp.min(jnp.where(valid, places, t), axis=1)
    end = jnp.max(jnp.where(valid, places, 0), axis=1)
    held, reset = jnp.sum(valid, axis=1, dtype=jnp.int32), jnp.any(starts, axis=1)
    newest = jnp.take_along_axis(behind, end[:, None], axis=1)[:, 0]
    count = jnp.where(held > 0, newest + 1, count)
    held = jnp.where(reset, count, held)
    return Call(Sights(behind, ahead, valid), first, end, held, reset, count, last_id)


def sights_of(segment_ids, starts, valid, count):
    """How many tokens of its document lie behind and ahead of each token, int32 `[b t]`."""
    t = segment_ids.shape[1]
    place = count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    behind = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    places = jnp.arange(t, dtype=jnp.int32)
    last = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1))) != segment_ids
    ends = jax.lax.cummin(jnp.where(last, places, t), axis=1, reverse=True)
    return behind, ends - places
