"""dilated_conv as shifted adds, level by level: the documents and the state around the levels."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries
from pallas_kernels.dilated_conv import reference
from pallas_kernels.dilated_conv import ring as rings
from pallas_kernels.dilated_conv.level import How, level, tile_of


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
        tile = tile_of(b, t, d, e, back + forward + 1)
        n = tile.n
        x = jnp.pad(s, ((0, 0), (0 if fresh else back * d, n * d - t), (0, 0)))
        if not fresh and back:
            past = rings.seen_lags(ring[:, at], before, jnp.arange(back * d, 0, -1))
            x = _place(x, past, first)
        w = weight[i, middle - forward : middle + back + 1]
        rows = lambda x, d=d, n=n: None if x is None else _rows(x, n, d)
        how = How(tile, forward, activation, edges=not fresh)
        s = level(x.reshape(b, -1, d, e), w, bias[i], rows(behind), rows(ahead), how)
        s = s.reshape(b, n * d, e)[:, :t]
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


def _rows(x, n: int, d: int):
    """`[b t]` by row and phase, `[b n d 1]`; -1 where there is no token."""
    b, t = x.shape
    return jnp.pad(x, ((0, 0), (0, n * d - t)), constant_values=-1).reshape(b, n, d, 1)
