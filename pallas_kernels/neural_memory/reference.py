"""neural_memory by its definition: one token after the other, gradients by differentiation.

Slow and obvious.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core import parts
from pallas_kernels.neural_memory.memory import factor, recall


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(tokens, opening, state, segment_ids, *, how, fresh, still, config):
    """See `neural_memory`; the state in the dtype to compute in. Returns y and the state's fields.

    Args:
        tokens: q, k, v, alpha, eta, theta.
        opening: weights and momentum `[h ...]` that documents begin with.
        state: weights at the chunk's start, now, and the momentum, `[b h ...]`; count, last_id.
    """
    del fresh, still, config
    *carry, count, last_id = state
    dtype, out_dtype = carry[0].w_out.dtype, tokens[2].dtype
    b, t = tokens[0].shape[:2]
    place, valid, count, last_id = parts.places(segment_ids, count, last_id, t)
    valid = jnp.ones((b, t), bool) if valid is None else valid
    wide = lambda mask, x: mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    tokens = [jnp.where(wide(valid, x), x, 0).astype(dtype) for x in tokens]
    answer = functools.partial(recall, activation=how.activation, norm_eps=how.norm_eps)

    def loss(weights, k, v):
        return jnp.sum((answer(weights, k[None])[0] - v) ** 2)

    def one_head(start, now, momentum, q, k, v, alpha, eta, theta):
        gradient = _limited(jax.grad(loss)(start, k, v), how)
        momentum = jax.tree.map(lambda s, u: eta * s - theta * u, momentum, gradient)
        now = jax.tree.map(lambda w, s: (1 - alpha) * w + s, now, momentum)
        return now, momentum, answer(now, q[None])[0]

    every_head = jax.vmap(jax.vmap(one_head))

    def token(carry, x):
        place, valid, tokens = x
        start, now, momentum = carry
        choose = lambda mask, a, b: jax.tree.map(lambda a, b: jnp.where(wide(mask, b), a, b), a, b)
        now, momentum = choose(valid & (place == 0), opening, (now, momentum))
        start = choose(valid & (place % how.chunk == 0), now, start)
        after, after_momentum, y = every_head(start, now, momentum, *tokens)
        carry = choose(valid, (start, after, after_momentum), carry)
        return carry, jnp.where(wide(valid, y), y, 0)

    xs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (place, valid, tokens))
    carry, y = jax.lax.scan(token, tuple(carry), xs)
    return jnp.swapaxes(y, 0, 1).astype(out_dtype), (*carry, count, last_id)


def _limited(gradient, how):
    """The gradient of one token, each matrix and gamma within what `limit` says."""

    def one(u):
        return u * factor(jnp.sum(u * u), how)

    each = jax.tree.map(one, gradient._replace(w_hidden=None))
    if gradient.w_hidden is None:
        return each
    return each._replace(w_hidden=jax.vmap(one)(gradient.w_hidden))
