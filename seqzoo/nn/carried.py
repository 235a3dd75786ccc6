"""Which tokens belong to the document that a state is in, and to the one that it will be in.

For mixers whose state is no sum over a window: the whole past of a document in a fixed size. The
tokens of a document stand together in a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


class Carried(NamedTuple):
    """A chunk of a stream, as its state sees it.

    Attributes:
        first: bool `[b t]`, tokens of the document that the state before is in; None = all.
        place: int32 `[b t]`, how many tokens of the chunk stood before; right where first.
        goes_on: bool `[b]`, whether the chunk ends in that document.
        count: int32 `[b]`, tokens of the document that the chunk ends in.
        order: int32 `[b t]`, places of these tokens, the latest first; then anything.
        last_id: int32 `[b]`, its id.
        several: bool [], whether a document begins behind another in any row; None = it does not.
    """

    first: jax.Array | None
    place: jax.Array | None
    goes_on: jax.Array
    count: jax.Array
    order: jax.Array | None
    last_id: jax.Array
    several: jax.Array | None

    def after(self, y: jax.Array) -> jax.Array:
        """What the state before gives: y `[b t e]` by age, put where its document stands."""
        if self.first is None or self.place is None:
            return y
        placed = jnp.take_along_axis(y, jnp.maximum(self.place, 0)[..., None], 1)
        return jnp.where(self.first[..., None], placed, 0)

    def latest(self, u: jax.Array) -> jax.Array:
        """Inputs `[b t e]` of the document that the chunk ends in, the latest first; then 0."""
        if self.order is None:
            return u[:, ::-1]
        inside = jnp.arange(u.shape[1]) < self.count[:, None]
        return jnp.where(inside[..., None], jnp.take_along_axis(u, self.order[..., None], 1), 0)


def carried(segment_ids: jax.Array | None, last_id: jax.Array, length: int) -> Carried:
    """Sorts the tokens of a chunk.

    Args:
        segment_ids: int32 `[b t]`, 0 = padding; None = the chunk goes on with the state's document.
        last_id: int32 `[b]`, from the state.
        length: t.
    """
    b = last_id.shape[0]
    if segment_ids is None:
        count = jnp.full((b,), length)
        return Carried(None, None, jnp.ones((b,), bool), count, None, last_id, None)
    reset, valid, last_id = boundaries(segment_ids, last_id)
    begun = jnp.cumsum(reset, axis=1)
    first, last = valid & (begun == 0), valid & (begun == begun[:, -1:])
    return Carried(
        first=first,
        place=jnp.cumsum(valid, axis=1) - 1,
        goes_on=begun[:, -1] == 0,
        count=jnp.sum(last, axis=1),
        order=jnp.argsort(jnp.where(last, -jnp.arange(length), 1), axis=1),
        last_id=last_id,
        several=jnp.any(reset & (jnp.cumsum(valid, axis=1) > 1)),
    )
