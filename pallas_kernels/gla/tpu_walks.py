"""The walks over a block's chunks that make gla's backward TPU kernel.

With S the state before a chunk, dS the gradient of the state after it, dy scaled, P as in the
forward kernel, F and E the sums of log decays from the chunk's start and to its end:

    up:   S <- exp(F_c) S + (k exp(E)) v^T
    down: dv = dy P^T + dS^T (k exp(E));              dP = v^T dy
          dq' = exp(F) S dy,  dF = q dq';             dk' = exp(E) dS v,  dE = k dk'
          pairs by halves (tpu_levels.py):            dz_n = z_n (dP + dP^T at n),  dw_n = z_n dz_n
          dq = dq' + exp(w_n) dz_n in second halves;  dk = dk' + exp(w_n) dz_n in first halves
          dg = dF, dE and dw_n over the tokens of their sums, + exp(F_c) sum_v S dS
          dS <- exp(F_c) dS + (q exp(F)) dy^T
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core.tpu import LANES
from pallas_kernels.core.tpu_parts import dot, each, part_of
from pallas_kernels.core.tpu_places import Seen, only
from pallas_kernels.core.tpu_tokens import NN, NT, TN
from pallas_kernels.gla.tpu_levels import (
    each_strip,
    factors,
    scores,
    scores_gradient,
    sums_gradient,
    taken,
)


def up(at, i, here, masks: Seen, scale: float, dtype):
    """The state after a chunk."""
    del scale
    factors(at, here, masks, dtype, pairs=False)
    states = at["states"]

    def some_values(rows):
        new = dot(at["to_end"][...], _values(at, rows, here, masks, dtype), NT)
        states[i + 1, :, rows] = at["through"][...] * states[i, :, rows] + new

    _each_part(at, some_values)


def down(at, i, here, masks: Seen, scale: float, dtype):
    """All gradients of a chunk, and that of the state before it."""
    state, dstate = at["states"].at[i], at["dstate"]
    factors(at, here, masks, dtype)
    scores(at, here, masks, dtype)

    def values_gradient(rows):
        dy = _scaled(at, rows, here, masks, scale, dtype)
        read = dot(dstate[:, rows].astype(dtype), at["to_end"][...], TN)
        dv = dot(dy, at["pairs"][...], NT) + read
        at["dv"][0, 0, rows, here] = only(masks.valid, dv).astype(at["dv"].dtype)

    _each_part(at, values_gradient)
    _ends(at, state, here, masks, scale, dtype)
    scores_gradient(at, here, masks, dtype)
    product = state[...] * dstate[...]
    at["dthrough"][...] = jnp.sum(product, axis=1, keepdims=True) * at["through"][...]

    def keys_gradient(rows):
        of_level = lambda level: at["decays"][level, rows]
        dg = sums_gradient(at["start"][rows], at["end"][rows], of_level) + at["dthrough"][rows]
        for name, found in (("dg", dg), ("dq", at["dq_sum"][rows]), ("dk", at["dk_sum"][rows])):
            at[name][0, 0, rows, here] = only(masks.valid, found).astype(at[name].dtype)

    each_strip(at, keys_gradient)

    def before(rows):
        new = dot(at["from_start"][...], _scaled(at, rows, here, masks, scale, dtype), NT)
        dstate[:, rows] = at["through"][...] * dstate[:, rows] + new

    _each_part(at, before)


def _ends(at, state, here, masks: Seen, scale: float, dtype):
    """What the states before and after give to dq and dk, and the gradient of scores for the rest.

    The gradients by F and E come in the place of `start` and `end`.
    """
    v = _values(at, slice(None), here, masks, dtype)
    dy = _scaled(at, slice(None), here, masks, scale, dtype)
    dpairs = only(masks.pairs, dot(v, dy, TN))
    at["sum"][...] = dpairs + dpairs.T
    own = jnp.sum(v.astype(jnp.float32) * dy.astype(jnp.float32), axis=0, keepdims=True)
    at["own"][...] = own

    for other, given, sums, mine, theirs in (
        (state, dy, "start", "q", "k"),
        (at["dstate"], v, "end", "k", "q"),
    ):
        at["dz"][...] = dot(other[...].astype(dtype), given, NN)

        def strip(rows, sums=sums, mine=mine, theirs=theirs):
            dx = at[sums][rows] * at["dz"][rows]
            at[sums][rows] = taken(at, mine, rows, here, masks) * dx
            own = at["own"][...] * taken(at, theirs, rows, here, masks)
            at[f"d{mine}_sum"][rows] = dx + own

        each_strip(at, strip)


def _each_part(at, body):
    """Runs body(rows) for some values after the others."""
    width = at["v"].shape[2]
    part = part_of(width, LANES)
    each(width, part, lambda first: body(pl.ds(first, part)))


def _values(at, rows, here, masks: Seen, dtype):
    return only(masks.valid, at["v"][0, 0, rows, here].astype(dtype))


def _scaled(at, rows, here, masks: Seen, scale: float, dtype):
    dy = only(masks.valid, at["dy"][0, 0, rows, here].astype(jnp.float32))
    return (scale * dy).astype(dtype)
