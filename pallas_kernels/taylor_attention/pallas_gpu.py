"""taylor_attention as Mosaic GPU kernels for Hopper: features and states stay on the chip.

Kept between forward and backward: q, k, v, y, 1 / (z + eps) and the state before. README.md has
the grid, what a block does, and bytes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.core import dispatch, gpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.core.tpu import pad_to, round_up
from pallas_kernels.core.tpu_places import pack
from pallas_kernels.taylor_attention import gpu_forward, gpu_keys, gpu_queries
from pallas_kernels.taylor_attention.gpu_block import How, shared_bytes
from pallas_kernels.taylor_attention.gpu_layout import KEY, Widths, tables
from pallas_kernels.taylor_attention.gpu_streams import stream_buffers
from pallas_kernels.taylor_attention.gpu_warpgroup import ROWS

MOST_VALUES = 112  # columns of v: with more, a state does not fit the registers of a warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut.

    Attributes:
        slots: chunks of 64 tokens in shared memory at a time, if they fit: 1 or 2.
    """

    slots: int = 2

    def __post_init__(self):
        if self.slots not in (1, 2):
            raise ValueError(f"taylor_attention: slots is {self.slots}; it must be 1 or 2")


# Two parts of bfloat16 per number should be as good as float32 and are not yet: where keys are one
# number wide, the gradient by q is 3.5e-4 off, and 5e-5 is what the other forms keep to.
FLOAT32 = False


def refuses(shapes, device_kind) -> str | None:
    """Refuses devices, dtypes, single tokens, and widths whose states do not fit the chip."""
    q, k, v, *_ = shapes
    if reason := gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes):
        return reason
    if q.shape[1] == 1:
        return "one token is one pass over the state, which xla's step does"
    width, v_width = q.shape[3], v.shape[3]
    if width > KEY:
        return f"queries and keys are {width} wide; the kernel's features are those of 16 or less"
    if v_width > MOST_VALUES:
        return f"values are {v_width} wide; a state of more than {MOST_VALUES} fits no registers"
    if _dtype(q, k, v) == jnp.float32 and not FLOAT32:
        return "an argument is float32; gradients of the kernel are not that exact yet"
    need = _least_shared(Widths.of(q, v), _dtype(q, k, v))
    if need > gpu.SHARED_MEMORY:
        return (
            f"operands take {need // 1024} KiB of shared memory: float32 is multiplied as two "
            "bfloat16 numbers, and both do not fit at these widths"
        )
    return None


def _least_shared(widths: Widths, dtype) -> int:
    """Shared memory of the kernel that takes most of it, one chunk of tokens at a time."""
    of = lambda n, kind=dtype: jax.ShapeDtypeStruct((1, ROWS, 1, n), kind)
    row = jax.ShapeDtypeStruct((1, 1, ROWS), jnp.float32)
    along = dict(q=of(KEY), k=of(KEY), v=of(widths.values), places=row, inverse=row)
    more = along | dict(dy=of(widths.values), total=row)
    arrays = (along, more | dict(y=of(widths.values)), more)
    modules = (gpu_forward, gpu_queries, gpu_keys)
    return max(
        shared_bytes(stream_buffers(a, 1) | module.buffers(widths, dtype))
        for a, module in zip(arrays, modules, strict=True)
    )


def _dtype(*arrays):
    """What kernels are given: bfloat16 where all arrays are."""
    return jnp.dtype(jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32)


def run(q, k, v, kv, z, last_id, segment_ids, *, scale, normalize, eps, config):
    """See `taylor_attention`; kv `[b h f v]` and z `[b h f]` or None. Returns y, kv, z, last_id."""
    (b, t, h, width), v_width = q.shape, v.shape[-1]
    sizes = dict(b=b, t=t, h=h, k=width, v=v_width, itemsize=_dtype(q, k, v).itemsize)
    config = PallasGpuConfig.of(config, sizes, dispatch.device_kind(config))
    places, padded = None, round_up(t, ROWS)
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
        document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)  # 0 = the one of the state
        places = pack(document, valid, ROWS, padded)[:, 0]
    elif padded > t:
        document = jnp.zeros((b, t), jnp.int32)
        places = pack(document, jnp.ones((b, t), bool), ROWS, padded)[:, 0]
    how = How(scale, normalize, eps, config)
    return *_attention(q, k, v, kv, z, places, how), last_id


def _along(x: jax.Array, width: int, dtype) -> jax.Array:
    """`[b t h n]` as kernels take it: whole chunks, columns a multiple of 16."""
    return pad_to(pad_to(x, 1, round_up(x.shape[1], ROWS)), 3, width).astype(dtype)


def _prepared(q, k, v) -> tuple[Widths, Any, jax.Array, jax.Array, jax.Array]:
    """Widths, what the kernels' numbers are, and q, k, v as they take them."""
    widths, dtype = Widths.of(q, v), _dtype(q, k, v)
    q, k, v = _along(q, KEY, dtype), _along(k, KEY, dtype), _along(v, widths.values, dtype)
    return widths, dtype, q, k, v


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, kv, z, places, how: How):
    """y `[b t h v]` and the state after, kv `[b h f v]` and z `[b h f]`."""
    y, last, _ = _call(q, k, v, kv, z, places, how, save=False)
    return y[:, : v.shape[1], :, : v.shape[3]].astype(v.dtype), *Widths.of(q, v).from_tiles(last)


def _call(q, k, v, kv, z, places, how: How, *, save: bool):
    widths, _, q, k, v = _prepared(q, k, v)
    state = None if kv is None else widths.to_tiles(kv, z)
    known = tables(widths, how.scale)
    return gpu_forward.forward(q, k, v, known, state, places, widths, how, save=save)


def _attention_forward(q, k, v, kv, z, places, how: How):
    q, k, v, kv, z, places = jax.tree.map(lambda x: x.value, (q, k, v, kv, z, places))
    y, last, inverse = _call(q, k, v, kv, z, places, how, save=True)
    kept = (y, inverse) if how.normalize else (None, None)
    y = y[:, : v.shape[1], :, : v.shape[3]].astype(v.dtype)
    return (y, *Widths.of(q, v).from_tiles(last)), (q, k, v, kv, z, places, *kept)


def _attention_backward(how: How, residuals, cotangents):
    q, k, v, kv, z, places, y, inverse = residuals
    widths, dtype, q_, k_, v_ = _prepared(q, k, v)
    known = tables(widths, how.scale)
    dlast = None  # where nobody asked for the state, there is no gradient to make and read
    if not all(isinstance(x, SymbolicZero) for x in cotangents[1:]):
        dlast = widths.to_tiles(*map(_array, cotangents[1:]))
    dy = _along(_array(cotangents[0]), widths.values, dtype)
    state = None if kv is None else widths.to_tiles(kv, z)
    dq, total = gpu_queries.queries(q_, k_, v_, dy, y, inverse, known, state, places, widths, how)
    dk, dv, dstate = gpu_keys.keys_and_values(
        q_, k_, v_, dy, inverse, total, known, dlast, places, widths, how, has_state=kv is not None
    )
    dstate = (None, None) if kv is None else widths.from_tiles(dstate, gradient=True)
    cut = lambda dx, x: dx[:, : x.shape[1], :, : x.shape[3]].astype(x.dtype)
    return cut(dq, q), cut(dk, k), cut(dv, v), *dstate, None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _array(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
