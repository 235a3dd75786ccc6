"""Attention to the last tokens and to a few keys that every token sees, wherever it stands."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.core.segments import boundaries
from seqzoo.nn.sequence_parallel import halo

_BLOCK = 64  # queries at a time
# Documents of a call are counted from 0; these see nobody and are seen by nobody.
_NOBODY, _NOTHING = -1, -2


class WindowState(NamedTuple):
    """The keys and values before the next token that it may see, the oldest first.

    Attributes:
        k, v: `[b w-1 h k]`, float32 at least; what stands before the document's start is never
            looked at.
        count: int32 `[b]`, tokens of the current document so far.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def empty_window(
    batch_size: int, window: int, n_heads: int, head_dim: int, dtype: str
) -> WindowState:
    """The state before the first token, of a layer that computes in `dtype`."""
    shape = (batch_size, window - 1, n_heads, head_dim)
    # One array each: a state is donated, and no buffer can be given away twice.
    k, v = (jnp.zeros(shape, state_dtype(dtype)) for _ in range(2))
    count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
    return WindowState(k, v, count, last_id)


class _Keys(NamedTuple):
    """Keys `[b s h k]`, values, and the document and place of each, int32 `[b s]`."""

    k: jax.Array
    v: jax.Array
    document: jax.Array
    place: jax.Array


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    place: jax.Array,
    asked: jax.Array | None = None,
    constant_k: jax.Array | None = None,
    constant_v: jax.Array | None = None,
    *,
    window: int,
    initial_state: WindowState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, WindowState]:
    """Softmax over the last `window` tokens of the document and some constant keys.

    Args:
        q, k, v: `[b t h k]`.
        place: int32 `[b t]`, tokens of the document before each one.
        asked: queries `[b t h k]` of the constant keys; None = there are none.
        constant_k, constant_v: those keys and their values `[n h k]`.
        window: tokens that a token sees, itself included.
        initial_state: where the stream stopped; None = nothing read.
        segment_ids: int32 `[b t]`, 0 = padding, not inside a document; None = one document.

    Returns:
        `[b t h k]` in the dtype of q, 0 at padding, and the state after the last token.
    """
    b, t, *_ = q.shape
    fresh = initial_state is None
    state = initial_state
    if state is None:
        state = empty_window(b, window, *q.shape[2:], str(q.dtype))
    if segment_ids is None:
        document, valid, last_id = jnp.zeros((b, t), jnp.int32), None, state.last_id
        count = state.count + t
    else:
        reset, valid, last_id = boundaries(segment_ids, state.last_id)
        document = jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), _NOBODY)
        count = place[:, -1] + valid[:, -1] if t else state.count
        q, k, v = (jnp.where(valid[..., None, None], x, 0) for x in (q, k, v))
    old_place = state.count[:, None] - (window - 1) + jnp.arange(window - 1)
    old = _Keys(state.k, state.v, jnp.where(old_place >= 0, 0, _NOTHING), old_place)
    new = _Keys(k, v, jnp.where(document == _NOBODY, _NOTHING, document), place)
    constant = None if asked is None else (constant_k, constant_v)
    asked = () if asked is None else (asked,)
    attend = functools.partial(_attend, constant=constant, window=window)
    past = [] if fresh or window == 1 else [old]
    if t <= _BLOCK:
        y = attend(q, document, place, *asked, keys=[*past, new])
    else:
        y = _by_blocks(attend, (q, document, place, *asked), new, past, window)
    if valid is not None:
        y = jnp.where(valid[..., None, None], y, 0)
    return y, _after(old, new, count, last_id, window)


def _by_blocks(attend, queries, new: _Keys, past: list, window: int):
    """A block of queries after the other, each with the keys that it may see."""
    t = queries[0].shape[1]

    def filled(x, before=0, value=0):
        widths = [(before * (i == 1), -t % _BLOCK * (i == 1)) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    q, document, *others = queries
    queries = (filled(q), filled(document, 0, _NOBODY), *map(filled, others))
    band = _Keys(*(filled(x, window - 1) for x in new))
    band = band._replace(document=filled(new.document, window - 1, _NOTHING))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(i):
        cut = lambda x, size: jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, size, axis=1)
        keys = _Keys(*(cut(x, _BLOCK + window - 1) for x in band))
        return attend(*(cut(x, _BLOCK) for x in queries), keys=[*past, keys])

    _, y = jax.lax.scan(lambda _, i: (None, one(i)), None, jnp.arange(-(-t // _BLOCK)))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :t]


def _attend(q, document, place, asked=None, *, keys, constant, window):
    """One block of queries `[b c h k]` against keys `[b s h k]` and the constant ones."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = q.shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    scores = []
    for one in keys:
        lag = place[:, :, None] - one.place[:, None, :]
        seen = (document[:, :, None] == one.document[:, None, :]) & (lag >= 0) & (lag < window)
        s = scale * product("bchk,bshk->bhcs", q, one.k.astype(q.dtype))
        scores.append(jnp.where(seen[:, None], s, -jnp.inf))
    if constant is not None:
        scores.append(scale * product("bchk,nhk->bhcn", asked, constant[0].astype(q.dtype)))
    scores = jnp.concatenate(scores, axis=-1)
    if constant is None:  # a query of padding sees nothing at all
        scores = jnp.where((document == _NOBODY)[:, None, :, None], 0, scores)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y, at = 0.0, 0
    for one in keys:
        part = weights[..., at : at + one.v.shape[1]]
        y = y + product("bhcs,bshk->bchk", part, one.v.astype(q.dtype))
        at += one.v.shape[1]
    if constant is not None:
        y = y + product("bhcn,nhk->bchk", weights[..., at:], constant[1].astype(q.dtype))
    return y.astype(q.dtype)


def _after(old: _Keys, new: _Keys, count, last_id, window: int) -> WindowState:
    """The last window - 1 keys of the last document."""
    b, n = count.shape[0], window - 1
    pairs = zip(old, new, strict=True)
    both = _Keys(*(jnp.concatenate([x, y.astype(x.dtype)], axis=1) for x, y in pairs))
    # The largest number is that of the last document; where nothing was read it is the state's, 0.
    last = jnp.maximum(jnp.max(both.document, axis=1, keepdims=True), 0)
    slot = both.place - (count[:, None] - n)
    here = (both.document == last) & (slot >= 0)
    slot = jnp.where(here & (slot < n), slot, n)
    at = (
        jnp.zeros((b, n + 1), jnp.int32)
        .at[jnp.arange(b)[:, None], slot]
        .set(jnp.arange(both.place.shape[1], dtype=jnp.int32), mode="drop")[:, :n]
    )
    take = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
    return WindowState(take(both.k), take(both.v), count, last_id)


window_attention.axes = axes(  # type: ignore[attr-defined]
    "b t h k, b t h k, b t h k, b t, b t h k, n h k, n h k -> b t h k",
    state="b w h k, b w h k, b, b",
    independent="b h",
)
window_attention.sequence_rule = halo(  # type: ignore[attr-defined]
    lambda call, args: call.options["window"] - 1
)
