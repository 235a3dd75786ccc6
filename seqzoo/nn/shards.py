"""A row whose tokens are cut over devices, as one of them sees it. For use inside shard_map."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


class Shard(NamedTuple):
    """Where this device stands among those that share a row.

    Attributes:
        axis: mesh axis that the tokens are cut over.
        n: devices along it.
        index: int32 [], the place of this one, from 0.
        length: tokens that each of them holds.
    """

    axis: str
    n: int
    index: jax.Array
    length: int

    @property
    def start(self) -> jax.Array:
        """How many tokens of the row stand before those here."""
        return self.index * self.length

    def from_left(self, tree: Any, by: int = 1) -> Any:
        """What the device `by` places to the left holds; zeros where there is none."""
        pairs = [(i, i + by) for i in range(self.n - by)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def from_right(self, tree: Any) -> Any:
        """What the next device to the right holds; zeros on the last one."""
        pairs = [(i + 1, i) for i in range(self.n - 1)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def on_first(self, first: Any, others: Any) -> Any:
        """`first` on the first device, `others` elsewhere; trees alike."""
        return jax.tree.map(lambda a, b: jnp.where(self.index == 0, a, b), first, others)

    def composed_before(self, element: Any, compose: Any) -> Any:
        """The elements of all devices to the left put together; anything on the first one.

        One hand-over, and one more for each doubling of the devices: an element each.

        Args:
            element: a pytree, what the tokens of this device do.
            compose: `compose(earlier, later) -> element`, associative.
        """
        found, step = self.from_left(element), 1
        while step < self.n - 1:
            both = compose(self.from_left(found, step), found)
            found = jax.tree.map(lambda a, b: jnp.where(self.index > step, a, b), both, found)  # noqa: B023
            step *= 2
        return found


class Documents(NamedTuple):
    """The documents of whole rows: every device knows them, for ids are no activations.

    Attributes:
        last_id: int32 `[b]`, of the state before the row.
        count: int32 `[b]`, tokens that this document had before the row, where it is counted.
        ids: int32 `[b t]` of whole rows; None = the row goes on with that document.
        reset, valid: bool `[b t]`, see segments.boundaries.
        number: int32 `[b t]`, how many documents have begun in the row.
    """

    last_id: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    ids: jax.Array | None
    reset: jax.Array | None = None
    valid: jax.Array | None = None
    number: jax.Array | None = None

    @classmethod
    def of(cls, ids: jax.Array | None, last_id: jax.Array, count: jax.Array) -> "Documents":
        if ids is None:
            return cls(last_id, count, None)
        reset, valid, _ = boundaries(ids, last_id)
        return cls(last_id, count, ids, reset, valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32))

    def part(self, start: jax.Array, length: int) -> jax.Array | None:
        """Ids `[b length]` from a place on; None = there are none."""
        return None if self.ids is None else _cut(self.ids, start, length)

    def before(self, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The id of the document before the token at `place`, and how many tokens it has had."""
        if self.ids is None:
            return self.last_id, self.count + place
        earlier = jnp.arange(self.ids.shape[1]) < place
        last_id = jnp.maximum(self.last_id, jnp.max(jnp.where(earlier, self.ids, 0), axis=1))
        begun = jnp.sum(self.reset & earlier, axis=1)
        same = self.valid & earlier & (self.number == begun[:, None])
        return last_id, jnp.sum(same, axis=1) + jnp.where(begun == 0, self.count, 0)

    def here(self, shard: Shard) -> tuple[jax.Array | None, jax.Array | None]:
        """valid `[b t]` of the tokens here, and bool `[b]`: no document begins among them."""
        if self.ids is None:
            return None, None
        cut = lambda x: _cut(x, shard.start, shard.length)
        return cut(self.valid), ~jnp.any(cut(self.reset), axis=1)


def _cut(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)


def last_shard(ids: jax.Array | None, rows: int, n: int) -> jax.Array:
    """Int32 `[b]`: the last of n shards of each row that has a token (0 = none has)."""
    if ids is None:
        return jnp.full((rows,), n - 1, jnp.int32)
    length = ids.shape[1] // n
    at = jnp.max(jnp.where(ids > 0, jnp.arange(ids.shape[1], dtype=jnp.int32), 0), axis=1)
    return at // length
