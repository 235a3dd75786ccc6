"""monarch_matmul as Mosaic GPU kernels for Hopper: products on wgmma, permutations by addressing.

Kept between forward and backward: the arguments and Z'. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, gpu
from pallas_kernels.monarch_matmul import gpu_blocks, gpu_monarch

_MOST_OUTPUTS = 256  # of a block of w1: the accumulators of 64 tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut.

    Attributes:
        stages: chunks of operands that are fetched or worked on at the same time.
    """

    stages: int = 4

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"monarch_matmul: config has stages={self.stages}; at least 2")


def _sizes(x, w1, w2) -> dict[str, int]:
    sizes = dict(zip("kqp", w1.shape, strict=True))
    if w2 is not None:
        sizes |= dict(zip("lsr", w2.shape, strict=True))
    return sizes | dict(b=x.shape[0], t=x.shape[1], itemsize=x.dtype.itemsize)


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `monarch_matmul`."""
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    x, w1, w2 = shapes
    if x.dtype != jnp.bfloat16:
        return (
            f"x is {x.dtype}; the matrix unit multiplies bfloat16, and float32 only as TF32, which "
            "is not exact to 1e-5"
        )
    if math.prod(x.shape) == 0:
        return "there are no tokens"
    sizes = dict(zip("qp", w1.shape[1:], strict=True))
    if w2 is not None:
        sizes |= dict(zip("sr", w2.shape[1:], strict=True))
    for name, size in sizes.items():
        if size % gpu_blocks.CHUNK:
            return f"{name} is {size}; blocks must have multiples of 64 for the matrix unit"
    return None if w2 is None else _refuses_two(w1, w2)


def _refuses_two(w1, w2) -> str | None:
    (k, q, p), n_blocks = w1.shape, w2.shape[0]
    if n_blocks not in (2, 4):
        return f"w2 has {n_blocks} blocks; the kernel turns round 2 or 4"
    if q % (16 * n_blocks) or q > _MOST_OUTPUTS:
        return (
            f"blocks of w1 have {q} outputs; with {n_blocks} blocks of w2 the kernel takes "
            f"multiples of {16 * n_blocks} up to {_MOST_OUTPUTS}"
        )
    need = gpu_monarch.shared(k, q, p)
    if need > gpu.SHARED_MEMORY:
        return (
            f"what stands between the factors, {k * q} numbers per token, takes {need} bytes of "
            f"shared memory with its operands, and a block has {gpu.SHARED_MEMORY}"
        )
    return None


def run(x, w1, w2, *, config):
    """See `monarch_matmul`; gives y."""
    config = PallasGpuConfig.of(config, _sizes(x, w1, w2), dispatch.device_kind(config))
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    rows = jnp.pad(rows, ((0, -n % gpu_blocks.CHUNK), (0, 0)))  # none, of any usual length
    y = _block_diagonal(rows, w1, config) if w2 is None else _monarch(rows, w1, w2, config)
    return y[:n].reshape(*x.shape[:-1], -1)


# --- One factor ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _block_diagonal(x, w, config: PallasGpuConfig):
    return gpu_blocks.product(x, w.astype(x.dtype), config)


def _block_diagonal_forward(x, w, config):
    return _block_diagonal(x, w, config), (x, w)


def _block_diagonal_backward(config, residuals, dy):
    x, w = residuals
    dx = gpu_blocks.product(dy, jnp.swapaxes(w, 1, 2).astype(x.dtype), config)
    return dx, gpu_blocks.gradient(dy, x, len(w), config).astype(w.dtype)


_block_diagonal.defvjp(_block_diagonal_forward, _block_diagonal_backward)


# --- Two factors --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _monarch(x, w1, w2, config: PallasGpuConfig):
    first = gpu_monarch.permuted(w1, len(w2)).astype(x.dtype)
    return gpu_monarch.forward(x, first, w2.astype(x.dtype), config)[0]


def _monarch_forward(x, w1, w2, config):
    first = gpu_monarch.permuted(w1, len(w2)).astype(x.dtype)
    y, z = gpu_monarch.forward(x, first, w2.astype(x.dtype), config, save=True)
    return y, (x, w1, w2, z)


def _monarch_backward(config, residuals, dy):
    x, w1, w2, z = residuals
    first = gpu_monarch.permuted(w1, len(w2)).astype(x.dtype)
    dx, dz = gpu_monarch.backward(dy, first, w2.astype(x.dtype), config)
    dw1 = gpu_blocks.gradient(dz, x, len(w1), config)
    dw1 = gpu_monarch.back_permuted(dw1, len(w2))
    dw2 = gpu_monarch.gradient(dy, z, len(w2), config)
    return dx, dw1.astype(w1.dtype), dw2.astype(w2.dtype)


_monarch.defvjp(_monarch_forward, _monarch_backward)
