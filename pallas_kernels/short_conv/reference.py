"""short_conv by its definition: a window that moves token by token. Slow and obvious."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, weight, bias, before, last_id, segment_ids, *, activation, config):
    """See `short_conv`; before `[b w-1 e]` in the dtype to compute in; gives y, before, last_id."""
    del config
    dtype, out_dtype = before.dtype, x.dtype
    if segment_ids is None:
        reset, valid = jnp.zeros(x.shape[:2], bool), jnp.ones(x.shape[:2], bool)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    x = jnp.where(valid[..., None], x, 0).astype(dtype)

    def token(before, inputs):
        x_t, reset_t, valid_t = inputs
        fresh = jnp.where(reset_t[:, None, None], 0, before)
        window = jnp.concatenate([fresh, x_t[:, None]], axis=1)  # [b w e]
        y_t = jnp.einsum("bwe,we->be", window, weight.astype(dtype))
        y_t = y_t if bias is None else y_t + bias.astype(dtype)
        y_t = jax.nn.silu(y_t) if activation == "silu" else y_t
        after = jnp.where(valid_t[:, None, None], window[:, 1:], before)
        return after, jnp.where(valid_t[:, None], y_t, 0)

    by_time = lambda a: jnp.swapaxes(a, 0, 1)
    before, y = jax.lax.scan(token, before, (by_time(x), by_time(reset), by_time(valid)))
    return by_time(y).astype(out_dtype), before, last_id
