"""The three walks over a block's chunks that make taylor_attention's backward TPU kernel.

With v1 = [v, 1, 1], do = dy / (z + eps), do1 = [do, -sum(do y) in two parts], r = q.k, S the state
before a chunk and dS the gradient of the state after it:

    pairs:  dw = v1^T do1,  ds = dw (1 + scale r) scale
            dq = k ds,      dk = q ds^T,      dv = do w^T
    up:     dq += scale pull(S^T do1)                          S  <- S + v1 phi(k)^T
    down:   dk += pull(dS^T v1),  dv += dS phi(k)              dS <- dS + do1 phi(scale q)^T

Each is a loop of its own: one loop with both the first and the second would not fit the registers.
States are held in float32 and, for products, a second time in the products' type: reading that copy
holds fewer registers, too.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.taylor_attention.tpu_features import phi, pull
from pallas_kernels.taylor_attention.tpu_forward import NN, NT, TN, How, dot, weights, with_ones


def pairs(at, head: int, here, masks: Seen, how: How, dtype):
    """What the pairs of a chunk give to dq, dk and dv; and its v1 and do1 for the other walks."""
    scale = how.scale
    q, k = _inputs(at, head, here, masks, dtype)
    v1, do1 = (at[name].at[head, :, here] for name in ("v1", "do1"))
    v1[...] = with_ones(at["v"][0, head, :, here].astype(dtype), masks.valid, v1.shape[0])
    do = only(masks.valid, at["dy"][0, head, :, here].astype(jnp.float32))
    if how.normalize:
        do = do * at["inverse"][0, head, :, here]
        y = only(masks.valid, at["y"][0, head, :, here].astype(jnp.float32))
        do = do.astype(dtype).astype(jnp.float32)
        do1[...] = _with_total(do, -jnp.sum(do * y, axis=0, keepdims=True), do1)
    else:
        do1[...] = _with_total(do, jnp.zeros_like(do[:1]), do1)

    r = dot(k, q, TN)
    ds = dot(v1[...], do1[...], TN) * (scale + (scale * scale) * r)
    ds = jnp.where(masks.pairs, ds, 0).astype(dtype)
    w = weights(r, masks.pairs, scale).astype(dtype)
    at["dq_pairs"][head, :, here] = dot(k, ds, NN)
    at["dk_pairs"][head, :, here] = dot(q, ds, NT)
    at["dv_pairs"][head, :, here] = dot(do1[: do.shape[0]], w, NT)


def up(at, head: int, here, masks: Seen, how: How, dtype):
    """What the state before a chunk gives to dq, and the state after it."""
    scale, state = how.scale, at["state"]
    q, k = _inputs(at, head, here, masks, dtype)
    v1 = only(masks.tail, at["v1"][head, :, here])
    do1 = only(masks.head, at["do1"][head, :, here])
    dphi = dot(at["low"][head], do1, NN)
    dq = at["dq_pairs"][head, :, here] + scale * pull(scale * q.astype(jnp.float32), dphi)
    at["dq"][0, head, :, here] = dq.astype(at["dq"].dtype)
    new = dot(phi(k.astype(jnp.float32)).astype(dtype), v1, NT)
    new = only(masks.kept, state[head]) + new
    state[head], at["low"][head] = new, new.astype(dtype)


def down(at, head: int, here, masks: Seen, how: How, dtype):
    """What the gradient of the state after a chunk gives to dk, dv and the one before."""
    dstate, (v_width, _) = at["dstate"], at["dv_pairs"].shape[1:]
    q, k = _inputs(at, head, here, masks, dtype)
    v1 = only(masks.tail, at["v1"][head, :, here])
    do1 = only(masks.head, at["do1"][head, :, here])
    k = k.astype(jnp.float32)
    dphi = dot(at["dlow"][head], v1, TN)
    dk = at["dk_pairs"][head, :, here] + pull(k, dphi)
    read = only(masks.tail, dot(at["dlow"][head], phi(k).astype(dtype), NN))
    dv = only(masks.valid, at["dv_pairs"][head, :, here] + read[:v_width])
    at["dk"][0, head, :, here] = dk.astype(at["dk"].dtype)
    at["dv"][0, head, :, here] = dv.astype(at["dv"].dtype)
    new = dot(do1, phi(how.scale * q.astype(jnp.float32)).astype(dtype), NT)
    new = only(masks.kept, dstate[head]) + new
    dstate[head], at["dlow"][head] = new, new.astype(dtype)


def _inputs(at, head: int, here, masks: Seen, dtype):
    q = only(masks.valid, at["q"][0, head, :, here].astype(dtype))
    k = only(masks.valid, at["k"][0, head, :, here].astype(dtype))
    return q, k


def _with_total(do: jax.Array, total: jax.Array, like) -> jax.Array:
    """`[v c]` with a row behind it, up to the rows and in the type of `like`.

    The row comes in two parts, for twice the digits: do.v and total cancel where a token sees
    little more than itself.
    """
    rounded = total.astype(like.dtype).astype(total.dtype)
    row = jax.lax.broadcasted_iota(jnp.int32, (like.shape[0] - do.shape[0], do.shape[1]), 0)
    rest = jnp.where(row == 0, rounded, jnp.where(row == 1, total - rounded, 0))
    return jnp.concatenate([do, rest], axis=0).astype(like.dtype)
