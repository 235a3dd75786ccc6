"""The walks over a block's chunks that make gla's backward TPU kernel.

With S the state before a chunk, dS the gradient of the state after it, dy scaled, P as in the
forward kernel, F and E the sums of log decays from the chunk's start and to its end:

    up:   S <- exp(F_c) S + (k exp(E)) v^T
    down: dv = dy P^T + dS^T (k exp(E));              dP = v^T dy
          dq' = exp(F) (S dy),  dF = q dq';           dk' = exp(E) (dS v),  dE = k dk'
          pairs by halves (tpu_levels.py):            dz_n = z_n (dP + dP^T at n),  dw_n = z_n dz_n
          dq = dq' + exp(w_n) dz_n in second halves;  dk = dk' + exp(w_n) dz_n in first halves
          dg = dF, dE and dw_n over the tokens of their sums, + exp(F_c) sum_v S dS
          dS <- exp(F_c) dS + (q exp(F)) dy^T
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core.tpu import LANES
from pallas_kernels.core.tpu_parts import dot, each, part_of
from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.core.tpu_tokens import NN, NT, TN
from pallas_kernels.gla.tpu_levels import (
    factors,
    in_order,
    keys_gradient,
    scores,
    scores_gradient,
    sizes,
)


def up(at, i, here, look: Callable[[], Seen], scale: float, dtype):
    """The state after a chunk."""
    del scale
    factors(at, here, look, dtype, pairs=False)
    states = at["states"]

    def some_values(rows):
        new = dot(at["to_end"][...], _values(at, rows, here, look, dtype), NT)
        states[i + 1, :, rows] = at["through"][...] * states[i, :, rows] + new

    _each_part(at, some_values)


def down(at, i, here, look: Callable[[], Seen], scale: float, dtype):
    """All gradients of a chunk, and that of the state before it."""
    state, dstate = at["states"].at[i], at["dstate"]
    factors(at, here, look, dtype)
    scores(at, here, look, dtype)

    def values_gradient(rows):
        dy = _scaled(at, rows, here, look, scale, dtype)
        read = dot(dstate[:, rows].astype(dtype), at["to_end"][...], TN)
        dv = dot(dy, at["pairs"][...], NT) + read
        at["dv"][0, 0, rows, here] = only(look().valid, dv).astype(at["dv"].dtype)

    _each_part(at, values_gradient)

    every = slice(None)
    v = _values(at, every, here, look, dtype)
    dy = _scaled(at, every, here, look, scale, dtype)
    dpairs = only(in_order(at, look()), dot(v, dy, TN))
    at["sum"][...] = dpairs + dpairs.T
    own = v.astype(jnp.float32) * dy.astype(jnp.float32)
    at["own"][...] = jnp.sum(own, axis=0, keepdims=True)
    levels = len(sizes(dpairs.shape[0]))
    at["dz"][levels] = dot(state[...].astype(dtype), dy, NN)
    at["dz"][levels + 1] = dot(dstate[...].astype(dtype), v, NN)
    scores_gradient(at, dtype)
    through = jnp.sum(state[...] * dstate[...], axis=1, keepdims=True)
    at["dthrough"][...] = through * at["through"][...]
    keys_gradient(at, here, look)

    def before(rows):
        new = dot(at["from_start"][...], _scaled(at, rows, here, look, scale, dtype), NT)
        dstate[:, rows] = at["through"][...] * dstate[:, rows] + new

    _each_part(at, before)


def _each_part(at, body):
    """Runs body(rows) for some values after the others."""
    width = at["v"].shape[2]
    part = part_of(width, LANES)
    each(width, part, lambda first: body(pl.ds(first, part)))


def _values(at, rows, here, look, dtype):
    return only(look().valid, at["v"][0, 0, rows, here].astype(dtype))


def _scaled(at, rows, here, look, scale: float, dtype):
    dy = only(look().valid, at["dy"][0, 0, rows, here].astype(jnp.float32))
    return (scale * dy).astype(dtype)
