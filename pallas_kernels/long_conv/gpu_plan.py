"""Transforms of the GPU kernels: how a row is cut, and the constant matrices.

    X[k] = sum_i x[i] exp(-i pi k i / n),   k odd;   conjugates of one another at k and -k

Half-odd frequencies, as on a TPU (tpu_waves.py): a product of spectra is a convolution whose
wrapped part has a minus sign, nothing that is wanted wraps, and no frequency is real.

n = 256 M. Place i = (2 a + p) M + j with a < 64, p < 2, j < M; frequency

    k = 2 r + 1 - 256 w + 512 q,    r < 64, q < M,   w < 2: the warpgroup that has it

which are one of each pair of conjugates. Then, with rho_r = exp(-i pi (2 r + 1) / 256),

    D_p[r, j] = sum_a exp(-i pi (2 r + 1) a / 128) x[a, p, j]             first stage, real x
    U[r, j] = exp(-i pi (2 r + 1 - 256 w) j / n) (D_0 + (-1)^w rho_r D_1)  twiddle
    X[r, q] = sum_j exp(-2 pi i q j / M) U[r, j]                           second stage

The two warpgroups have the same matrices and differ in a sign and a twiddle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.gpu import GpuConfig

ROWS = 64  # of a product: what the matrix unit takes at least
WARPGROUPS = 2
SHORTEST = 1024  # tokens of a row: what is shorter is filled up to as many at least
LONGEST = 8192  # tokens of a row: a plane of eight channels is 128 KiB of shared memory


class Plan(NamedTuple):
    """What is static of a call.

    Attributes:
        m: numbers of the second stage: 16, 32 or 64.
        rows: of 2 m tokens that a padded row of the batch has.
        channels: of a block.
        piece: rows that a warpgroup brings at once.
        config: of the form.
    """

    m: int
    rows: int
    channels: int
    piece: int
    config: GpuConfig

    @property
    def n(self) -> int:
        """Length of the transform."""
        return 256 * self.m

    @property
    def width(self) -> int:
        """Tokens of a row of a plane."""
        return 2 * self.m

    @property
    def tile(self) -> int:
        """Columns of an operand's tile, and of what is computed at once."""
        return min(self.m, 32)

    @property
    def tokens(self) -> int:
        """Of a padded row of the batch."""
        return self.rows * self.width

    @property
    def kept(self) -> int:
        """Rows of a plane in memory: whole tiles."""
        return -(-self.rows // 8) * 8

    @property
    def most(self) -> int:
        """Tokens and lags that a transform has room for."""
        return ROWS * self.width


def plan_of(t: int, tokens: int, channels: int | None, config: GpuConfig) -> Plan:
    """How rows of t tokens are cut; see the fields of PallasGpuConfig."""
    m = next(m for m in (16, 32, 64) if t <= 128 * m)
    piece = tokens // (2 * m)
    rows = -(-t // tokens) * piece
    return Plan(m, rows, channels or (8 if m == 64 else 16), piece, config)


class Waves(NamedTuple):
    """The matrices, in the order in which kernels take them.

    Attributes:
        first: `[2 64 64]`, r by a: cosines, then negative sines; bfloat16.
        last: their transposes.
        second: `[2 M M]`, cosines and sines of 2 pi q j / M; bfloat16.
        odd: `[2 64]`, real and imaginary part of rho; float32.
    """

    first: jax.Array
    last: jax.Array
    second: jax.Array
    odd: jax.Array


def waves(plan: Plan) -> Waves:
    """The matrices of a plan."""
    return Waves(*map(jnp.asarray, _waves(plan.m)))


@functools.cache
def _waves(m: int) -> tuple[np.ndarray, ...]:
    half_odd = 2 * np.arange(ROWS)[:, None] + 1
    angles = np.pi * (half_odd * np.arange(ROWS) % 256) / 128
    first = np.stack([np.cos(angles), -np.sin(angles)])
    turns = 2 * np.pi * (np.arange(m)[:, None] * np.arange(m) % m) / m
    second = np.stack([np.cos(turns), np.sin(turns)])
    odd = np.pi * half_odd[:, 0] / 256
    narrow = lambda x: x.astype(jnp.bfloat16)
    rho = np.stack([np.cos(odd), -np.sin(odd)]).astype(np.float32)
    return narrow(first), narrow(first.swapaxes(1, 2)), narrow(second), rho
