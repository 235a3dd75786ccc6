"""selective_scan by its definition: one token after the other. Slow and obvious."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(u, delta, A, B, C, D, z, delta_bias, h, last_id, segment_ids, *, delta_softplus, config):
    """See `selective_scan`; h `[b e n]` in the dtype to compute in. Returns y, h, last_id."""
    del config
    dtype, out_dtype = h.dtype, u.dtype
    if segment_ids is None:
        reset, valid = jnp.zeros(u.shape[:2], bool), jnp.ones(u.shape[:2], bool)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)

    def token(h, inputs):
        u_t, delta_t, B_t, C_t, z_t, reset_t, valid_t = inputs
        d_t = delta_t if delta_bias is None else delta_t + delta_bias.astype(dtype)
        d_t = jax.nn.softplus(d_t) if delta_softplus else d_t
        before = jnp.where(reset_t[:, None, None], 0, h)
        decay = jnp.exp(jnp.einsum("be,en->ben", d_t, A.astype(dtype)))
        after = decay * before + jnp.einsum("be,bn,be->ben", d_t, B_t, u_t)
        y_t = jnp.einsum("ben,bn->be", after, C_t)
        y_t = y_t if D is None else y_t + D.astype(dtype) * u_t
        y_t = y_t if z is None else y_t * jax.nn.silu(z_t)
        return jnp.where(valid_t[:, None, None], after, h), jnp.where(valid_t[:, None], y_t, 0)

    def by_time(x):
        if x is None:
            return None
        x = x if x.dtype == bool else jnp.where(_wide(valid, x), x, 0).astype(dtype)
        return jnp.swapaxes(x, 0, 1)

    h, y = jax.lax.scan(token, h, tuple(map(by_time, (u, delta, B, C, z, reset, valid))))
    return jnp.swapaxes(y, 0, 1).astype(out_dtype), h, last_id


def _wide(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))
