"""gla by its definition: one token after the other. Slow and obvious."""

import jax.numpy as jnp

from pallas_kernels.core import chunks


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, g, s, last_id, segment_ids, block_memory, *, scale, fresh, config):
    """See `gla`; s in the dtype to compute in. Returns y, s, last_id."""
    del fresh, config  # zeros are as good
    dtype, out_dtype = s.dtype, v.dtype
    b, t = q.shape[:2]
    if segment_ids is None:
        reset, valid = jnp.zeros((b, t), bool), jnp.ones((b, t), bool)
    else:
        reset, valid, last_id = chunks.resets(segment_ids, last_id, block_memory)

    def token(s, inputs):
        q_t, k_t, v_t, g_t, reset_t, valid_t = inputs
        before = jnp.where(_wide(reset_t, s), 0, s)
        after = jnp.exp(g_t)[..., None] * before + k_t[..., :, None] * v_t[..., None, :]
        y_t = scale * jnp.einsum("bhkv,bhk->bhv", after, q_t)
        return jnp.where(_wide(valid_t, s), after, s), jnp.where(_wide(valid_t, y_t), y_t, 0)

    def by_time(x):
        x = x if x.dtype == bool else jnp.where(_wide(valid, x, 2), x, 0).astype(dtype)
        return jnp.swapaxes(x, 0, 1)

    memory = None if block_memory is None else chunks.by_token(block_memory, t).T
    s, y = chunks.carry(token, s, tuple(map(by_time, (q, k, v, g, reset, valid))), memory)
    return jnp.swapaxes(y, 0, 1).astype(out_dtype), s, last_id


def _wide(mask, x, axes: int = 1):
    """A mask of the leading axes with axes of 1 behind it, to stand beside x."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - axes))
