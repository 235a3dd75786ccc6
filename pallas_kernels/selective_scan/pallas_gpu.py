"""selective_scan as Mosaic GPU kernels for Hopper, forward and backward.

Kept between the two: the arguments, and the state at the start of each chunk. README.md has grid,
buffers and bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, gpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.selective_scan.gpu_parts import F32, FORGET, How
from pallas_kernels.selective_scan.gpu_stretches import run_backward, run_forward

_CHUNKS = (64, 32, 16)
_GROUPS = (4, 8, 16)
_STATES = (1, 2, 4, 8)
_LEAST_TILE = 16  # two rows of so many float32 are 128 bytes
_REDUCED = 64  # rows of a layout in which a warpgroup sums quickly
_CORES = 132  # of an H100 or H200
_STRETCH = 128  # tokens that are worth the calls of a pass more
_SPARE = 4096  # bytes of shared memory that the compiler takes: barriers, sums between warps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut.

    Attributes:
        chunk: tokens per step backward, and between two states that are kept: 16, 32 or 64.
        tile: tokens per step forward; divides the chunk; a multiple of 16 on a device, where TMA
            puts what it copies at multiples of 128 bytes.
        group: tokens that pass over the states together, forward: 4, 8 or 16; divides the tile.
        states: states worked on together, forward: 1, 2, 4 or 8.
        group_backward: as `group`, backward; divides the chunk.
        states_backward: as `states`, backward; with `group_backward` they make 32, for then the
            sums for B and C are 64, which is as the hardware sums (an interpreter takes any).
        splits: stretches of time that run side by side, forward, at the price of a pass more over
            u and delta; 1 = none.
        splits_backward: as `splits`, backward, the pass being over delta, z and dy.
    """

    chunk: int = 64
    tile: int = 16
    group: int = 8
    states: int = 4
    group_backward: int = 16
    states_backward: int = 2
    splits: int = 1
    splits_backward: int = 1

    def __post_init__(self):
        allowed = dict(
            **dict(chunk=_CHUNKS, group=_GROUPS, group_backward=_GROUPS),
            **dict(states=_STATES, states_backward=_STATES),
        )
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"selective_scan: {name} is {getattr(self, name)}; it must be one of "
                    f"{', '.join(map(str, values))}"
                )
        if self.tile % self.group or self.chunk % self.tile:
            raise ValueError(
                f"selective_scan: tile is {self.tile}; it must be a multiple of group="
                f"{self.group} and divide chunk={self.chunk}"
            )
        if self.tile % _LEAST_TILE and not self.interpret:
            raise ValueError(
                f"selective_scan: tile is {self.tile}; it must be a multiple of {_LEAST_TILE}"
            )
        rows = 2 * self.states_backward * self.group_backward
        if rows != _REDUCED and not self.interpret:
            raise ValueError(
                f"selective_scan: states_backward x group_backward is {rows // 2}; it must be "
                f"{_REDUCED // 2}"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasGpuConfig":
        """The longest chunk that shared memory holds backward; the chip filled with blocks."""
        n, itemsize = sizes["n"], sizes.get("itemsize", 4)
        some = [x for x in _CHUNKS if x < 2 * sizes["t"]]
        chunk = next((x for x in some if _fits(x, n, itemsize)), _CHUNKS[-1])
        blocks = sizes["b"] * (_round_up(sizes["e"], gpu.WARPGROUP) // gpu.WARPGROUP)
        of = functools.partial(_splits, sizes["t"], chunk, blocks)
        return cls(chunk=chunk, splits=of(2), splits_backward=of(1), device_kind=device_kind)


def _splits(t: int, chunk: int, blocks: int, per_core: int) -> int:
    """Stretches of time with which blocks fill the chip, or 1 where most of it is busy anyway.

    Args:
        t: tokens; padding up to whole stretches may add a sixteenth.
        chunk: stretches are whole chunks.
        blocks: that there are without.
        per_core: how many of them a core is given.
    """
    splits = 1
    while (
        2 * blocks <= _CORES
        and 2 * splits * blocks <= per_core * _CORES
        and 2 * splits * _STRETCH <= t
        and _round_up(t, 2 * splits * chunk) <= t + t // 16
    ):
        splits *= 2
    return splits


def _fits(chunk: int, n: int, itemsize: int, group: int = 16) -> bool:
    """Whether a chunk's buffers fit into shared memory, backward (gpu_backward.py lists them)."""
    n, along = _round_up(n, 4), (2 * n + 2) * chunk * 4 * 2
    vectors = 6 * chunk * itemsize + (chunk // group + 4) * n * 4 + 4 * 4
    products = 64 * (gpu.WARPGROUP + 8) * 4
    return gpu.WARPGROUP * vectors + along + products + 2 * n * chunk * 4 <= (
        gpu.SHARED_MEMORY - _SPARE
    )


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `selective_scan`."""
    n = shapes[2].shape[1]
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is None and not _fits(_CHUNKS[-1], n, 4):
        return f"{n} states per channel do not fit into {gpu.SHARED_MEMORY} bytes of shared memory"
    return reason


def run(u, delta, A, B, C, D, z, delta_bias, h, last_id, segment_ids, *, delta_softplus, config):
    """See `selective_scan`; h `[b e n]` float32. Returns y, h, last_id."""
    b, t, e = u.shape
    n = A.shape[1]
    # Buffers are as wide as what they hold.
    widest = max(x.dtype.itemsize for x in (u, delta, z) if x is not None)
    sizes = dict(b=b, t=t, e=e, n=n, itemsize=widest)
    config = PallasGpuConfig.of(config, sizes, dispatch.device_kind(config))
    reset = valid = None
    tokens = _round_up(t, config.chunk * math.lcm(config.splits, config.splits_backward))
    channels = _round_up(e, gpu.WARPGROUP)
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    elif tokens > t:
        valid = jnp.ones((b, t), bool)
        reset = jnp.zeros((b, t), bool)
    most = max(config.states, config.states_backward)
    how = How(
        delta_softplus, _round_up(n, most), valid is not None, config.chunk, config.tile, config
    )

    def by_token(x):
        return None if x is None else _pad(x, b, tokens, channels)

    def along(x):  # [b n t]
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        return _pad(jnp.swapaxes(x, 1, 2).astype(F32), b, how.n, tokens)

    def state(x):  # [... n e] of [... e n]
        return _pad(jnp.swapaxes(x, -1, -2), *x.shape[:-2], how.n, channels)

    def by_channel(x):
        return jnp.zeros((channels,), F32) if x is None else _pad(x.astype(F32), channels)

    arrays = dict(
        **dict(u=by_token(u), delta=by_token(delta), z=by_token(z), B=along(B), C=along(C)),
        **dict(A=state(A.astype(F32)), D=by_channel(D), bias=by_channel(delta_bias), h=state(h)),
    )
    flags = None
    if valid is not None and reset is not None:
        flags = jnp.stack([valid.astype(F32), jnp.where(reset, FORGET, 0).astype(F32)], axis=1)
        flags = _pad(flags, b, 2, tokens)
    given = {name: x for name, x in arrays.items() if x is not None}
    y, last = _scan(given, flags, how)
    return y[:, :t, :e], jnp.swapaxes(last, 1, 2)[:, :e, :n], last_id


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _pad(x: jax.Array, *shape: int) -> jax.Array:
    """Zeros at the ends of axes."""
    more = [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, more) if any(end for _, end in more) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(arrays, flags, how: How):
    """y `[b t e]` and the last state `[b n e]`; B, C `[b n t]`, A `[n e]`, h `[b n e]`."""
    found = run_forward(arrays, flags, how, save=False)
    return found["y"], found["h"]


def _scan_forward(arrays, flags, how: How):
    found = run_forward(arrays, flags, how, save=True)
    kept = {name: x for name, x in arrays.items() if name != "h"}
    return (found["y"], found["h"]), (kept, found["starts"], flags)


def _scan_backward(how: How, residuals, cotangents):
    arrays, starts, flags = residuals
    dy, dlast = cotangents
    return run_backward(arrays, flags, dict(dy=dy, starts=starts, dlast=dlast), how), None


_scan.defvjp(_scan_forward, _scan_backward)
