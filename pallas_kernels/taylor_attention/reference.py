"""taylor_attention by its definition: one token after the other. Slow and obvious."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.core.segments import boundaries
from pallas_kernels.taylor_attention.features import feature_count, features_by_definition


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, kv, z, last_id, segment_ids, *, scale, normalize, eps, config):
    """See `taylor_attention`; kv `[b h f v]` and z `[b h f]` or None. Returns y, kv, z, last_id."""
    del config
    dtype, out_dtype = state_dtype(q, k, v), v.dtype
    (b, _, h, width), v_width = q.shape, v.shape[-1]
    if kv is None:
        f = feature_count(width)
        kv, z = jnp.zeros((b, h, f, v_width), dtype), jnp.zeros((b, h, f), dtype)
    if segment_ids is None:
        reset, valid = jnp.zeros(q.shape[:2], bool), jnp.ones(q.shape[:2], bool)
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)

    def token(state, inputs):
        q_t, k_t, v_t, reset_t, valid_t = inputs
        kv, z = (jnp.where(_wide(reset_t, x), 0, x) for x in state)
        phi_q, phi_k = map(features_by_definition, (scale * q_t, k_t))
        kv = kv + jnp.einsum("bhf,bhv->bhfv", phi_k, v_t)
        z = z + phi_k
        y_t = jnp.einsum("bhf,bhfv->bhv", phi_q, kv)
        if normalize:
            y_t = y_t / (jnp.einsum("bhf,bhf->bh", phi_q, z) + eps)[..., None]
        after = tuple(
            jnp.where(_wide(valid_t, new), new, old)
            for new, old in zip((kv, z), state, strict=True)
        )
        return after, jnp.where(_wide(valid_t, y_t), y_t, 0)

    def by_time(x):
        x = x if x.dtype == bool else jnp.where(_wide(valid, x), x, 0).astype(dtype)
        return jnp.swapaxes(x, 0, 1)

    (kv, z), y = jax.lax.scan(token, (kv, z), tuple(map(by_time, (q, k, v, reset, valid))))
    return jnp.swapaxes(y, 0, 1).astype(out_dtype), kv, z, last_id


def _wide(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
