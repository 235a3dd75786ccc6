"""dilated_conv as shifted adds, level by level; the backward pass computes the sum again."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries
from pallas_kernels.dilated_conv import reference
from pallas_kernels.dilated_conv import ring as rings


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(
    x,
    weight,
    bias,
    ring,
    count,
    last_id,
    segment_ids,
    *,
    config,
    dilations,
    activation,
    symmetric,
    fresh,
):
    """See `dilated_conv`; gives y, ring, count, last_id (symmetric: y alone)."""
    b, t, e = x.shape
    dtype, out_dtype = ring.dtype, x.dtype
    how = dict(dilations=dilations, activation=activation, symmetric=symmetric)
    if t == 1 and not symmetric:  # one token of a stream: its definition is the fast form
        return reference.run(
            x, weight, bias, ring, count, last_id, segment_ids, config=config, fresh=fresh, **how
        )
    weight = weight.astype(dtype)
    bias = jnp.zeros((len(weight), e), dtype) if bias is None else bias.astype(dtype)
    x = x.astype(dtype)
    valid = behind = ahead = None
    first = jnp.zeros((b,), jnp.int32)
    end, held, reset = first + (t - 1), first + t, first > 0
    before, count = count, count + t
    if segment_ids is not None:
        starts, valid, last_id = boundaries(segment_ids, last_id)
        behind, ahead = _sights(segment_ids, starts, valid, before)
        x = jnp.where(valid[..., None], x, 0)
        places = jnp.arange(t, dtype=jnp.int32)
        first = jnp.min(jnp.where(valid, places, t), axis=1)
        end = jnp.max(jnp.where(valid, places, 0), axis=1)
        held, reset = jnp.sum(valid, axis=1, dtype=jnp.int32), jnp.any(starts, axis=1)
        count = jnp.where(
            held > 0, jnp.take_along_axis(behind, end[:, None], axis=1)[:, 0] + 1, before
        )
        held = jnp.where(reset, count, held)

    s, taps, new = x, weight.shape[1], []
    for i, at in enumerate(rings.places(taps, dilations)):
        new.append(rings.after(ring[:, at], s, count, end, held, reset))
        d = dilations[i]
        most = (t - 1) // d  # taps that look further see nothing of this call
        forward = min(taps // 2, most) if symmetric else 0
        back = min(taps - 1 - taps // 2 if symmetric else taps - 1, most if fresh else taps)
        middle = taps // 2 if symmetric else 0
        padded = jnp.pad(s, ((0, 0), (back * d, forward * d), (0, 0)))
        if not fresh and back:
            past = rings.seen_lags(ring[:, at], before, jnp.arange(back * d, 0, -1))
            padded = _place(padded, past, first)
        w = weight[i, middle - forward : middle + back + 1]
        s = _level(padded, w, bias[i], behind, ahead, d, forward, activation)
        s = s if valid is None else jnp.where(valid[..., None], s, 0)
    y = s.astype(out_dtype)
    return y if symmetric else (y, jnp.concatenate(new, axis=1), count, last_id)


def _sights(segment_ids, starts, valid, count):
    """How many tokens of its document lie behind and ahead of each token, int32 `[b t]`."""
    t = segment_ids.shape[1]
    place = count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    behind = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    places = jnp.arange(t, dtype=jnp.int32)
    last = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1))) != segment_ids
    ends = jax.lax.cummin(jnp.where(last, places, t), axis=1, reverse=True)
    return behind, ends - places


def _place(padded, past, first):
    """Lays the past right before the first token of each row: padding takes no place."""
    put = lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0)
    return jax.vmap(put)(padded, past, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _level(padded, weight, bias, behind, ahead, dilation, forward, activation):
    """The next level `[b t e]` from this one `[b (w-1) dilation + t e]`.

    Args:
        padded: inputs, with what the first and last tokens see beyond them.
        weight: `[w e]`; tap j looks back (j - forward) * dilation tokens.
        bias: `[e]`.
        behind, ahead: int32 `[b t]`, how far each token sees; None = to the ends.
        dilation, forward, activation: static.
    """
    a = _sum(padded, weight, bias, behind, ahead, dilation, forward)
    return reference.level(_present(padded, weight, dilation, forward), a, activation)


def _present(padded, weight, dilation, forward):
    return _seen(padded, weight, dilation, forward)


def _seen(padded, weight, dilation, j):
    """What tap j sees, for every token."""
    span = (weight.shape[0] - 1) * dilation
    t = padded.shape[1] - span
    return jax.lax.slice_in_dim(padded, span - j * dilation, span - j * dilation + t, axis=1)


def _sum(padded, weight, bias, behind, ahead, dilation, forward):
    total = bias
    for j in range(weight.shape[0]):
        seen = _seen(padded, weight, dilation, j)
        total = total + weight[j] * _cut(seen, behind, ahead, (j - forward) * dilation)
    return total


def _cut(x, behind, ahead, lag: int):
    """Sets to 0 what a tap of this lag must not see: other documents."""
    if behind is None or lag == 0:
        return x
    sees = lag <= behind if lag > 0 else -lag <= ahead
    return jnp.where(sees[..., None], x, 0)


def _level_forward(padded, weight, bias, behind, ahead, dilation, forward, activation):
    y = _level(padded, weight, bias, behind, ahead, dilation, forward, activation)
    return y, (padded, weight, bias, behind, ahead)


def _level_backward(dilation, forward, activation, residuals, dy):
    padded, weight, bias, behind, ahead = residuals
    da = dy
    if activation == "relu_res":
        a = _sum(padded, weight, bias, behind, ahead, dilation, forward)
        da = jnp.where(a > 0, dy, 0)
    span = (weight.shape[0] - 1) * dilation
    t = padded.shape[1] - span
    dpadded = jnp.zeros_like(padded)
    dweight = []
    for j in range(weight.shape[0]):
        part = _cut(da, behind, ahead, (j - forward) * dilation)
        dweight.append(jnp.einsum("bte,bte->e", part, _seen(padded, weight, dilation, j)))
        at = span - j * dilation
        dpadded = dpadded.at[:, at : at + t].add(weight[j] * part)
    if activation == "relu_res":
        at = span - forward * dilation
        dpadded = dpadded.at[:, at : at + t].add(dy)
    return dpadded, jnp.stack(dweight), jnp.sum(da, axis=(0, 1)), None, None


_level.defvjp(_level_forward, _level_backward)
