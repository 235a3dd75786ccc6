"""gated_delta_rule by its definition: one token after the other. Slow and obvious."""

import jax.numpy as jnp

from pallas_kernels.core import chunks


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(q, k, v, g, beta, s, last_id, segment_ids, block_memory, *, scale, config, fresh):
    """See `gated_delta_rule`; s in the dtype to compute in. Returns y, s, last_id."""
    del config, fresh
    dtype, out_dtype = s.dtype, v.dtype
    if segment_ids is None:
        reset, valid = jnp.zeros(g.shape[:2], bool), jnp.ones(g.shape[:2], bool)
    else:
        reset, valid, last_id = chunks.resets(segment_ids, last_id, block_memory)

    def token(s, inputs):
        q_t, k_t, v_t, g_t, beta_t, reset_t, valid_t = inputs
        decayed = jnp.exp(g_t)[..., None, None] * jnp.where(_wide(reset_t, s), 0, s)
        missing = v_t - jnp.einsum("bhkv,bhk->bhv", decayed, k_t)
        after = decayed + k_t[..., :, None] * (beta_t[..., None] * missing)[..., None, :]
        y_t = scale * jnp.einsum("bhkv,bhk->bhv", after, q_t)
        return jnp.where(_wide(valid_t, s), after, s), jnp.where(_wide(valid_t, y_t), y_t, 0)

    def by_time(x):
        x = x if x.dtype == bool else jnp.where(_wide(valid, x, 2), x, 0).astype(dtype)
        return jnp.swapaxes(x, 0, 1)

    memory = None if block_memory is None else chunks.by_token(block_memory, g.shape[1]).T
    inputs = tuple(map(by_time, (q, k, v, g, beta, reset, valid)))
    s, y = chunks.carry(token, s, inputs, memory)
    return jnp.swapaxes(y, 0, 1).astype(out_dtype), s, last_id


def _wide(mask, x, axes: int = 1):
    """A mask of the leading axes with axes of 1 behind it, to stand beside x."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - axes))
