"""long_conv by its definition: a Toeplitz matrix per row and channel. Slow and obvious."""

import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum, state_dtype
from pallas_kernels.core.segments import boundaries

counted_as = "xla"  # by transforms: t log t operations, not the t^2 of this


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(
    u,
    kernel,
    skip,
    reverse_kernel,
    bias,
    pre_gate,
    post_gate,
    before,
    last_id,
    segment_ids,
    *,
    config,
):
    """See `long_conv`; before `[b l-1 e]` in the dtype to compute in, or None; gives y, before,
    last_id."""
    del config
    (b, t, e), lags = u.shape, kernel.shape[1]
    dtype = state_dtype(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate)
    if segment_ids is None:
        valid, document = jnp.ones((b, t), bool), jnp.zeros((b, t), jnp.int32)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
        document = jnp.cumsum(reset, axis=1)  # 0 = the one that the state is of
    token = lambda x: 1.0 if x is None else jnp.where(valid[..., None], x, 0).astype(dtype)
    channel = lambda x: 0.0 if x is None else x.astype(dtype)
    v = token(u) * token(pre_gate)

    # The inputs of the state stand before the first token: padding takes no place.
    if before is None:
        before = jnp.zeros((b, lags - 1, e), dtype)
    old = jnp.broadcast_to(jnp.arange(lags - 1) - (lags - 1), (b, lags - 1))
    number = jnp.concatenate([old, jnp.cumsum(valid, axis=1) - 1], axis=1)
    there = jnp.concatenate([jnp.ones_like(old, bool), valid], axis=1)
    of = jnp.concatenate([jnp.zeros_like(old), document], axis=1)
    inputs = jnp.concatenate([before, v], axis=1)

    same = there[:, None, :] & (document[:, :, None] == of[:, None, :])  # [b t s]
    lag = number[:, lags - 1 :, None] - number[:, None, :]
    z = _toeplitz(channel(kernel), lag, same, inputs)
    if reverse_kernel is not None:
        z = z + _toeplitz(channel(reverse_kernel), -lag - 1, same, inputs)
    y = token(post_gate) * (z + channel(skip) * v + channel(bias))
    y = jnp.where(valid[..., None], y, 0).astype(u.dtype)
    if reverse_kernel is not None:
        return y, None, None
    wanted = number[:, -1:] + 1 + old  # of the last inputs
    kept = (wanted[:, :, None] == number[:, None, :]) & there[:, None, :]
    kept = kept & (document[:, -1:, None] == of[:, None, :])
    return y, einsum("bks,bse->bke", kept.astype(dtype), inputs), last_id


def _toeplitz(kernel, lag, same, inputs):
    """sum_s kernel[lag_ts] inputs_s over what is of the same document and in the kernel's reach."""
    lags = kernel.shape[1]
    taps = kernel[:, jnp.clip(lag, 0, lags - 1)]  # [e b t s]
    taps = jnp.where(same & (lag >= 0) & (lag < lags), taps, 0)
    return einsum("ebts,bse->bte", taps, inputs)
