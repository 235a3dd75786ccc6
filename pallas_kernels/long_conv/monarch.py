"""The convolution by Fourier transforms as matrix products (Monarch form).

With n = N1 M, place i = i1 M + i2 and frequency k = k1 + N1 k2, a transform of n numbers is

    X[k1, k2] = sum_i2 F_M[i2, k2] exp(-2 pi i k1 i2 / n) sum_i1 F_N1[i1, k1] x[i1, i2]

matrix products with a twiddle between; the sum over i2 is cut again where there are more stages.
The spectrum comes out permuted and stays so: the kernel's comes in the same order, and the way back
takes the stages in reverse. Inputs are real, so that half of the k1 is enough.

Arrays are `[2 k m c]`: real and imaginary part, a frequency that is done, places still to be summed
over, and columns. Each stage is one product of a small matrix with a wide one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.long_conv.fft import needed

_THREE_STAGES = 2**15  # from this length on


@dataclasses.dataclass(frozen=True)
class Monarch:
    """A way (see `convolution.Way`).

    Attributes:
        stages: matrix products each way; None = 2, for long sequences 3.
        operands: dtype of what is multiplied, "bfloat16" for matrix units (sums are float32 all the
            same); None = as given, in full precision.
    """

    stages: int | None = None
    operands: str | None = None

    def convolve(self, v, lags, low: int, t: int):
        """See `convolution.Way`."""
        b, s, e = v.shape
        n = self._factors(needed(s, lags.shape[0], low, t))
        kernel = jnp.pad(lags, ((0, math.prod(n) - lags.shape[0]), (0, 0)))
        k_re, k_im = self._forward(jnp.roll(kernel, low, axis=0), n)[:, :, None]
        re, im = self._forward(_columns(v), n).reshape(2, -1, b, e)
        spectrum = jnp.stack([re * k_re - im * k_im, re * k_im + im * k_re])
        y = self._back(spectrum.reshape(2, -1, b * e), n, t)
        return jnp.swapaxes(y.reshape(t, b, e), 0, 1)

    def correlate(self, v, dy, low: int, count: int):
        """See `convolution.Way`."""
        b, s, e = v.shape
        n = self._factors(needed(s, count, low, dy.shape[1]))
        re, im = self._forward(_columns(v), n).reshape(2, -1, b, e)
        d_re, d_im = self._forward(_columns(dy), n).reshape(2, -1, b, e)
        # The conjugate of v's times dy's.
        spectrum = jnp.stack([re * d_re + im * d_im, re * d_im - im * d_re])
        sums = self._back(jnp.sum(spectrum, axis=2), n, math.prod(n))
        return jnp.roll(sums, -low, axis=0)[:count]

    def _factors(self, least: int) -> tuple[int, ...]:
        return factors(least, self.stages or (2 if least < _THREE_STAGES else 3))

    def _forward(self, x: jax.Array, n: tuple[int, ...]) -> jax.Array:
        """Real `[s c]`, 0 from s on, to its permuted spectrum `[2 h c]`."""
        s, c = x.shape
        m, half = math.prod(n[1:]), n[0] // 2 + 1
        rows = -(-s // m)  # the others are 0
        x = jnp.pad(x, ((0, rows * m - s), (0, 0)))
        cos, sin = _waves(half, rows, n[0])
        z = self._product(np.concatenate([cos, -sin]), x.reshape(rows, m * c))
        z = z.reshape(2, half, m, c)
        for i, n_i in enumerate(n[1:], 1):
            z = _twiddle(z, math.prod(n[i - 1 :]), -1)  # [2 m k c]
            m = m // n_i
            cos, sin = _waves(n_i, n_i, n_i)
            z = self._product(np.block([[cos, sin], [-sin, cos]]), z.reshape(2 * n_i, -1))
            z = z.reshape(2, n_i, m, -1)
        return z.reshape(2, -1, c)

    def _back(self, z: jax.Array, n: tuple[int, ...], t: int) -> jax.Array:
        """A spectrum as `_forward` orders it to the first t real numbers, `[t c]`."""
        c, half, m = z.shape[2], n[0] // 2 + 1, 1
        for i in range(len(n) - 1, 0, -1):
            cos, sin = _waves(n[i], n[i], n[i])
            z = self._product(np.block([[cos, -sin], [sin, cos]]), z.reshape(2 * n[i], -1))
            m = m * n[i]
            z = z.reshape(2, m, half if i == 1 else n[i - 1], -1)
            z = _twiddle(z, math.prod(n[i - 1 :]), 1)  # [2 k m c]
        rows = -(-t // m)  # no others are wanted
        # A frequency and its negative have conjugate spectra: one of them, twice; 0 and n/2 once.
        often = np.where((np.arange(half) == 0) | (2 * np.arange(half) == n[0]), 1, 2)
        cos, sin = (often * x / math.prod(n) for x in _waves(rows, half, n[0]))
        x = self._product(np.concatenate([cos, -sin], axis=1), z.reshape(2 * half, m * c))
        return x.reshape(rows * m, c)[:t]

    def _product(self, matrix: np.ndarray, x: jax.Array) -> jax.Array:
        if self.operands is None:
            return jnp.matmul(matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
        rounded = (jnp.asarray(a, self.operands) for a in (matrix, x))
        return jnp.matmul(*rounded, preferred_element_type=x.dtype)


def factors(least: int, stages: int) -> tuple[int, ...]:
    """So many factors of about one size whose product is at least `least`.

    All but the first are multiples of 8 if they are above 8: matrix units like that.
    """
    found: list[int] = []
    for left in range(stages, 1, -1):
        one = max(1, round((least / math.prod(found)) ** (1 / left)))
        found.append(one if one <= 8 else round(one / 8) * 8)
    return -(-least // math.prod(found)), *found


def _columns(x: jax.Array) -> jax.Array:
    """`[b s e]` as `[s (b e)]`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def _waves(rows: int, columns: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of 2 pi row column / period, `[rows columns]`, exact in the argument."""
    turns = np.arange(rows)[:, None] * np.arange(columns) % period
    angles = 2 * np.pi * turns / period
    return np.cos(angles), np.sin(angles)


def _twiddle(z: jax.Array, period: int, sign: int) -> jax.Array:
    """`[2 a b c]` times exp(sign 2 pi i a b / period), with a and b changing places."""
    re, im = z
    waves = _waves(z.shape[1], z.shape[2], period)
    cos, sin = (jnp.asarray(x[..., None], z.dtype) for x in waves)
    turned = jnp.stack([re * cos - sign * im * sin, im * cos + sign * re * sin])
    return jnp.swapaxes(turned, 1, 2)
