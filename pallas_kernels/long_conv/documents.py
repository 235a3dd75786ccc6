"""Where the documents of packed rows lie, and what passes from call to call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


class Plan(NamedTuple):
    """Where the documents lie; None = one document.

    Attributes:
        valid: where there is a token, `[b t]`.
        document: int32 `[b t]`, 0 = the one that the state is of, then 1, 2, ...; padding bears the
            number of the document before it.
        leading: int32 `[b]`, place of the first token, t if there is none.
    """

    valid: jax.Array
    document: jax.Array
    leading: jax.Array


def plan(segment_ids: jax.Array, last_id: jax.Array) -> tuple[Plan, jax.Array]:
    """The plan of int32 ids `[b t]`, and the id to carry on."""
    reset, valid, last_id = boundaries(segment_ids, last_id)
    t = segment_ids.shape[1]
    leading = jnp.min(jnp.where(valid, jnp.arange(t, dtype=jnp.int32), t), axis=1)
    return Plan(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), leading), last_id


def tokens(x: jax.Array, plan: Plan | None) -> jax.Array:
    """`[b t e]` with 0 where there is no token, whatever stands there."""
    return x if plan is None else jnp.where(plan.valid[..., None], x, 0)


def first(z: jax.Array, plan: Plan) -> jax.Array:
    """What goes to the tokens of the state's document, `[b n e]` in their order, as `[b t e]`."""
    t = plan.valid.shape[1]
    z = jnp.pad(z, ((0, 0), (t, t - z.shape[1]), (0, 0)))
    z = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, t, 0))(z, t - plan.leading)
    return jnp.where((plan.document == 0)[..., None], z, 0)


def last_inputs(v: jax.Array, before: jax.Array | None, plan: Plan | None, keep: int) -> jax.Array:
    """So many of the last gated inputs of the last document, zeros before its start."""
    b, t, e = v.shape
    if before is None:
        before = jnp.zeros((b, keep, e), v.dtype)
    if plan is None:
        return jnp.concatenate([before, v], axis=1)[:, t:]
    # The inputs before this call go right before the first token: padding takes no place.
    padded = jnp.pad(v, ((0, 0), (keep, 0), (0, 0)))
    padded = jax.vmap(lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0))(
        padded, before, plan.leading
    )
    places = jnp.arange(t, dtype=jnp.int32)
    end = jnp.max(jnp.where(plan.valid, places, -1), axis=1)
    end = jnp.where(end < 0, t - 1, end)  # nothing but padding: the state as it was
    after = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, keep, 0))(
        padded, end + 1
    )
    # Of earlier documents there is nothing: they end where the number changes.
    same = plan.document == plan.document[:, -1:]
    start = jnp.where(plan.document[:, -1] == 0, -keep - 1, jnp.argmax(same, axis=1))
    reached = end[:, None] + 1 - keep + jnp.arange(keep) >= start[:, None]
    return jnp.where(reached[..., None], after, 0)
