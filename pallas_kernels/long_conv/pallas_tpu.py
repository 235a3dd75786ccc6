"""long_conv as Mosaic TPU kernels: transforms as matrix products, gates and skip with them.

Kept between forward and backward: the call's own arguments. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.tpu_parts import limit_for, most_room
from pallas_kernels.long_conv import tpu_long, tpu_short
from pallas_kernels.long_conv.convolution import convolve
from pallas_kernels.long_conv.documents import last_inputs
from pallas_kernels.long_conv.tpu_short import Short
from pallas_kernels.long_conv.tpu_stages import Long
from pallas_kernels.long_conv.xla import XlaConfig

# Of the scoped limit: what blocks and scratch take, if it can be, and at most.
_SHARE, _MOST = 0.72, 0.94


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        short: up to this length a transform is one product with a matrix, else two.
        tokens: of short rows in a step, in as many rows of the batch.
        block: tokens of a long row that come and go at once; a multiple of 128.
    """

    short: int = 1024
    tokens: int = 1024
    block: int = 512

    def __post_init__(self):
        if self.block < 1 or self.block % tpu.LANES:
            raise ValueError(f"long_conv: block is {self.block}; it must be a multiple of 128")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasTpuConfig":
        """The same for all sizes."""
        del sizes
        return cls(device_kind=device_kind)


class Arguments(NamedTuple):
    """What the kernels take; channel is float32 `[2 e]`, skip and bias (None in a plan)."""

    u: jax.Array
    kernel: jax.Array
    reverse: jax.Array | None
    channel: jax.Array | None
    pre: jax.Array | None
    post: jax.Array | None


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `long_conv`."""
    reason = tpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    u, kernel, _, reverse, _, pre, post, _, _, segment_ids = shapes
    if segment_ids is not None:
        return "there are segment ids; documents are convolved half by half, which xla does"
    given = Arguments(u, kernel, reverse, None, pre, post)
    plan = plan_of(given, PallasTpuConfig(device_kind=device_kind))
    need, most = _bytes(plan, u), most_room(device_kind, _MOST)
    if need > most:
        return (
            f"rows of {u.shape[1]} tokens take {need / tpu.MIB:.0f} MiB of vector memory and there "
            f"is room for {most / tpu.MIB:.0f}"
        )
    return None


def _bytes(plan: Short | Long, u) -> int:
    itemsize = jnp.dtype(u.dtype).itemsize
    return (tpu_short if isinstance(plan, Short) else tpu_long).vmem(plan, itemsize)


def plan_of(given: Arguments, config: PallasTpuConfig) -> Short | Long:
    """How a call is computed: by one stage or by two."""
    (b, t, _), available = given.u.shape, given.kernel.shape[1]
    lags, two_sided = min(available, t), given.reverse is not None
    least = t + lags - (not two_sided)
    more: dict[str, Any] = dict(
        t=t,
        lags=lags,
        two_sided=two_sided,
        pre=given.pre is not None,
        post=given.post is not None,
        operands="bfloat16" if given.u.dtype == jnp.bfloat16 else "float32",
    )
    if least <= config.short:
        width = min(available, tpu.round_up(lags, tpu.LANES))
        batch = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * t <= config.tokens))
        return Short(n=tpu.round_up(least, 32), width=width, batch=batch, **more)
    return tpu_long.plan_of(least, config.block, more)


def run(
    u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate, before, last_id, segment_ids,
    *, config,
):  # fmt: skip
    """See `long_conv`; before `[b l-1 e]` in the dtype to compute in, or None; gives y, before,
    last_id."""
    del segment_ids
    kind = dispatch.device_kind(config)
    b, t, e = u.shape
    sizes = dict(b=b, t=t, e=e, l=kernel.shape[1], itemsize=u.dtype.itemsize)
    config = PallasTpuConfig.of(config, sizes, kind)
    of = lambda x: jnp.zeros((e,), jnp.float32) if x is None else x.astype(jnp.float32)
    channel = jnp.stack([of(skip), of(bias)])
    given = Arguments(u, kernel, reverse_kernel, channel, pre_gate, post_gate)
    plan = plan_of(given, config)
    if config.vmem_limit_bytes is None:
        limit = limit_for(_bytes(plan, u), kind, _SHARE)
        config = dataclasses.replace(config, vmem_limit_bytes=limit)
    y = _convolution(plan, config, given)
    if reverse_kernel is not None:
        return y, None, None
    wide = lambda x: x.astype(jnp.float32)
    if before is not None and kernel.shape[1] > 1:
        z = _from_state(before, wide(kernel).T, t)
        y = (wide(y) + (z if post_gate is None else z * wide(post_gate))).astype(y.dtype)
    v = wide(u) if pre_gate is None else wide(u) * wide(pre_gate)
    return y, last_inputs(v, before, None, kernel.shape[1] - 1), last_id


def _from_state(before, kernel, t: int):
    """What the inputs before this call give to its tokens, `[b t e]`."""
    reach = before.shape[1]
    reached = min(t, reach)
    way = XlaConfig().way(reach, reach, reached)
    z = convolve(way, before, kernel[1:], 1 - reach, reached)
    return jnp.pad(z, ((0, 0), (0, t - reached), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(plan, config, given: Arguments):
    """y `[b t e]` of a sequence without a past."""
    return (tpu_short if isinstance(plan, Short) else tpu_long).forward(*given, plan, config)


def _convolution_forward(plan, config, given):
    return _convolution(plan, config, given), given


def _convolution_backward(plan, config, given, dy):
    kernels = tpu_short if isinstance(plan, Short) else tpu_long
    found = kernels.backward(*given, dy, plan, config)
    found = Arguments(*found)
    of_lags = functools.partial(_of_lags, plan.lags)
    kernel = of_lags(found.kernel, given.kernel)
    reverse = None if given.reverse is None else of_lags(found.reverse, given.reverse)
    return (found._replace(kernel=kernel, reverse=reverse),)


def _of_lags(lags: int, gradient, of):
    """The gradient of a kernel, 0 where its lags do not count."""
    if of.shape[1] > lags:
        gradient = tpu.pad_to(gradient[:, :lags], 1, of.shape[1])
    return gradient.astype(of.dtype)


_convolution.defvjp(_convolution_forward, _convolution_backward)
