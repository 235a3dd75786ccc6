"""What chunk_attention keeps between calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ChunkAttentionState(NamedTuple):
    """The keys and values of the last tokens, in a ring: a token overwrites the oldest one.

    Token n of a document (from 0) lies in slot n mod l, so that a step writes one slot and moves
    nothing, and a prompt, chunks and steps leave the same ring behind. A step then reads the ring
    as it lies, its own token included: that is why there are as many slots as a query sees keys,
    although the next token will not see the oldest one any more. Slots that the document has not
    reached yet are never looked at; of chunks, those that the chunk has not reached yet.

    Attributes:
        k: keys `[b g l k]`, l = window or chunk; float32 (float64 for float64 inputs). The slots of
            a head lie side by side, as a product with them wants it.
        v: values `[b g l v]`.
        count: int32 `[b]`, tokens of the current document so far: the position of the next one.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def empty(b: int, g: int, slots: int, k: int, v: int, dtype) -> ChunkAttentionState:
    """The state before the first token."""
    ring = lambda width: jnp.zeros((b, g, slots, width), dtype)
    # One array each: a state is donated, and no buffer can be given away twice.
    count, last_id = (jnp.zeros((b,), jnp.int32) for _ in range(2))
    return ChunkAttentionState(ring(k), ring(v), count, last_id)
