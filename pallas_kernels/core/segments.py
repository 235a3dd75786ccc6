"""Packed documents: int32 segment ids `[b t]`, numbered upward along a row, 0 = padding.

A boundary is a change of id. The state carries the last id, so that a streamed call knows whether
its first token continues a document.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def boundaries(
    segment_ids: jax.Array, last_id: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where documents begin, and where there is padding.

    Args:
        segment_ids: int32 `[b t]`, 0 = padding.
        last_id: int32 `[b]`, the id that the state carries; 0 = none yet, or not tracked: then the
            first document continues whatever the state holds (a fresh state holds nothing).

    Returns:
        reset `[b t]`: true at the first token of a document that must not see the state before it;
        valid `[b t]`: true where there is a token;
        last_id int32 `[b]`: the id to carry on.
    """
    valid = segment_ids > 0
    # Ids never fall along a row, so the largest so far is the last one that was no padding.
    running = jax.lax.cummax(jnp.maximum(segment_ids, last_id[:, None]), axis=1)
    before = jnp.concatenate([last_id[:, None], running[:, :-1]], axis=1)
    reset = valid & (segment_ids != before) & (before > 0)
    return reset, valid, running[:, -1] if segment_ids.shape[1] else last_id


def from_lengths(lengths: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Segment ids from the lengths of the documents in each row; the rest is padding.

    Args:
        lengths: per row, the documents' lengths in order; empty documents take no id's place.
        length: of the rows.

    Returns:
        int32 `[b length]`.

    Raises:
        ValueError: a row's documents are longer than the row, or a length is negative.
    """
    ids = np.zeros((len(lengths), length), np.int32)
    for row, documents in enumerate(lengths):
        if any(one < 0 for one in documents) or sum(documents) > length:
            raise ValueError(
                f"row {row}: documents of lengths {list(documents)} do not fit into {length} tokens"
            )
        end = 0
        for number, one in enumerate(documents, 1):
            ids[row, end : end + one] = number
            end += one
    return ids
