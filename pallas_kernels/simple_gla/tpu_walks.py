"""The walks over a block's chunks that make simple_gla's backward TPU kernel.

With S the state before a chunk, dS the gradient of the state after it, dy scaled, r = k^T q, P the
decays of pairs, F and E the sums of log decays from the chunk's start and to its end:

    gates:  P, F, E
    values: dv = dy (r P)^T
    scores: dr = (v^T dy) P;   dq += k dr,   dk += q dr^T
    gates_gradient:            dg <- dr r, summed over the pairs that a token lies between
    up:     dq' = S^T (dy exp(F));     dq += dq',    dF = sum_k q dq'
            S <- exp(F_c) S + (v exp(E)) k^T
    down:   dk' = dS^T (v exp(E));     dk += dk',    dE = sum_k k dk',   dv += (dS k) exp(E)
            dg <- exp(F_c) <S, dS>;    dS <- exp(F_c) dS + (dy exp(F)) q^T

Each is a loop of its own: fewer registers are held.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core.tpu_parts import dot
from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.core.tpu_tokens import NN, NT, TN
from pallas_kernels.simple_gla.tpu_chunk import decays, ends, pairs_gradient

# A chunk's numbers per token, one chunk a row.
ROWS = ("start", "end", "dstart", "dend", "dg_rows")


def gates(at, i, here, masks: Seen, scale: float, dtype):
    """The decays of a chunk."""
    del scale, dtype
    row = pl.ds(i, 1)
    p, at["start"][row], at["end"][row] = decays(at["g"][0, 0, :, here], masks, at["order"])
    at["by_pair"][i] = p


def values(at, i, here, masks: Seen, scale: float, dtype):
    """What the pairs of a chunk give to dv."""
    q, k = (only(masks.valid, at[x][0, 0, :, here].astype(dtype)) for x in "qk")
    dy = _scaled(at, here, masks, scale).astype(dtype)
    w = (dot(k, q, TN) * at["by_pair"][i]).astype(dtype)
    at["dv_pairs"][:, here] = dot(dy, w, NT)


def scores(at, i, here, masks: Seen, scale: float, dtype):
    """What the pairs of a chunk give to dq, dk and the decays between them."""
    q, k, v = (only(masks.valid, at[x][0, 0, :, here].astype(dtype)) for x in "qkv")
    dy = _scaled(at, here, masks, scale).astype(dtype)
    dr = dot(v, dy, TN) * at["by_pair"][i]
    at["by_pair"][i] = dr * dot(k, q, TN)
    dr = dr.astype(dtype)
    at["dq_sum"][:, here] += dot(k, dr, NN)
    at["dk_sum"][:, here] += dot(q, dr, NT)


def gates_gradient(at, i, here, masks: Seen, scale: float, dtype):
    """What pairs give to the gradient of the decays."""
    del here, masks, scale, dtype
    at["dg_rows"][pl.ds(i, 1)] = pairs_gradient(at["by_pair"][i], at["order"])


def up(at, i, here, masks: Seen, scale: float, dtype):
    """What the state before a chunk gives, and the state after it."""
    q, k, v = (only(masks.valid, at[x][0, 0, :, here].astype(dtype)) for x in "qkv")
    row = pl.ds(i, 1)
    start, end, through = ends(at["start"][row], at["end"][row], masks)
    dy = (_scaled(at, here, masks, scale) * start).astype(dtype)
    states = at["states"]
    dq = dot(states[i].astype(dtype), dy, TN)
    at["dq_sum"][:, here] += dq
    at["dstart"][row] = jnp.sum(q.astype(jnp.float32) * dq, axis=0, keepdims=True)
    new = dot((v.astype(jnp.float32) * end).astype(dtype), k, NT)
    states[i + 1] = through * states[i] + new


def down(at, i, here, masks: Seen, scale: float, dtype):
    """What the gradient of the state after a chunk gives, and that of the one before."""
    q, k, v = (only(masks.valid, at[x][0, 0, :, here].astype(dtype)) for x in "qkv")
    row = pl.ds(i, 1)
    start, end, through = ends(at["start"][row], at["end"][row], masks)
    dstate = at["dstate"]
    after = dstate[...].astype(dtype)
    dk = dot(after, (v.astype(jnp.float32) * end).astype(dtype), TN)
    at["dk_sum"][:, here] += dk
    at["dend"][row] = jnp.sum(k.astype(jnp.float32) * dk, axis=0, keepdims=True)
    dv = at["dv_pairs"][:, here] + dot(after, k, NN) * end
    at["dv"][0, 0, :, here] = only(masks.valid, dv).astype(at["dv"].dtype)
    product = jnp.sum(at["states"][i] * dstate[...], axis=0, keepdims=True)
    at["dg_rows"][row] += jnp.sum(product, axis=1, keepdims=True) * through
    dy = (_scaled(at, here, masks, scale) * start).astype(dtype)
    dstate[...] = through * dstate[...] + dot(dy, q, NT)


def _scaled(at, here, masks: Seen, scale: float):
    return scale * only(masks.valid, at["dy"][0, 0, :, here].astype(jnp.float32))
