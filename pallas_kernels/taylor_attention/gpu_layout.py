"""How taylor_attention's GPU kernels order features, and states in their order.

Tiles of 64 features, one to a warpgroup, in the order of features.py; behind them features that are
0. In the kernels a feature is a bare product of columns of x, m, and a factor. A state is
`[b h tile 64 v1]`, v1 = [v, 1, 1, 0 ...], a multiple of 16, the sum of phi(k) v1^T.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.core.tpu import pad_to, round_up
from pallas_kernels.taylor_attention.features import feature_count
from pallas_kernels.taylor_attention.gpu_warpgroup import ROWS

KEY = 16  # columns of queries and keys
ONES = 16  # columns behind those of v, of which two are the sum of weights


class Widths(NamedTuple):
    """Of a call.

    Attributes:
        k: columns of q and k as given.
        v: columns of v as given.
        values: columns of v in the kernels.
        tiles: of features.
    """

    k: int
    v: int
    values: int
    tiles: int

    @classmethod
    def of(cls, q: Any, v: Any) -> "Widths":
        """From arrays or their shapes `[b t h ...]`."""
        return cls.of_sizes(q.shape[3], v.shape[3])

    @classmethod
    def of_sizes(cls, k: int, v: int) -> "Widths":
        """From the columns of q and v."""
        return cls(k, v, round_up(v, 16), -(-feature_count(k) // ROWS))

    @property
    def columns(self) -> int:
        """Of a state."""
        return self.values + ONES

    @property
    def shared(self) -> int:
        """Columns of a state that a warpgroup works on where they are shared out."""
        return round_up(-(-self.columns // self.tiles), 16)

    def share(self, tile: jax.Array) -> Any:
        """A warpgroup's columns; those of the last may overlap with its neighbour's."""
        last = (self.columns - self.shared) // 16
        return pl.ds(16 * jnp.minimum(tile * (self.shared // 16), last), self.shared)

    def shares(self) -> list[tuple[int, int, int]]:
        """Where each warpgroup's share begins, and where in it its values of v begin and end."""
        found, done = [], 0
        for tile in range(self.tiles):
            first = min(tile * self.shared, self.columns - self.shared)
            ends = min(first + self.shared, self.values)
            found.append((first, done - first, ends - first))
            done = max(done, ends)
        return [share for share in found if share[1] < share[2]]

    def to_tiles(self, kv: jax.Array, z: jax.Array) -> jax.Array:
        """The kernels' state from kv `[b h f v]` and z `[b h f]`, or the gradient of the one."""
        state = jnp.concatenate([pad_to(kv, 3, self.values), z[..., None]], axis=-1)
        state = pad_to(pad_to(state, 3, self.columns), 2, self.tiles * ROWS)
        return state.reshape(*state.shape[:2], self.tiles, ROWS, self.columns)

    def from_tiles(
        self, state: jax.Array, *, gradient: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """kv and z, or their gradients."""
        state = state.reshape(*state.shape[:2], -1, self.columns)[:, :, : feature_count(self.k)]
        z = state[..., self.values]  # and once more beside it; its gradient comes in two parts
        return state[..., : self.v], z + state[..., self.values + 1] if gradient else z


def tables(widths: Widths, scale: float) -> dict[str, jax.Array]:
    """What a kernel knows of its features.

    Returns:
        select: `[tile 2 64 16]`, which columns of x they multiply, bfloat16, 0 and 1;
        ones: `[tile 2 64]`, which have a one instead;
        of_q, of_k: `[tile 64]`, factors of a query's and of a key's features;
        order: int32 `[tile 64]`, from 0 to 63.
    """
    arrays = _tables(widths.k, widths.tiles, scale)
    dtype = lambda name, x: jnp.bfloat16 if name == "select" else x.dtype
    return {name: jnp.asarray(x, dtype(name, x)) for name, x in arrays.items()}


@functools.lru_cache
def _tables(k: int, tiles: int, scale: float) -> dict[str, np.ndarray]:
    first, second = np.triu_indices(k, 1)
    f, each = feature_count(k), np.arange(k)
    select = np.zeros((2, tiles * ROWS, KEY), np.float32)
    ones, factors = np.zeros((2, tiles * ROWS), np.float32), np.zeros((2, tiles * ROWS), np.float32)
    select[0, 1 + each, each] = 1
    select[:, 1 + k + each, each] = 1
    pairs = np.arange(1 + 2 * k, f)
    select[0, pairs, first] = select[1, pairs, second] = 1
    ones[0, 0] = ones[1, : 1 + k] = 1
    factors[:, :f] = np.array([[scale**2], [1]])
    factors[0, 0], factors[0, 1 : 1 + k] = 1, scale
    factors[:, 1 + k : 1 + 2 * k] *= np.sqrt(0.5)
    return dict(
        select=np.moveaxis(select.reshape(2, tiles, ROWS, KEY), 0, 1),
        ones=np.moveaxis(ones.reshape(2, tiles, ROWS), 0, 1),
        of_q=factors[0].reshape(tiles, ROWS),
        of_k=factors[1].reshape(tiles, ROWS),
        order=np.tile(np.arange(ROWS, dtype=np.int32), (tiles, 1)),
    )
