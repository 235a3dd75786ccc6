"""Tokens sorted by memory: the sub-sequences that memories read, packed into one row of slots.

A row of slots holds one memory after the other, each memory's tokens in time order, from the start
of a block on: a block of slots belongs to one memory. How many slots there are follows from shapes
alone. Before its tokens each memory has `keep` slots for what a convolution kept of its past.

    row of t tokens     a b c d e f        memory 0 takes a c d, memory 1 takes b c f, ...
    slots               . . a c d _ | . . b c f _ | ...       . = kept from before, _ = empty

Both ways, tokens to slots and back, are gathers, and so are their gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks
from pallas_kernels.core.segments import boundaries

# Slots per block. Operators like them long; in short rows long ones would be half empty.
LONG, SHORT = 64, 16


class Documents(NamedTuple):
    """Where the documents of a call lie.

    Attributes:
        ids: int32 `[b t]`, 0 = padding.
        entry: int32 `[b]`, the document that the state is in.
        last_id: int32 `[b]`, the id to carry on.
        valid: bool `[b t]`; None = there is no padding, and one document.
    """

    ids: jax.Array
    entry: jax.Array
    last_id: jax.Array
    valid: jax.Array | None


class Slots(NamedTuple):
    """Where everything lies. Places that do not exist are numbered one past the end.

    Attributes:
        slot: int32 `[b t j]`, the slot of each of a token's j visits; s at padding.
        visit: int32 `[b s]`, the visit (token * j + which) that holds a slot; t * j where empty.
        by_memory: int32 `[b t m]`, the slot of a token in each memory; s where it does not go.
        memory: int32 `[b blocks]`, whose block it is, ascending along a row.
        ids: int32 `[b s]`, the document of the token in a slot; 0 where there is none.
        groups: int32 `[b s]`, numbers the (memory, document) pairs upward along a row, the kept
            slots of the past included; 0 where empty.
        count: int32 `[b m]`, tokens that each memory gets.
        first: int32 `[b m]`, its first slot.
    """

    slot: jax.Array
    visit: jax.Array
    by_memory: jax.Array
    memory: jax.Array
    ids: jax.Array
    groups: jax.Array
    count: jax.Array
    first: jax.Array


def documents_of(segment_ids: jax.Array | None, last_id: jax.Array, t: int) -> Documents:
    """Reads the segment ids `[b t]` of a call (None = one document) from a state in `last_id`."""
    if segment_ids is None:
        entry = jnp.maximum(last_id, 1)
        return Documents(
            jnp.broadcast_to(entry[:, None], (entry.shape[0], t)), entry, last_id, None
        )
    _, valid, after = boundaries(segment_ids, last_id)
    # A state that tracks no document is in the first one that comes.
    latest = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(valid, segment_ids, latest), axis=1)
    first = jnp.where(jnp.any(valid, axis=1), first, 0)
    return Documents(segment_ids, jnp.where(last_id > 0, last_id, first), after, valid)


def slots_for(t: int, visits: int, n_memories: int, keep: int) -> tuple[int, int]:
    """(slots, slots per block): slots that suffice, whoever goes where, and whole blocks."""
    taken, used = visits * t, min(n_memories, visits * t)  # memories that get tokens at all
    block = LONG if 4 * used * LONG <= taken else SHORT
    return (taken + used * (keep + block - 1)) // block * block, block


def place(
    visits: jax.Array, ids: jax.Array, entry: jax.Array, *, n_memories: int, keep: int = 0
) -> Slots:
    """Gives every visit its slot: a counting sort, which keeps the order of time.

    Args:
        visits: int32 `[b t j]`, the memories that each token goes to, j different ones.
        ids: int32 `[b t]`, documents numbered upward, 0 = padding, which gets no slot.
        entry: int32 `[b]`, the document that the kept past belongs to.
        n_memories: m.
        keep: slots before each memory's tokens.
    """
    b, t, j = visits.shape
    s, block = slots_for(t, j, n_memories, keep)
    memories = jnp.arange(n_memories, dtype=jnp.int32)
    chosen = visits[..., None] == memories  # [b t j m]
    hit = jnp.any(chosen, axis=2) & (ids > 0)[..., None]
    so_far = jnp.cumsum(hit, axis=1, dtype=jnp.int32)
    count = so_far[:, -1]
    blocks = jnp.where(count > 0, -(-(count + keep) // block), 0)
    end = jnp.cumsum(blocks, axis=1, dtype=jnp.int32)  # in blocks
    first = (end - blocks) * block
    by_memory = jnp.where(hit, first[:, None] + keep + so_far - 1, s)
    slot = jnp.sum(jnp.where(chosen, by_memory[:, :, None], 0), axis=-1)

    rows = jnp.arange(b)[:, None]
    numbers = jnp.broadcast_to(jnp.arange(t * j, dtype=jnp.int32), (b, t * j))
    visit = jnp.full((b, s), t * j, jnp.int32)
    visit = visit.at[rows, slot.reshape(b, t * j)].set(numbers, mode="drop")

    number = jnp.arange(s // block, dtype=jnp.int32)
    passed = jnp.sum(number[:, None] >= end[:, None, :], axis=-1, dtype=jnp.int32)  # [b blocks]
    memory = jnp.minimum(passed, n_memories - 1)
    of_slot = chunks.by_token(memory, s)
    inside = jnp.arange(s, dtype=jnp.int32) - jnp.take_along_axis(first, of_slot, axis=1)
    past = (inside < keep) & (jnp.take_along_axis(count, of_slot, axis=1) > 0)
    token_ids = gather(ids, visit // j)
    of_document = jnp.where(past, entry[:, None], token_ids)
    before = jnp.pad(of_document, ((0, 0), (1, 0)))[:, :-1]
    new = (of_document > 0) & ((of_document != before) | (inside == 0))
    groups = jnp.where(of_document > 0, jnp.cumsum(new, axis=1, dtype=jnp.int32), 0)
    return Slots(slot, visit, by_memory, memory, token_ids, groups, count, first)


def gather(x: jax.Array, there: jax.Array) -> jax.Array:
    """`[b i ...]` from `[b n ...]`: y_i = x_there(i), 0 where there(i) is n."""
    wide = there.reshape(there.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, wide, axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def moved(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """`gather`, whose gradient is a sum of gathers: nothing is scattered.

    Args:
        x: `[b n e]`.
        there: int32 `[b i]`, which row of x each row of the result is; n = zeros.
        back: int32 `[b n r]`, the rows of the result that each row of x became; i = none.
    """
    del back
    return gather(x, there)


def _moved_forward(x, there, back):
    return gather(x, there), back


def _moved_backward(back, dy):
    b, n, r = back.shape
    parts = gather(dy, back.reshape(b, n * r)).reshape(b, n, r, dy.shape[-1])
    return (parts[:, :, 0] if r == 1 else jnp.sum(parts, axis=2)), None, None


moved.defvjp(_moved_forward, _moved_backward)


def tokens_to_slots(x: jax.Array, slots: Slots) -> jax.Array:
    """`[b s e]` from what each token has for all memories, `[b t e]`; 0 in empty slots."""
    return moved(x, slots.visit // slots.slot.shape[-1], slots.slot)


def memories_to_slots(x: jax.Array, slots: Slots) -> jax.Array:
    """`[b s e]` from what each token has for each memory, `[b t m e]`; 0 in empty slots.

    `[b t 1 e]` is what it has for all of them.
    """
    b, t, m, e = x.shape
    if m == 1:
        return tokens_to_slots(x[:, :, 0], slots)
    j = slots.slot.shape[-1]
    mine = slots.visit // j * m + chunks.by_token(slots.memory, slots.visit.shape[1])
    there = jnp.where(slots.visit < t * j, mine, t * m)
    return moved(x.reshape(b, t * m, e), there, slots.by_memory.reshape(b, t * m, 1))


def slots_to_visits(y: jax.Array, slots: Slots) -> jax.Array:
    """`[b t j e]`, what each visit of a token brought, from `[b s e]`; 0 at padding."""
    b, t, j = slots.slot.shape
    found = moved(y, slots.slot.reshape(b, t * j), slots.visit[..., None])
    return found.reshape(b, t, j, y.shape[-1])


def with_past(x: jax.Array, past: jax.Array, slots: Slots) -> jax.Array:
    """`[b s e]` with what each memory kept, `[b m keep e]`, in the slots before its tokens."""
    b, m, keep, e = past.shape
    nowhere = x.shape[1] + keep * jnp.arange(m)  # all different
    at = jnp.where(slots.count > 0, slots.first, nowhere)[..., None] + jnp.arange(keep)
    rows = jnp.arange(b)[:, None]
    past = past.reshape(b, m * keep, e).astype(x.dtype)
    return x.at[rows, at.reshape(b, m * keep)].set(past, mode="drop", unique_indices=True)


def kept(x: jax.Array, past: jax.Array, slots: Slots) -> jax.Array:
    """The last `keep` rows of each memory in `x` `[b s e]`, 0 where an earlier document stands.

    A memory that got no tokens keeps its `past` `[b m keep e]`.
    """
    b, m, keep, e = past.shape
    at = (slots.first + slots.count)[..., None] + jnp.arange(keep)
    at = jnp.where(slots.count[..., None] > 0, at, x.shape[1]).reshape(b, m * keep)
    groups = gather(slots.groups, at).reshape(b, m, keep)
    found = gather(x, at).reshape(b, m, keep, e).astype(past.dtype)
    found = jnp.where((groups == groups[..., -1:])[..., None], found, 0)
    return jnp.where((slots.count > 0)[..., None, None], found, past)
