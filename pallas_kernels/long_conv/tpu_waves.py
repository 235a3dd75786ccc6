"""Transforms of the TPU kernels: waves of half-odd frequencies.

    X[k] = sum_i x[i] exp(-2 pi i i (k + 1/2) / n),   k < n/2;   the other half are conjugates

A product of such spectra is a convolution whose wrapped part comes with a minus sign; as nothing
that is wanted wraps, it is as good as a circular one. And no frequency is real, as 0 and n/2 are:
n real numbers are n/2 complex ones, which fill registers without a rest.

Lags behind the token (0, 1, ...) transform as they lie. Those ahead, r[j] at lag -1-j, have the
spectrum exp(2 pi i (k + 1/2) / n) conj(R[k]).
"""

import numpy as np

PAIRS = 128  # lanes: complex numbers of a row, real parts in one register, imaginary in the next
PERIOD = 2 * PAIRS  # of the first stage of two


def one_stage(n: int, size: int) -> np.ndarray:
    """`[n size]`: the transform of `size` real numbers; n/2 real parts, then imaginary parts."""
    turns = (2 * np.arange(n // 2)[:, None] + 1) * np.arange(size) % (2 * n)
    angles = np.pi * turns / n
    return np.concatenate([np.cos(angles), -np.sin(angles)])


def phases(k: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2 pi (k + 1/2) / n."""
    angles = np.pi * (2 * k + 1) / n
    return np.cos(angles), np.sin(angles)


def columns(n: int) -> int:
    """M: numbers of the second stage; place i = i1 M + i2, frequency k = k1 + 256 k2."""
    return n // PERIOD


def group(m: int) -> int:
    """Channels whose second stages are one product: as many as fill a matrix unit."""
    return 1 << max(0, (PAIRS // m).bit_length() - 1)


def first_stage(rows: int) -> np.ndarray:
    """`[rows 256]`, i1 by k1: cosines, then negative sines."""
    return one_stage(PERIOD, rows).T


def twiddles(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines between the stages, `[g*M 128]`, i2 by k1."""
    m = columns(n)
    turns = np.arange(m)[:, None] * (2 * np.arange(PAIRS) + 1) % (2 * n)
    return _tiled(np.cos(np.pi * turns / n), m), _tiled(np.sin(np.pi * turns / n), m)


def second_stage(n: int) -> np.ndarray:
    """`[2*g*M g*M]`: cosines, then sines, for g channels."""
    m = columns(n)
    angles = 2 * np.pi * (np.outer(np.arange(m), np.arange(m)) % m) / m
    return np.concatenate([np.kron(np.eye(group(m)), f(angles)) for f in (np.cos, np.sin)])


def ahead(n: int) -> tuple[np.ndarray, np.ndarray]:
    """`phases` as two stages order frequencies, `[g*M 128]`, k2 by k1."""
    m = columns(n)
    k = np.arange(PAIRS) + PERIOD * np.arange(m)[:, None]
    cos, sin = phases(k, n)
    return _tiled(cos, m), _tiled(sin, m)


def _tiled(x: np.ndarray, m: int) -> np.ndarray:
    """For each channel of a group."""
    return np.tile(x, (group(m), 1))
