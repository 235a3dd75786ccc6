"""short_conv as Mosaic GPU kernels for Hopper: x is read once, y written once, and so backward.

Nothing is kept between the two but the arguments. README.md has grid, buffers and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, gpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.short_conv.gpu_backward import backward
from pallas_kernels.short_conv.gpu_forward import forward
from pallas_kernels.short_conv.gpu_parts import F32, HALO, INTS, How

_EARLIER = -(2**30)  # where a document starts that began before this call
_TILES = (16, 32)
_STRETCH = 128
_BLOCKS = 4 * 132  # that fill the chip: a few for each core


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut.

    Attributes:
        tile: tokens per step: 16 or 32.
        stretch: tokens per block, a multiple of the tile; 16 more are read before them (backward a
            tile, and 16 after them). A sequence is padded to whole stretches.
    """

    tile: int = 16
    stretch: int = _STRETCH

    def __post_init__(self):
        if self.tile not in _TILES:
            raise ValueError(f"short_conv: tile is {self.tile}; it must be 16 or 32")
        if self.stretch < 1 or self.stretch % self.tile:
            raise ValueError(
                f"short_conv: stretch is {self.stretch}; it must be a multiple of tile={self.tile}"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasGpuConfig":
        """Stretches of 128 tokens, longer where blocks are many, shorter where padding is much."""
        t, blocks = sizes["t"], sizes["b"] * (_round_up(sizes["e"], gpu.WARPGROUP) // 128)
        tile = _TILES[0]
        fits = lambda x: x % tile == 0 and _round_up(t, x) <= t + t // 16
        stretch = next((x for x in (_STRETCH, _STRETCH // 2) if fits(x)), tile)
        while stretch < 1024 and blocks * t >= 2 * stretch * _BLOCKS and fits(2 * stretch):
            stretch *= 2
        return cls(tile=tile, stretch=stretch, device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `short_conv`."""
    w = shapes[1].shape[0]
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is None and w - 1 > HALO:
        return f"weight has {w} taps; the kernel takes at most {HALO + 1}"
    return reason


def run(x, weight, bias, before, last_id, segment_ids, *, activation, config):
    """See `short_conv`; before `[b w-1 e]` float32. Returns y, before, last_id."""
    (b, t, e), taps = x.shape, weight.shape[0]
    sizes = dict(b=b, t=t, e=e, w=taps, itemsize=x.dtype.itemsize)
    config = PallasGpuConfig.of(config, sizes, dispatch.device_kind(config))
    long, wide = _round_up(t, config.stretch), _round_up(e, gpu.WARPGROUP)
    how = How(
        taps,
        activation == "silu",
        segment_ids is not None or long > t,
        config.stretch,
        config.tile,
        config,
    )
    flags, places, last_id = _places(how, x.shape, last_id, segment_ids)
    bias = jnp.zeros((e,), F32) if bias is None else bias.astype(F32)
    arrays = dict(
        x=_pad(x, b, long, wide),
        channels=_pad(jnp.concatenate([weight.astype(F32), bias[None]]), taps + 1, wide),
        before=_pad(before, b, taps - 1, wide),
    )
    flags = None if flags is None else _pad(flags, b, 2, long)
    y, after = _conv(arrays, flags, places, how)
    return y[:, :t, :e], after[:, :, :e], last_id


def _places(how: How, shape: tuple[int, int, int], last_id, segment_ids):
    """Flags `[b 2 t]` or None; int32 `[b 1]` places of the first token, of the last w - 1 inputs,
    and of the first of these that is of the last token's document; the last id.
    """
    (b, t, _), keep = shape, how.taps - 1
    if segment_ids is None:
        flags = None
        if how.documents:
            flags = jnp.stack([jnp.ones((b, t), F32), jnp.zeros((b, t), F32)], axis=1)
        of = lambda place: jnp.full((b, 1), place, jnp.int32)
        return flags, (of(0), of(t - keep), of(_EARLIER)), last_id
    reset, valid, last_id = boundaries(segment_ids, last_id)
    places = jnp.arange(t, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(reset, places, _EARLIER), axis=1)
    leading = jnp.min(jnp.where(valid, places, t), axis=1, keepdims=True)
    end = jnp.max(jnp.where(valid, places, -1), axis=1, keepdims=True)
    end = jnp.where(end < 0, t - 1, end)
    flags = jnp.stack([valid.astype(F32), reset.astype(F32)], axis=1)
    return flags, (leading, end + 1 - keep, jnp.take_along_axis(start, end, axis=1)), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(arrays, flags, places, how: How):
    """y `[b t e]` and the last inputs `[b w-1 e]`."""
    y = forward(_for_kernel(arrays, flags, how), how)
    return y, _after(places, arrays["before"], _rows_of(arrays["x"], places, how))


def _conv_forward(arrays, flags, places, how: How):
    return _conv(arrays, flags, places, how), (arrays, flags, places)


def _conv_backward(how: How, residuals, cotangents):
    arrays, flags, places = residuals
    dy, dafter = cotangents
    rows = _rows_of(arrays["x"], places, how)
    _, pull = jax.vjp(functools.partial(_after, places), arrays["before"], rows)
    more, drows = pull(dafter)
    given = dict(dy=dy)
    if how.taps > 1:
        given |= dict(rows=drows, at=jnp.broadcast_to(places[1], (len(dy), INTS)))
    found = backward({**_for_kernel(arrays, flags, how), **given}, how)
    found["channels"] = jnp.sum(found["channels"], axis=(0, 1))
    # The state's inputs stand before the first token: right is the stretch which has that.
    first = jnp.minimum(places[0] // how.stretch, found["before"].shape[1] - 1)
    dbefore = jnp.take_along_axis(found["before"], first[..., None, None], axis=1)[:, 0]
    found["before"] = dbefore[:, : how.taps - 1] + more
    return found, None, None


_conv.defvjp(_conv_forward, _conv_backward)


def _for_kernel(arrays, flags, how: How) -> dict:
    found = dict(arrays)
    if how.taps == 1:  # no array is empty
        b, _, e = arrays["x"].shape
        found["before"] = jnp.zeros((b, 1, e), F32)
    return found if flags is None else {**found, "flags": flags}


def _rows_of(x, places, how: How):
    """The last inputs `[b w-1 e]` of x, whatever where they are from before the call."""
    at = jnp.maximum(places[1] + jnp.arange(how.taps - 1), 0)
    return jnp.take_along_axis(x, at[..., None], axis=1).astype(F32)


def _after(places, before, rows):
    """The last inputs: those of the last token's document, from the state or from the call."""
    leading, last, start = places
    keep = before.shape[1]
    if keep == 0:
        return before
    at = last + jnp.arange(keep)
    old = jnp.take_along_axis(before, jnp.clip(keep + at - leading, 0, keep - 1)[..., None], axis=1)
    rows = jnp.where((at >= leading)[..., None], rows, old)
    return jnp.where((at >= start)[..., None], rows, 0)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _pad(x: jax.Array, *shape: int) -> jax.Array:
    """Zeros at the ends of axes."""
    more = [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, more) if any(end for _, end in more) else x
