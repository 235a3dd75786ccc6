"""monarch_matmul as Mosaic TPU kernels: what stands between the factors stays on the chip.

Kept between forward and backward: the arguments. Factors lie in the vector memory as a whole.
README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.tpu_parts import limit_for, most_room, room
from pallas_kernels.monarch_matmul import tpu_blocks, tpu_monarch

_MOST_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        tokens: of a step, forward; a multiple of 128.
        backward_tokens: of a step, backward.
    """

    tokens: int = tpu.LANES
    backward_tokens: int = tpu.LANES

    def __post_init__(self):
        if min(self.tokens, self.backward_tokens) < 1 or (
            self.tokens % tpu.LANES or self.backward_tokens % tpu.LANES
        ):
            raise ValueError(
                f"monarch_matmul: config has tokens={self.tokens}, backward_tokens="
                f"{self.backward_tokens}; both must be multiples of 128"
            )

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """As many tokens as the vector memory has room for; more of it where factors are large."""
        most = max(tpu.LANES, min(_MOST_TOKENS, tpu.round_up(sizes["rows"], tpu.LANES)))
        tokens = range(most, 0, -tpu.LANES)
        fits = room(device_kind)
        forward, backward = (
            next((n for n in tokens if _bytes(sizes, n, back) <= fits), tpu.LANES)
            for back in (False, True)
        )
        return cls(tokens=forward, backward_tokens=backward, device_kind=device_kind)


def _sizes(x, w1, w2) -> dict[str, int]:
    sizes = dict(zip("kqp", w1.shape, strict=True))
    if w2 is not None:
        sizes |= dict(zip("lsr", w2.shape, strict=True))
    itemsize = jnp.dtype(x.dtype).itemsize
    return sizes | dict(rows=math.prod(x.shape[:-1]), itemsize=itemsize)


def _bytes(sizes: Mapping[str, int], tokens: int, backward: bool) -> int:
    """Of the vector memory that a step takes."""
    kernels = tpu_monarch if "l" in sizes else tpu_blocks
    return kernels.vmem(sizes, tokens, backward)


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `monarch_matmul`."""
    reason = tpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    x, w1, w2 = shapes
    if math.prod(x.shape) == 0:
        return "there are no tokens"
    need = _bytes(_sizes(x, w1, w2), tpu.LANES, True)
    most = most_room(device_kind)
    if need > most:
        return (
            f"factors and their gradients take {need / tpu.MIB:.0f} MiB of vector memory and the "
            f"device has room for {most / tpu.MIB:.0f}; more and smaller blocks fit"
        )
    return None


def run(x, w1, w2, *, config):
    """See `monarch_matmul`; gives y."""
    kind, sizes = dispatch.device_kind(config), _sizes(x, w1, w2)
    config = PallasTpuConfig.of(config, sizes, kind)
    if config.vmem_limit_bytes is None:
        need = max(_bytes(sizes, config.tokens, False), _bytes(sizes, config.backward_tokens, True))
        config = dataclasses.replace(config, vmem_limit_bytes=limit_for(need, kind))
    rows = x.reshape(-1, x.shape[-1])
    y = _block_diagonal(rows, w1, config) if w2 is None else _monarch(rows, w1, w2, config)
    return y.reshape(*x.shape[:-1], -1)


# --- One factor ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _block_diagonal(x, w, config: PallasTpuConfig):
    return tpu_blocks.forward(x, _turned(w, x), config)


def _block_diagonal_forward(x, w, config):
    return _block_diagonal(x, w, config), (x, w)


def _block_diagonal_backward(config, residuals, dy):
    x, w = residuals
    dx, dw = tpu_blocks.backward(x, _turned(w, x), dy, config)
    return dx, jnp.swapaxes(dw, 1, 2).astype(w.dtype)


_block_diagonal.defvjp(_block_diagonal_forward, _block_diagonal_backward)


def _turned(w, x):
    """`[k p q]` in the dtype of x."""
    return jnp.swapaxes(w, 1, 2).astype(x.dtype)


# --- Two factors --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _monarch(x, w1, w2, config: PallasTpuConfig):
    first, second = (_gathered(w.astype(x.dtype)) for w in (w1, w2))
    return tpu_monarch.forward(x, first, second, len(w2), config)


def _monarch_forward(x, w1, w2, config):
    return _monarch(x, w1, w2, config), (x, w1, w2)


def _monarch_backward(config, residuals, dy):
    x, w1, w2 = residuals
    first, second = (_gathered(w.astype(x.dtype)) for w in (w1, w2))
    second = jnp.swapaxes(second, 1, 2)
    dx, dw1, dw2 = tpu_monarch.backward(x, first, second, dy, len(w2), config)
    dw1, dw2 = _apart(dw1, len(w1)), _apart(jnp.swapaxes(dw2, 1, 2), len(w2))
    return dx, dw1.astype(w1.dtype), dw2.astype(w2.dtype)


_monarch.defvjp(_monarch_forward, _monarch_backward)


def _gathered(w):
    """Small blocks `[k q p]` put together, so that they fill a matrix unit: `[k/n n*q n*p]`.

    What stands between the blocks is 0: the unit takes as long for it as for less.
    """
    k, q, p = w.shape
    n = tpu_monarch.gathered(k, q, p)
    if n == 1:
        return w
    w = w.reshape(k // n, n, q, 1, p) * jnp.eye(n, dtype=w.dtype)[:, None, :, None]
    return w.reshape(k // n, n * q, n * p)


def _apart(w, k: int):
    """The gradient of k blocks from that of blocks put together."""
    groups, q, p = w.shape
    n = k // groups
    w = w.reshape(groups, n, q // n, n, p // n)
    return jnp.stack([w[:, i, :, i] for i in range(n)], axis=1).reshape(k, q // n, p // n)
