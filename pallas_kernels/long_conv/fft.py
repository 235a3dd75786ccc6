"""The convolution by Fourier transforms of the whole sequence."""

import jax.numpy as jnp

LONGEST = 2**24


def convolve(v, lags, low: int, t: int):
    """See `convolution.convolve`."""
    n = fitting(needed(v.shape[1], lags.shape[0], low, t))
    spectrum = _forward(v, n) * _forward(jnp.roll(_fill(lags, n), low, axis=0), n)
    return _back(spectrum, n)[:, :t]


def correlate(v, dy, low: int, count: int):
    """See `convolution.correlate`."""
    n = fitting(needed(v.shape[1], count, low, dy.shape[1]))
    spectrum = jnp.sum(_forward(dy, n) * jnp.conj(_forward(v, n)), axis=0)
    return jnp.roll(_back(spectrum, n), -low, axis=0)[:count]


def needed(s: int, count: int, low: int, t: int) -> int:
    """The least period at which no lag is mistaken for another.

    Args:
        s: inputs.
        count: lags.
        low: the first of them.
        t: outputs.

    Raises:
        ValueError: it is above LONGEST.
    """
    n = max(s, t, count, s + low + count - 1, t - low)
    if n > LONGEST:
        raise ValueError(
            f"long_conv: {s} inputs, {count} lags and {t} outputs need a Fourier transform of "
            f"length {n}; at most {LONGEST} is allowed: cut the sequence into chunks and hand the "
            "state on, or shorten the kernel"
        )
    return n


def fitting(n: int) -> int:
    """The least number from n on that is 2^i 3^j 5^k, j and k at most 2: those transform fast."""
    return min(
        factor << max(0, -(-n // factor) - 1).bit_length()
        for factor in (1, 3, 5, 9, 15, 25, 45, 75, 225)
    )


def _fill(x, n: int):
    return jnp.pad(x, ((0, n - x.shape[0]), (0, 0)))


def _forward(x, n: int):
    """`[... s e]` to the spectrum `[... e n/2+1]`."""
    return jnp.fft.rfft(jnp.swapaxes(x, -1, -2), n)


def _back(spectrum, n: int):
    """The spectrum `[... e n/2+1]` to `[... n e]`."""
    return jnp.swapaxes(jnp.fft.irfft(spectrum, n), -1, -2)
