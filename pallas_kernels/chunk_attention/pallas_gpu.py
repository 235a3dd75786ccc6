"""chunk_attention's sliding window by cuDNN's attention, through jax.nn.dot_product_attention.

Nothing of it is ours but what is served: one document from its start, whole. cuDNN's backward pass
adds in no fixed order: its gradients differ in their last digits from run to run.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax._src import lib

from pallas_kernels.chunk_attention.places import after, places
from pallas_kernels.core import gpu

library = "cuDNN"
WIDEST = 256  # keys of a head, on Hopper
_IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """Nothing is left to choose: cuDNN has its own heuristics."""


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `chunk_attention`."""
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    q, k, v, *_, segment_ids = shapes
    for name, x in dict(q=q, k=k, v=v).items():
        if x.dtype != jnp.bfloat16:
            return f"{name} is {x.dtype}; cuDNN's attention takes bfloat16"
    if k.shape[-1] != v.shape[-1]:
        return f"keys are {k.shape[-1]} wide and values {v.shape[-1]}; cuDNN wants one width"
    if k.shape[-1] % 8 or k.shape[-1] > WIDEST:
        return f"heads are {k.shape[-1]} wide; cuDNN takes multiples of 8 up to {WIDEST}"
    if segment_ids is not None:
        return "there are segment ids; cuDNN would have to know before how many documents there are"
    return _no_cudnn()


def refuses_options(shapes, device_kind, *, form) -> str | None:
    """The reason against these options."""
    del shapes, device_kind
    if form.chunk is not None:
        return "cuDNN knows windows; chunks with bias and other scores are xla's"
    if not form.fresh:
        return "a state comes in, whose keys stand before the first query: cuDNN counts both from 0"
    return None


def _no_cudnn() -> str | None:
    """Why jax would not lower cuDNN's call here: it asks this machine's library and GPU."""
    if jax.default_backend() != "gpu":
        return "cuDNN is asked when the call is traced, and this machine has no GPU"
    versions = getattr(lib, "cuda_versions", None)
    try:
        found = versions is not None and versions.cudnn_get_version() > 0
    except RuntimeError:  # it could not be loaded
        found = False
    return None if found else "cuDNN is not installed"


def run(q, k, v, bias, ring_k, ring_v, count, last_id, segment_ids, *, form, config):
    """See `chunk_attention`; the ring `[b g l k]`, `[b g l v]` in float32, which is empty."""
    del bias
    PallasGpuConfig.of(config, {})
    b, t, _, _ = q.shape
    place = places(segment_ids, last_id, count, b, t)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=form.scale,
        is_causal=True,
        local_window_size=None if form.slots >= t else (form.slots - 1, 0),
        implementation=_IMPLEMENTATION,
    )
    return y, after(ring_k, k, place), after(ring_v, v, place), place.total, place.last_id
