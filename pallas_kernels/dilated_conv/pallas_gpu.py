"""dilated_conv as Mosaic GPU kernels for Hopper: a level is one kernel, its taps in registers.

Kept between forward and backward: what each level reads. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core import gpu
from pallas_kernels.dilated_conv import ring as rings
from pallas_kernels.dilated_conv import xla
from pallas_kernels.dilated_conv.gpu_backward import backward
from pallas_kernels.dilated_conv.gpu_level import (
    LANES,
    NUMBERS,
    Walk,
    chunk_rows,
    forward,
    walk_of,
)

_MOST_TAPS = 33  # registers: a window, a chunk, and in the backward pass a gradient for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut: nothing to choose."""


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `dilated_conv`."""
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    taps = shapes[1].shape[1]
    if taps > _MOST_TAPS:
        return f"levels have {taps} taps; the kernel keeps up to {_MOST_TAPS} in registers"
    return None


def refuses_options(shapes, device_kind, *, symmetric, **more) -> str | None:
    """The reason against these options."""
    del device_kind, more
    if shapes[0].shape[1] == 1 and not symmetric:
        return "one token of a stream meets rings as they lie"
    return None


def run(
    x, weight, bias, ring, count, last_id, segment_ids, *, config, dilations, activation, symmetric,
    fresh,
):  # fmt: skip
    """See `dilated_conv`; gives y, ring, count, last_id (symmetric: y alone)."""
    b, t, e = x.shape
    config = PallasGpuConfig.of(config, dict(b=b, t=t, e=e))
    taps, f32 = weight.shape[1], jnp.float32
    bias = jnp.zeros((len(weight), e)) if bias is None else bias
    wide = lambda a: jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, -e % LANES),))
    s, weight, bias = wide(x), wide(weight.astype(f32)), wide(bias.astype(f32))
    old = wide(ring)
    call = xla.after_call(x, count, last_id, segment_ids)
    sights, end = call.sights, call.end
    if sights is not None:  # a gradient's sum takes 0 times what is not seen: it may be no number
        s = jnp.where(sights.valid[..., None], s, 0)
    turned = sights is not None and not fresh
    if turned:  # the past stands right before the first row: so does the first token
        s = rings.turned(s, call.first)
        sights = jax.tree.map(lambda a: rings.turned(a, call.first), sights)
        end = jnp.maximum(end - call.first, 0)
    new = []
    for i, at in enumerate(rings.places(taps, dilations)):
        held = rings.after(old[:, at], s.astype(f32), call.count, end, call.held, call.reset)
        new.append(held[..., :e])
        past = None if fresh else rings.in_order(old[:, at], count)
        dtype = x.dtype if i + 1 == len(dilations) else f32
        s = _one_level(
            s, weight[i], bias[i], past, sights, dilations[i], dtype, config,
            activation == "relu_res", symmetric,
        )  # fmt: skip
    y = rings.turned(s, -call.first) if turned else s
    y = y[..., :e]
    return y if symmetric else (y, jnp.concatenate(new, axis=1), call.count, call.last_id)


def _one_level(
    s, weight, bias, past, sights, dilation: int, dtype, config, residual: bool, symmetric: bool
):
    """The next level `[b t e]` from `[b t e]`, e a multiple of 128."""
    b, t, e = s.shape
    taps = len(weight)
    most = (t - 1) // dilation  # taps that look further see nothing of this call
    middle = taps // 2 if symmetric else 0
    ahead = min(middle, most)
    back = taps - 1 - middle if past is not None else min(taps - 1 - middle, most)
    weight = weight[middle - ahead : middle + back + 1]
    block = dilation * chunk_rows(len(weight))
    whole = t + -t % block
    walk = walk_of(
        b, t, e, len(weight), dilation,
        ahead=ahead, residual=residual, past=past is not None and back > 0,
        sights=0 if sights is None else 1 + (ahead > 0),
    )  # fmt: skip
    numbers = ()
    if sights is not None:
        numbers = _numbers(sights, b, whole, dilation, len(weight))[: walk.sights]
    x = jnp.pad(s, ((0, 0), (0, whole - t), (0, 0))).reshape(b, -1, dilation, e)
    if walk.past:
        rows = past.reshape(b, -1, dilation, e)
        past = jnp.pad(rows, ((0, 0), (walk.edge - rows.shape[1], 0), (0, 0), (0, 0)))
    else:
        past = None
    y = _level(x, weight, bias, past, numbers, walk, jnp.dtype(dtype), config)
    return y.reshape(b, whole, e)[:, :t]


def _numbers(sights, b: int, whole: int, dilation: int, taps: int):
    """How many rows each token sees behind and ahead; -1 = it is no token.

    int32 `[b*d chunks 32]`, those of a chunk's rows first.
    """
    found, rows = [], chunk_rows(taps)
    for seen in (sights.behind, sights.ahead):
        seen = jnp.minimum(seen // dilation, taps)
        seen = jnp.where(sights.valid, seen, -1)
        seen = jnp.pad(seen, ((0, 0), (0, whole - seen.shape[1])), constant_values=-1)
        seen = jnp.swapaxes(seen.reshape(b, -1, dilation), 1, 2).reshape(b * dilation, -1, rows)
        found.append(jnp.pad(seen, ((0, 0), (0, 0), (0, NUMBERS - rows))))
    return tuple(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _level(x, weight, bias, past, sights, walk: Walk, dtype, config):
    """See gpu_level.forward."""
    return forward(x, weight, bias, past, sights, walk, dtype, config)


def _level_forward(x, weight, bias, past, sights, walk, dtype, config):
    y = _level(x, weight, bias, past, sights, walk, dtype, config)
    return y, (x, weight, bias, past, sights)


def _level_backward(walk, dtype, config, residuals, dy):
    del dtype
    x, weight, bias, past, sights = residuals
    dx, dweight, dbias, dpast = backward(x, weight, bias, past, sights, dy, walk, config)
    if dpast is not None:
        dpast = jnp.pad(dpast, ((0, 0), (walk.edge - walk.rows, 0), (0, 0), (0, 0)))
    return dx, dweight, dbias, dpast, tuple(None for _ in sights)


_level.defvjp(_level_forward, _level_backward)
