"""Linear state spaces over whole sequences: a convolution, and the state at its two ends."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.long_conv import long_conv
from seqzoo.nn.carried import Carried, carried
from seqzoo.nn.sharded import sharded


def stream(
    u: jax.Array,
    convolve: Callable,
    *,
    respond: Callable,
    absorb: Callable,
    state: tuple[jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y = convolution of u + what the state gives, and the state after.

    The state is that of the recurrence, of a fixed size, so no inputs are kept.

    Args:
        u: `[b t e]`.
        convolve: `convolve(u, place) -> [b t e*m]`, document by document, from a fresh state.
        respond: `respond(x [e b n]) -> [e b m t]`, what a state gives to the tokens after it.
        absorb: `absorb(u [e b t], count [b], x [e b n] or None) -> [e b n]`, the state after the
            first `count` of some inputs, the latest first (the others are 0).
        state: x `[b e n]` and the id of its document `[b]`; None = a fresh one.
        segment_ids: int32 `[b t]`, 0 = padding; None = one document.

    Returns:
        y `[b t e*m]` in the dtype of u, m fastest; x `[b e n]`; last_id `[b]`.
    """
    b, t, _ = u.shape
    last_id = jnp.zeros((b,), jnp.int32) if state is None else state[1]
    place = carried(segment_ids, last_id, t)
    if segment_ids is not None:
        u = jnp.where((segment_ids > 0)[..., None], u, 0)
    y, before = convolve(u, place), None
    if state is not None:
        before = jnp.swapaxes(state[0], 0, 1)
        old = jnp.transpose(respond(before), (1, 3, 0, 2)).reshape(b, t, -1)
        y = y + place.after(old)
        before = jnp.where(place.goes_on[:, None], before, 0)
    sums = jnp.promote_types(u.dtype, jnp.float32)
    latest = jnp.transpose(place.latest(u.astype(sums)), (2, 0, 1))
    x = absorb(latest, place.count, before)
    return y.astype(u.dtype), jnp.swapaxes(x, 0, 1), place.last_id


def with_kernel(
    u: jax.Array,
    kernel: jax.Array,
    skip: jax.Array,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """y = kernel * u + skip u + bias, `[b t e*m]` with m outputs per feature, m fastest.

    Args:
        u: `[b t e]`.
        kernel: `[e m t]`, float32 (float64 with u).
        skip: `[e m]`.
        bias: `[e m]`; None = 0.
        segment_ids: int32 `[b t]`; None = one document per row.
        implementation: of the convolution.
    """
    m = kernel.shape[1]
    y, _ = sharded(
        long_conv,
        jnp.repeat(u, m, axis=-1) if m > 1 else u,
        kernel.reshape(-1, kernel.shape[2]),
        skip.reshape(-1),
        None,
        None if bias is None else bias.reshape(-1),
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return y


def by_documents(way: Callable, place: Carried, segment_ids: jax.Array | None, *arrays: Any) -> Any:
    """way(*arrays, segment_ids), without the ids where no row holds two documents.

    Padding alone needs no masks in a causal convolution, and masks between documents cost several
    times the convolution; which it is shows when the program runs.

    Args:
        way: `way(*arrays, segment_ids)`, differentiable in the arrays.
        place: of the tokens.
        segment_ids: int32 `[b t]`; None = one document per row.
    """
    if segment_ids is None:
        return way(*arrays, None)

    @jax.checkpoint  # keeps the arrays once, not once per branch
    def either(several, segment_ids, *arrays):
        alone = lambda segment_ids, *arrays: way(*arrays, None)
        packed = lambda segment_ids, *arrays: way(*arrays, segment_ids)
        return jax.lax.cond(several, packed, alone, segment_ids, *arrays)

    return either(place.several, segment_ids, *arrays)


def convolution(
    kernel: jax.Array,
    skip: jax.Array,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    implementation: str | None = None,
) -> Callable:
    """What `stream` asks for, by `with_kernel`."""
    way = functools.partial(with_kernel, implementation=implementation)
    return lambda u, place: by_documents(way, place, segment_ids, u, kernel, skip, bias)
