"""dilated_conv by its definition: token by token over rings, or masked sums. Slow and obvious."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries
from pallas_kernels.dilated_conv import ring as rings


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, weight, bias, ring, count, last_id, segment_ids, *, config, symmetric, fresh, **how):
    """See `dilated_conv`; gives y, ring, count, last_id (symmetric: y alone)."""
    del config, fresh
    b, t, e = x.shape
    dtype, out_dtype = jnp.result_type(jnp.float32, x, weight), x.dtype
    weight = weight.astype(dtype)
    bias = jnp.zeros((len(weight), e), dtype) if bias is None else bias.astype(dtype)
    if symmetric:
        ids = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
        return both_ways(x.astype(dtype), weight, bias, ids, **how).astype(out_dtype)

    if segment_ids is None:
        reset, valid = jnp.zeros((b, t), bool), jnp.ones((b, t), bool)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    x = jnp.where(valid[..., None], x, 0).astype(dtype)

    def step(state, inputs):
        y_t, ring, count = token(weight, bias, *state, *inputs, **how)
        return (ring, count), y_t

    by_time = lambda a: jnp.swapaxes(a, 0, 1)
    (ring, count), y = jax.lax.scan(step, (ring, count), tuple(map(by_time, (x, reset, valid))))
    return by_time(y).astype(out_dtype), ring, count, last_id


def token(weight, bias, ring, count, x, reset, valid, *, dilations, activation):
    """One token `[b e]`: y, and the ring and count after it."""
    ring = jnp.where(reset[:, None, None], 0, ring)
    count = jnp.where(reset, 0, count)
    taps = weight.shape[1]
    s, new = x, []
    for i, (at, dilation) in enumerate(zip(rings.places(taps, dilations), dilations, strict=True)):
        past = rings.seen_lags(ring[:, at], count, dilation * jnp.arange(1, taps))
        a = jnp.einsum("bwe,we->be", jnp.concatenate([s[:, None], past], axis=1), weight[i])
        new.append(rings.write(ring[:, at], count, s, valid))
        s = level(s, a + bias[i], activation)
    y = jnp.where(valid[:, None], s, 0)
    return y, jnp.concatenate(new, axis=1), count + valid


def level(s, a, activation):
    """The next level's input from this one's and its convolution."""
    return s + jnp.maximum(a, 0) if activation == "relu_res" else a


def both_ways(x, weight, bias, ids, *, dilations, activation):
    """The symmetric stack: each tap looks where it looks, if that is in the same document."""
    valid = (ids > 0)[..., None]
    t, half = x.shape[1], weight.shape[1] // 2
    s = jnp.where(valid, x, 0)
    for i, dilation in enumerate(dilations):
        a = bias[i]
        for j in range(weight.shape[1]):
            place = jnp.arange(t) - (j - half) * dilation
            inside = (place >= 0) & (place < t)
            place = jnp.clip(place, 0, t - 1)
            seen = inside & (ids[:, place] == ids)
            a = a + weight[i, j] * jnp.where(seen[..., None], s[:, place], 0)
        s = jnp.where(valid, level(s, a, activation), 0)
    return s
