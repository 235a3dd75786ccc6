"""Where the tokens of a call stand in their documents, and the ring of keys before and after them.

Token n of a document lies in slot n mod l of the ring, l being the window or the chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries

# Documents of a call are counted from 0; these see nobody and are seen by nobody.
PADDING_QUERY, PADDING_KEY = -1, -2


class Places(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        valid: `[b t]`, not padding; None = nothing is.
        queries: int32 `[b t]`, the document of each token, counted in this call; 0 = the state's.
        position: int32 `[b t]`, tokens of its document before it; any number at padding.
        leading: int32 `[b]`, padding before the first token.
        first: int32 `[b]`, where the last document begins in this call.
        end: int32 `[b]`, the last token; -1 = there is none.
        reset: `[b]`, whether a document began that leaves the state's behind.
        total: int32 `[b]`, tokens of the last document, those before this call included.
        last_id: int32 `[b]`, its id.
    """

    valid: jax.Array | None
    queries: jax.Array
    position: jax.Array
    leading: jax.Array
    first: jax.Array
    end: jax.Array
    reset: jax.Array
    total: jax.Array
    last_id: jax.Array


def places(segment_ids, last_id, count, b: int, t: int) -> Places:
    """From segment ids int32 `[b t]` or None, and the state's id and count, int32 `[b]`."""
    places = jnp.arange(t, dtype=jnp.int32)
    position = count[:, None] + places
    if segment_ids is None:
        none = jnp.zeros((b,), jnp.int32)
        queries = jnp.zeros((b, t), jnp.int32)
        return Places(
            None, queries, position, none, none, none + t - 1, none > 0, count + t, last_id
        )
    reset, valid, last_id = boundaries(segment_ids, last_id)
    start = jax.lax.cummax(jnp.where(reset, places, -1), axis=1)
    leading = jnp.min(jnp.where(valid, places, t), axis=1)
    end = jnp.max(jnp.where(valid, places, -1), axis=1)
    first = jnp.max(jnp.where(reset, places, -1), axis=1)
    began = first >= 0
    first = jnp.where(began, first, leading)
    length = jnp.where(end < 0, 0, end + 1 - first)
    return Places(
        valid,
        jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), PADDING_QUERY),
        jnp.where(start < 0, position - leading[:, None], places - start),
        leading,
        first,
        end,
        began,
        jnp.where(began, 0, count) + length,
        last_id,
    )


def in_order(ring, x, count, place: Places, oldest=0):
    """The keys that came before and are still in sight, oldest first, right before the first token.

    Args:
        ring: `[b g w k]`.
        x: the keys of this call `[b t g k]`.
        count: int32 `[b]`, tokens of the document before this call.
        place: of the tokens of this call.
        oldest: position of the first key in sight, int32 `[b]`; 0 = the whole ring is.

    Returns:
        them and those of this call `[b w-1+t ...]`, in the dtype of x, and the document of each.
    """
    window = ring.shape[2]
    earlier = jnp.arange(window - 1)
    position = count[:, None] - (window - 1) + earlier
    old = jnp.swapaxes(ring, 1, 2)
    old = jnp.take_along_axis(old, (position % window)[..., None, None], axis=1).astype(x.dtype)
    old_documents = jnp.where(position >= jnp.reshape(oldest, (-1, 1)), 0, PADDING_KEY)
    if place.valid is None:
        join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        return join(old, x), join(old_documents, place.queries)

    def lay(old, new, fill):
        widths = [(0, 0), (window - 1, 0)] + [(0, 0)] * (new.ndim - 2)
        room = jnp.pad(new, widths, constant_values=fill)
        put = lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0)
        return jax.vmap(put)(room, old.astype(new.dtype), place.leading)

    documents = jnp.where(place.valid, place.queries, PADDING_KEY)
    return lay(old, x, 0), lay(old_documents, documents, PADDING_KEY)


def after(ring, x, place: Places):
    """The ring after the last token: a slot takes the last token of its own, or stays."""
    window = ring.shape[2]
    back = (place.total[:, None] - 1 - jnp.arange(window)) % window  # tokens before the last one
    source = place.end[:, None] - back
    new = jnp.take_along_axis(x, jnp.maximum(source, 0)[..., None, None], axis=1)
    new = jnp.swapaxes(new, 1, 2).astype(ring.dtype)
    old = jnp.where(place.reset[:, None, None, None], 0, ring)
    return jnp.where((source >= place.first[:, None])[:, None, :, None], new, old)
