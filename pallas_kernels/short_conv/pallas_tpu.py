"""short_conv as Mosaic TPU kernels: x is read once, y written once, and so backward.

Nothing is kept between the two but the arguments. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.short_conv.tpu_backward import backward
from pallas_kernels.short_conv.tpu_forward import forward
from pallas_kernels.short_conv.tpu_parts import F32, HALO, ROWS, How

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.65
_TILE = 512
_EARLIER = -(2**30)  # where a document starts that began before this call


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        tile: tokens per step, a multiple of 128.
        channels: per step, a multiple of 128.
    """

    tile: int = _TILE
    channels: int = 128

    def __post_init__(self):
        if min(self.tile, self.channels) < 1 or self.tile % 128 or self.channels % 128:
            raise ValueError(
                f"short_conv: tile is {self.tile} and channels {self.channels}; both must be "
                "multiples of 128"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """As many channels per step as the vector memory allows."""
        room = _SHARE * tpu.generation(device_kind).scoped_vmem
        e, itemsize = tpu.round_up(sizes["e"], tpu.LANES), sizes.get("itemsize", 4)
        tile = min(_TILE, tpu.round_up(sizes["t"], tpu.LANES))
        # Backward: blocks of x, dy and dx twice; x, g and dx in float32 once.
        fit = [
            some
            for some in range(tpu.LANES, e + 1, tpu.LANES)
            if e % some == 0 and tile * some * (6 * itemsize + 12) <= room
        ]
        return cls(tile=tile, channels=max(fit, default=tpu.LANES), device_kind=device_kind)


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `short_conv`."""
    del device_kind
    w = shapes[1].shape[0]
    if w - 1 > HALO:
        return f"weight has {w} taps; the kernel takes at most {HALO + 1}"
    return tpu.refuses_dtypes(shapes)


def run(x, weight, bias, before, last_id, segment_ids, *, activation, config):
    """See `short_conv`; before `[b w-1 e]` float32. Returns y, before, last_id."""
    (b, t, e), taps = x.shape, weight.shape[0]
    sizes = dict(b=b, t=t, e=e, w=taps, itemsize=x.dtype.itemsize)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    tile = min(config.tile, tpu.round_up(t, ROWS))
    tile = tile if tile < tpu.LANES else tpu.round_up(tile, tpu.LANES)
    how = How(taps, activation == "silu", t, tile, config)
    age, places, last_id = _places(how, b, last_id, segment_ids)
    wide = tpu.round_up(e, config.channels)
    arrays = dict(
        x=x,
        weight=tpu.pad_to(weight.astype(F32), 1, wide),
        before=tpu.pad_to(before, 2, wide),
    )
    if bias is not None:
        arrays["bias"] = tpu.pad_to(bias.astype(F32)[None], 1, wide)
    y, after = _conv(arrays, age, places, how)
    return y, after[:, :, :e], last_id


def _places(how: How, b: int, last_id, segment_ids):
    """Ages `[b t]` or None; int32 `[b 1]` places of the first token, of the last w - 1 inputs, and
    of the first of these that is of the last token's document; the last id.
    """
    t, keep = how.tokens, how.taps - 1
    if segment_ids is None:
        age = None
        if how.steps * how.tile > t:
            age = jnp.full((b, t), HALO, F32)
        of = lambda place: jnp.full((b, 1), place, jnp.int32)
        return age, (of(0), of(t - keep), of(_EARLIER)), last_id
    reset, valid, last_id = boundaries(segment_ids, last_id)
    places = jnp.arange(t, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(reset, places, _EARLIER), axis=1)
    age = jnp.where(valid, jnp.minimum(places - start, HALO), -1).astype(F32)
    leading = jnp.min(jnp.where(valid, places, t), axis=1, keepdims=True)
    end = jnp.max(jnp.where(valid, places, -1), axis=1, keepdims=True)
    end = jnp.where(end < 0, t - 1, end)
    return age, (leading, end + 1 - keep, jnp.take_along_axis(start, end, axis=1)), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(arrays, age, places, how: How):
    """y `[b t e]` and the last inputs `[b w-1 e]`; before is `[b w-1 e]` here."""
    y = forward(_for_kernel(arrays, age, places, how), how)
    return y, _after(places, arrays["before"], _rows_of(arrays["x"], places, how))


def _conv_forward(arrays, age, places, how: How):
    return _conv(arrays, age, places, how), (arrays, age, places)


def _conv_backward(how: How, residuals, cotangents):
    arrays, age, places = residuals
    dy, dafter = cotangents
    rows = _rows_of(arrays["x"], places, how)
    _, pull = jax.vjp(functools.partial(_after, places), arrays["before"], rows)
    dbefore, drows = pull(dafter)
    given = dict(dy=dy, dafter=_halo(drows), last=places[1][..., None])
    found = backward({**_for_kernel(arrays, age, places, how), **given}, how)
    found["before"] = found["before"][:, : how.taps - 1] + dbefore
    for name in ("weight", "bias"):
        if name in found:
            some = found[name].reshape(len(dy), -1, tpu.SUBLANES, found[name].shape[2])
            found[name] = jnp.sum(some, axis=(0, 2))
    return found, None, None


_conv.defvjp(_conv_forward, _conv_backward)


def _for_kernel(arrays, age, places, how: How) -> dict:
    found = {**arrays, "before": _halo(arrays["before"]), "leading": places[0][..., None]}
    if age is not None:
        length = tpu.round_up(how.steps * how.tile, tpu.LANES)
        found["age"] = tpu.pad_to(age[:, None], 2, length, -1)
    return found


def _halo(rows):
    """`[b HALO e]` from fewer rows."""
    return tpu.pad_to(rows, 1, HALO)


def _rows_of(x, places, how: How):
    """The last inputs `[b w-1 e]` of x, whatever where they are from before the call."""
    at = jnp.maximum(places[1] + jnp.arange(how.taps - 1), 0)
    rows = jnp.take_along_axis(x, at[..., None], axis=1).astype(F32)
    return tpu.pad_to(rows, 2, tpu.round_up(x.shape[2], how.config.channels))


def _after(places, before, rows):
    """The last inputs: those of the last token's document, from the state or from the call."""
    leading, last, start = places
    keep = before.shape[1]
    at = last + jnp.arange(keep)
    old = jnp.take_along_axis(before, jnp.clip(keep + at - leading, 0, keep - 1)[..., None], axis=1)
    rows = jnp.where((at >= leading)[..., None], rows, old)
    return jnp.where((at >= start)[..., None], rows, 0)
