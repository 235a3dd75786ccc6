"""The past of every level in rings: a token overwrites the oldest one, and nothing is moved.

Level i looks back (w - 1) * dilation_i tokens and has as many slots; the rings of all levels lie
end to end in one array `[b s e]`. Token n of a document (from 0) lies in slot n mod slots. Slots
that the document has not reached are never looked at.
"""

import jax
import jax.numpy as jnp


def places(taps: int, dilations: tuple[int, ...]) -> list[slice]:
    """Where each level's slots lie."""
    found, end = [], 0
    for dilation in dilations:
        found.append(slice(end, end + (taps - 1) * dilation))
        end = found[-1].stop
    return found


def seen_lags(ring, count, lags):
    """What lay `lags` tokens before the next one: `[b m e]`, 0 from before the document's start.

    Args:
        ring: `[b s e]` of one level.
        count: int32 `[b]`, tokens of the document so far.
        lags: int32 `[m]`, each 1 .. s.
    """
    if ring.shape[1] == 0:
        return ring
    places = count[:, None] - lags
    found = jnp.take_along_axis(ring, (places % ring.shape[1])[..., None], axis=1)
    return jnp.where((places >= 0)[..., None], found, 0)


def write(ring, count, value, valid):
    """Puts `[b e]` into the slot of the next token, where there is one (valid `[b]`)."""
    slots = ring.shape[1]
    if slots == 0:
        return ring
    rows = jnp.arange(ring.shape[0])
    at = jnp.where(valid, count % slots, slots)  # outside: dropped
    return ring.at[rows, at].set(value, mode="drop")


def after(ring, s, count, end, held, reset):
    """The ring of a level after a call of many tokens.

    Args:
        ring: `[b n e]`, before the call.
        s: `[b t e]`, the inputs of the level in the call.
        count: int32 `[b]`, tokens of the document after the call.
        end: int32 `[b]`, place of the last token in the call.
        held: int32 `[b]`, how many of the document's tokens lie in the call.
        reset: bool `[b]`, the document began in the call: nothing older remains.
    """
    slots = ring.shape[1]
    if slots == 0:
        return ring
    last = (count - 1)[:, None]
    age = (last - jnp.arange(slots)) % slots  # of the newest token that each slot can hold
    new = (age < held[:, None]) & (age <= last)
    place = jnp.clip(end[:, None] - age, 0, s.shape[1] - 1)
    found = jnp.take_along_axis(s, place[..., None], axis=1)
    old = jnp.where(reset[:, None, None], 0, ring)
    return jnp.where(new[..., None], found, old)


def from_last(ring, last, count, some, reset):
    """The ring of a level after a call, from the last inputs of the level.

    Args:
        ring: `[b s e]`, before the call.
        last: `[b s e]`, oldest first, those before the call among them.
        count: int32 `[b]`, tokens of the document after the call.
        some: bool `[b]`, there were tokens in the call.
        reset: bool `[b]`, the document began in the call.
    """
    slots = ring.shape[1]
    if slots == 0:
        return ring
    newest = (count - 1)[:, None]
    age = (newest - jnp.arange(slots)) % slots
    old = jnp.where(reset[:, None, None], 0, ring)
    return jnp.where(((age <= newest) & some[:, None])[..., None], turned(last, -count), old)


def in_order(ring, count):
    """The inputs that a ring holds, `[b s e]`, oldest first; 0 before the document's start."""
    slots = ring.shape[1]
    if slots == 0:
        return ring
    there = count[:, None] - slots + jnp.arange(slots) >= 0
    return jnp.where(there[..., None], turned(ring, count), 0)


def turned(x, by):
    """Rows `[b s ...]`, each turned back by its own int32 `[b]`: place 0 holds that of `by`.

    Two copies one after the other, row by row: on a TPU a gather moves less at a time.
    """
    size = x.shape[1]

    def row(one):
        x, by = one
        return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x]), by % size, size)

    return jax.lax.map(row, (x, by))
