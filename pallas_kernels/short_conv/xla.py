"""short_conv as shifted adds, with a backward pass that computes the sum again."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries

# A document that began before this call has its start here: every tap reaches that far.
_EARLIER = -(2**30)


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, weight, bias, before, last_id, segment_ids, *, activation, config):
    """See `short_conv`; before `[b w-1 e]` in the dtype to compute in; gives y, before, last_id."""
    del config
    t, keep = x.shape[1], before.shape[1]
    dtype = before.dtype
    if segment_ids is None:
        padded = jnp.concatenate([before, x.astype(dtype)], axis=1)
        y = _taps(padded, weight.astype(dtype), _cast(bias, dtype), None, activation)
        return y.astype(x.dtype), padded[:, t:], last_id

    reset, valid, last_id = boundaries(segment_ids, last_id)
    places = jnp.arange(t, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(reset, places, _EARLIER), axis=1)  # of each token's document
    # The inputs before this call go right before the first token: padding takes no place.
    leading = jnp.min(jnp.where(valid, places, t), axis=1)
    padded = jnp.where(valid[..., None], x, 0).astype(dtype)
    padded = jnp.pad(padded, ((0, 0), (keep, 0), (0, 0)))
    padded = jax.vmap(lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0))(
        padded, before, leading
    )
    y = _taps(padded, weight.astype(dtype), _cast(bias, dtype), start, activation)
    y = jnp.where(valid[..., None], y, 0)
    # The last inputs, up to the last token of the row; those of earlier documents are forgotten.
    end = jnp.max(jnp.where(valid, places, -1), axis=1)
    end = jnp.where(end < 0, t - 1, end)
    last_start = jnp.take_along_axis(start, end[:, None], axis=1)
    after = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, keep, 0))(
        padded, end + 1
    )
    reached = end[:, None] + 1 - keep + jnp.arange(keep) >= last_start
    return y.astype(x.dtype), jnp.where(reached[..., None], after, 0), last_id


def _cast(x, dtype):
    return None if x is None else x.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _taps(padded, weight, bias, start, activation):
    """y `[b t e]` from padded inputs `[b w-1+t e]`; start int32 `[b t]` cuts taps, or None."""
    total = _sum(padded, weight, bias, start)
    return jax.nn.silu(total) if activation == "silu" else total


def _sum(padded, weight, bias, start):
    w = weight.shape[0]
    t = padded.shape[1] - w + 1
    total = jnp.zeros((), padded.dtype) if bias is None else bias
    for i in range(w):
        total = total + weight[i] * _cut(padded[:, i : i + t], start, w - 1 - i)
    return total


def _cut(x, start, lag: int):
    """Sets to 0 what a tap of this lag must not see: inputs from before the document's start."""
    if start is None or lag == 0:
        return x
    seen = jnp.arange(x.shape[1]) - lag >= start
    return jnp.where(seen[..., None], x, 0)


def _taps_forward(padded, weight, bias, start, activation):
    return _taps(padded, weight, bias, start, activation), (padded, weight, bias, start)


def _taps_backward(activation, residuals, dy):
    padded, weight, bias, start = residuals
    w = weight.shape[0]
    t = padded.shape[1] - w + 1
    if activation == "silu":
        _, pull = jax.vjp(jax.nn.silu, _sum(padded, weight, bias, start))
        (dy,) = pull(dy)
    dpadded = jnp.zeros_like(padded)
    dweight = []
    for i in range(w):
        part = _cut(dy, start, w - 1 - i)
        dweight.append(jnp.einsum("bte,bte->e", part, padded[:, i : i + t]))
        dpadded = dpadded.at[:, i : i + t].add(weight[i] * part)
    dbias = None if bias is None else jnp.sum(dy, axis=(0, 1))
    return dpadded, jnp.stack(dweight), dbias, None


_taps.defvjp(_taps_forward, _taps_backward)
