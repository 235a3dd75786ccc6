"""How taylor_attention's TPU kernels see its arrays: tokens last, features in their own order."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_tokens import ROWS
from pallas_kernels.taylor_attention.tpu_features import orders


def state_rows(v: int) -> int:
    """Rows of a state: v (padded already), the sum of weights twice, zeros up to a register."""
    return v + ROWS


class Widths(NamedTuple):
    """Of keys and values, and as they are padded; and what a state of the kernels looks like."""

    k: int
    v: int
    padded_k: int
    padded_v: int
    rows: int

    @classmethod
    def of(cls, q, v):
        k, width = q.shape[3], v.shape[3]
        padded = tpu.round_up(width, ROWS)
        return cls(k, width, tpu.round_up(k, ROWS), padded, state_rows(padded))

    def to_rows(self, kv, z, *, gradient: bool = False):
        """The kernels' state `[b h v1 f]` from kv `[b h f v]` and z `[b h f]`; None for None.

        z stands there twice; of its gradient, the sum of the two counts.
        """
        if kv is None:
            return None
        places, _ = orders(self.k, self.padded_k)
        again = jnp.zeros_like(z) if gradient else z
        parts = (tpu.pad_to(kv, 3, self.padded_v), z[..., None], again[..., None])
        columns = tpu.pad_to(jnp.concatenate(parts, axis=3), 3, self.rows)
        columns = tpu.pad_to(columns, 2, columns.shape[2] + 1)  # zeros for rows without a feature
        return jnp.swapaxes(columns[:, :, places], 2, 3)

    def from_rows(self, state, *, gradient: bool = False):
        """kv and z from the kernels' state, or their gradients."""
        _, back = orders(self.k, self.padded_k)
        columns = jnp.swapaxes(state, 2, 3)[:, :, back]
        z = columns[..., self.padded_v]
        if gradient:
            z = z + columns[..., self.padded_v + 1]
        return columns[..., : self.v], z
