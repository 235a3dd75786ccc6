"""long_conv as Mosaic GPU kernels: transforms as matrix products, gates and skip with them.

Kept between forward and backward: the call's own arguments and the kernels' spectrum. README.md has
the blocks and bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, gpu
from pallas_kernels.long_conv import gpu_lags, gpu_tokens
from pallas_kernels.long_conv.documents import last_inputs
from pallas_kernels.long_conv.gpu_plan import LONGEST, ROWS, SHORTEST, Plan, plan_of
from pallas_kernels.long_conv.streams import from_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpuConfig(gpu.GpuConfig):
    """How the work is cut.

    Attributes:
        tokens: that a warpgroup brings at once; a multiple of 128.
        channels: of a block, a multiple of 8 on a device: 16 bytes lie together; None = as many of
            8 or 16 as there is room for.
    """

    tokens: int = 256
    channels: int | None = None

    def __post_init__(self):
        if self.tokens < 128 or self.tokens % 128:
            raise ValueError(f"long_conv: tokens is {self.tokens}; it must be a multiple of 128")

    @classmethod
    def heuristic(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> "PallasGpuConfig":
        """As many as a row is whole pieces of; fewer where a block has more channels."""
        most = (512, 256) if sizes["t"] > LONGEST // 2 else (256,)
        whole = (tokens for tokens in most if sizes["t"] % tokens == 0)
        return cls(tokens=next(whole, 128), device_kind=device_kind)


class Arguments(NamedTuple):
    """What is differentiated."""

    u: jax.Array
    kernel: jax.Array
    reverse: jax.Array | None
    skip: jax.Array | None
    bias: jax.Array | None
    pre: jax.Array | None
    post: jax.Array | None


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `long_conv`."""
    reason = gpu.refuses_device(device_kind) or gpu.refuses_dtypes(shapes)
    if reason is not None:
        return reason
    u, *_, segment_ids = shapes
    if u.dtype != jnp.bfloat16:
        return (
            f"u is {u.dtype}; the matrix unit multiplies bfloat16, 4e-3 off, which is for a u of "
            "bfloat16: xla transforms in full precision"
        )
    if segment_ids is not None:
        return "there are segment ids; documents are convolved half by half, which xla does"
    if u.shape[1] < SHORTEST:
        return f"rows of {u.shape[1]} tokens would mostly be filling: a transform is of 2,048"
    if u.shape[1] > LONGEST:
        return f"a row has {u.shape[1]} tokens and shared memory has room for {LONGEST}"
    return None


def run(
    u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate, before, last_id, segment_ids,
    *, config,
):  # fmt: skip
    """See `long_conv`; before `[b l-1 e]` in the dtype to compute in, or None; gives y, before,
    last_id."""
    del segment_ids
    b, t, e = u.shape
    sizes = dict(b=b, t=t, e=e, l=kernel.shape[1], itemsize=u.dtype.itemsize)
    config = PallasGpuConfig.of(config, sizes, dispatch.device_kind(config))
    plan = plan_of(t, config.tokens, config.channels, config)
    given = Arguments(u, kernel, reverse_kernel, skip, bias, pre_gate, post_gate)
    y = _convolution(plan, given)
    if reverse_kernel is not None:
        return y, None, None
    wide = lambda x: x.astype(jnp.float32)
    if before is not None and kernel.shape[1] > 1:
        z = from_state(before, wide(kernel).T, t)
        y = (wide(y) + (z if post_gate is None else z * wide(post_gate))).astype(y.dtype)
    v = wide(u) if pre_gate is None else wide(u) * wide(pre_gate)
    return y, last_inputs(v, before, None, kernel.shape[1] - 1), last_id


def _tokens(x, plan: Plan):
    """`[b t e]` as `[b rows 2M e]`, with zeros to whole blocks."""
    if x is None:
        return None
    b, t, e = x.shape
    more = -e % plan.channels
    if more or t < plan.tokens:
        x = jnp.pad(x, ((0, 0), (0, plan.tokens - t), (0, more)))
    return x.reshape(b, plan.rows, plan.width, e + more)


