"""selective_scan as Mosaic TPU kernels, forward and backward, the state staying on the chip.

Kept between the two: the arguments, and the state at the start of each chunk. README.md has grid,
blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.selective_scan.tpu_backward import backward
from pallas_kernels.selective_scan.tpu_forward import forward
from pallas_kernels.selective_scan.tpu_parts import F32, How

# Of the scoped limit: what blocks and scratch may take; the rest is the compiler's.
_SHARE = 0.65
_MOST_CHANNELS = 2048
_SHORTEST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens per step, and between two states that are kept: 16, 32, 64 or 128.
        tokens: of them, those written out in the program: 8 or 16 (bfloat16 needs 16 on a TPU).
        lanes: channels whose states are in registers at a time, forward; a multiple of 128.
        channels: per step, forward; a multiple of `lanes`.
        lanes_backward: as `lanes`, backward.
        channels_backward: as `channels`, backward; a multiple of `lanes_backward`.
    """

    chunk: int = 128
    tokens: int = 16
    lanes: int = 128
    channels: int = 128
    lanes_backward: int = 128
    channels_backward: int = 128

    def __post_init__(self):
        if self.chunk < _SHORTEST or tpu.LANES % self.chunk:
            raise ValueError(f"selective_scan: chunk is {self.chunk}; it must be 16, 32, 64 or 128")
        if self.tokens not in (8, 16):
            raise ValueError(f"selective_scan: tokens is {self.tokens}; it must be 8 or 16")
        for channels, lanes in (
            (self.channels, self.lanes),
            (self.channels_backward, self.lanes_backward),
        ):
            if lanes % tpu.LANES or channels % lanes:
                raise ValueError(
                    f"selective_scan: {lanes} lanes of {channels} channels; lanes must be a "
                    "multiple of 128 and divide the channels"
                )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """As many channels per step as the vector memory allows."""
        room = _SHARE * tpu.generation(device_kind).scoped_vmem
        e, n = tpu.round_up(sizes["e"], tpu.LANES), tpu.round_up(sizes["n"], tpu.SUBLANES)
        fits = lambda chunk, channels, backward: (
            _bytes(chunk, n, channels, sizes.get("itemsize", 4), backward) <= room
        )
        chunk = tpu.LANES
        while chunk > _SHORTEST and not fits(chunk, tpu.LANES, True):
            chunk //= 2
        some = [x for x in range(tpu.LANES, min(e, _MOST_CHANNELS) + 1, tpu.LANES) if e % x == 0]
        channels, channels_backward = (
            max((x for x in some if fits(chunk, x, backward)), default=tpu.LANES)
            for backward in (False, True)
        )
        return cls(
            chunk=chunk,
            channels=channels,
            channels_backward=channels_backward,
            device_kind=device_kind,
        )


def _bytes(chunk: int, n: int, channels: int, itemsize: int, backward: bool) -> int:
    """Of the vector memory: blocks twice, scratch once."""
    tokens = chunk * channels * itemsize * (7 if backward else 4)
    states = 4 * n * channels * 4
    columns = 4 * chunk * n * tpu.LANES
    return 2 * (tokens + states) + (5 if backward else 2) * columns


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `selective_scan`."""
    n = shapes[2].shape[1]
    least = _bytes(_SHORTEST, tpu.round_up(n, tpu.SUBLANES), tpu.LANES, 4, True)
    limit = tpu.generation(device_kind).scoped_vmem
    if least > _SHARE * limit:
        return (
            f"{n} states per channel take {least / tpu.MIB:.0f} MiB of vector memory in the "
            f"smallest tiles, of {limit / tpu.MIB:.0f}"
        )
    return tpu.refuses_dtypes(shapes)


def run(u, delta, A, B, C, D, z, delta_bias, h, last_id, segment_ids, *, delta_softplus, config):
    """See `selective_scan`; h `[b e n]` float32. Returns y, h, last_id."""
    b, t, e = u.shape
    n = A.shape[1]
    sizes = dict(b=b, t=t, e=e, n=n, itemsize=u.dtype.itemsize)
    config = PallasTpuConfig.of(config, sizes, dispatch.device_kind(config))
    how = How(delta_softplus, e, _chunk(t, config.chunk), config)
    tokens, states = tpu.round_up(t, how.chunk), tpu.round_up(n, tpu.SUBLANES)
    channels = tpu.round_up(e, config.channels)
    if channels != tpu.round_up(e, config.channels_backward):
        raise ValueError(
            f"selective_scan: {e} channels end elsewhere in blocks of channels={config.channels} "
            f"than of channels_backward={config.channels_backward}"
        )
    reset = valid = None
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    elif tokens > t:
        valid = jnp.ones((b, t), bool)

    def by_lane(x):  # [b n t] of B and C; [b 1 t] of flags
        return tpu.pad_to(x, 2, tpu.round_up(tokens, tpu.LANES))

    def along(x):
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        return by_lane(tpu.pad_to(jnp.swapaxes(x, 1, 2), 1, states))

    def by_channel(x):
        return None if x is None else tpu.pad_to(x.astype(F32)[None], 1, channels)

    def state(x):  # [... n e] of [... e n]
        return tpu.pad_to(tpu.pad_to(jnp.swapaxes(x, -1, -2), -1, channels), -2, states)

    arrays = dict(
        **dict(u=u, delta=delta, z=z, B=along(B), C=along(C)),
        **dict(A=state(A.astype(F32)), D=by_channel(D), bias=by_channel(delta_bias)),
        h=state(h),
    )
    flags = dict(
        valid=None if valid is None else by_lane(valid.astype(F32)[:, None]),
        reset=None if reset is None else by_lane(reset.astype(jnp.int32)[:, None]),
    )
    y, last = _scan(_given(arrays), _given(flags), how)
    return y, jnp.swapaxes(last, 1, 2)[:, :e, :n], last_id


def _chunk(t: int, longest: int) -> int:
    """The shortest chunk that holds t tokens, up to `longest`."""
    chunk = _SHORTEST
    while chunk < min(t, longest):
        chunk *= 2
    return chunk


def _given(arrays: dict) -> dict:
    return {name: x for name, x in arrays.items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(arrays, flags, how: How):
    """y `[b t e]` and the last state `[b n e]`; arrays as `forward` takes them."""
    found = forward({**arrays, **flags}, how, save=False)
    return found["y"], found["h"]


def _scan_forward(arrays, flags, how: How):
    found = forward({**arrays, **flags}, how, save=True)
    kept = {name: x for name, x in arrays.items() if name != "h"}
    return (found["y"], found["h"]), ({**kept, "starts": found["starts"]}, flags)


def _scan_backward(how: How, residuals, cotangents):
    arrays, flags = residuals
    dy, dlast = cotangents
    found = backward({**arrays, **flags, "dy": dy, "dlast": dlast}, how)
    for name in ("B", "C"):
        found[name] = jnp.sum(found[name], axis=1).astype(arrays[name].dtype)
    found["A"] = jnp.sum(found["A"], axis=0)
    for name in ("D", "bias"):
        if name in found:
            found[name] = jnp.sum(found[name], axis=(0, 1))[None]
    return found, None


_scan.defvjp(_scan_forward, _scan_backward)