def _of_tokens(x, like):
    """The way back, in the dtype of like."""
    b, t, e = like.shape
    return x.reshape(b, -1, x.shape[-1])[:, :t, :e].astype(like.dtype)


def _lags(x, count: int, plan: Plan):
    """The lags of `[e l]` that count as `[e 64 2M]`, with zeros.

    The last of as many reverse lags as tokens meets none of them, and is not cut.
    """
    if x is None:
        return None
    e, available = x.shape
    count = min(count, available)
    fill = ((0, -e % plan.channels), (0, plan.most - count))
    if count < available or fill != ((0, 0), (0, 0)):
        x = jnp.pad(x[:, :count], fill)
    return x.reshape(-1, ROWS, plan.width)


def _of_lags(x, count: int, like):
    """The way back, 0 where lags do not count."""
    e, available = like.shape
    count = min(count, available)
    x = x.reshape(x.shape[0], -1)[:e, :count]
    x = jnp.pad(x, ((0, 0), (0, available - count))) if count < available else x
    return x.astype(like.dtype)


def _channel(x, plan: Plan):
    """`[e]` in float32, with zeros to whole blocks."""
    return None if x is None else jnp.pad(x.astype(jnp.float32), (0, -x.shape[0] % plan.channels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(plan: Plan, given: Arguments):
    """y `[b t e]` of a sequence without a past."""
    return _convolution_forward(plan, given)[0]


def _convolution_forward(plan, given):
    t = given.u.shape[1]
    spectrum = gpu_lags.spectra(
        _lags(given.kernel, t, plan),
        _lags(given.reverse, t, plan),
        _channel(given.skip, plan),
        plan,
    )
    (y,) = gpu_tokens.convolve(
        _tokens(given.u, plan),
        _tokens(given.pre, plan),
        spectrum,
        _channel(given.bias, plan),
        None,
        (_tokens(given.post, plan),),
        name="long_conv_forward",
        plan=plan,
    )
    return _of_tokens(y, given.u), (given, spectrum)


def _convolution_backward(plan, residuals, dy):
    given, spectrum = residuals
    u, pre, post, g = (_tokens(x, plan) for x in (given.u, given.pre, given.post, dy))
    # The convolution again for post's gradient; on the way, what was convolved is turned round.
    *dpost, planes = gpu_tokens.convolve(
        u,
        pre,
        spectrum,
        _channel(given.bias, plan),
        None,
        () if post is None else (g,),
        name="long_conv_backward_post",
        keep=True,
        plan=plan,
    )
    *found, gradient = gpu_tokens.convolve(
        g,
        post,
        spectrum,
        None,
        planes,
        (None,) if pre is None else (pre, u),
        name="long_conv_backward",
        adjoint=True,
        plan=plan,
    )
    dkernel, *dreverse = gpu_lags.lags(gradient, given.reverse is not None, plan)
    t, e = dy.shape[1], given.kernel.shape[0]
    first = dkernel.reshape(dkernel.shape[0], -1)[:e, 0]  # the skip is part of lag 0
    ahead = None if given.reverse is None else _of_lags(dreverse[0], t, given.reverse)
    dbias = None
    if given.bias is not None:
        dz = dy.astype(jnp.float32)
        dz = dz if given.post is None else dz * given.post.astype(jnp.float32)
        dbias = jnp.sum(dz, axis=(0, 1)).astype(given.bias.dtype)
    return (
        Arguments(
            u=_of_tokens(found[0], given.u),
            kernel=_of_lags(dkernel, t, given.kernel),
            reverse=ahead,
            skip=None if given.skip is None else first.astype(given.skip.dtype),
            bias=dbias,
            pre=None if given.pre is None else _of_tokens(found[1], given.pre),
            post=None if given.post is None else _of_tokens(dpost[0], given.post),
        ),
    )


_convolution.defvjp(_convolution_forward, _convolution_backward)
