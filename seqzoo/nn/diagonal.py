"""Diagonal linear state spaces with complex modes in conjugate pairs: one of each pair is kept.

    h_t = Abar h_{t-1} + Bbar u_t,   y_t = 2 Re(C h_t),   kernel[i] = 2 Re(C Abar^i Bbar)

Features come first: `[e ...]`. A state is real numbers `[... n]`: the real parts of n/2 modes, then
their imaginary parts. Everything is float32 (float64 for float64 parameters).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum


class Modes(NamedTuple):
    """One step of the recurrence.

    Attributes:
        log_A: logarithm of Abar, complex `[e n/2]`, real parts below 0.
        B: Bbar, complex `[e n/2]`.
    """

    log_A: jax.Array
    B: jax.Array


def zoh(A: jax.Array, dt: jax.Array) -> Modes:
    """Abar = exp(dt A),  Bbar = (exp(dt A) - 1) / A: inputs held between their times, B = 1.

    Args:
        A: complex `[e n/2]`.
        dt: `[e]`, above 0.
    """
    z = dt[:, None] * A
    x, y = z.real, z.imag
    # exp(z) - 1 without a difference of nearly equal numbers.
    real = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2
    return Modes(z, jax.lax.complex(real, jnp.exp(x) * jnp.sin(y)) / A)


def bilinear(A: jax.Array, dt: jax.Array) -> Modes:
    """Abar = (1 + dt A/2) / (1 - dt A/2),  Bbar = dt / (1 - dt A/2), B = 1.

    Args:
        A: complex `[e n/2]`.
        dt: `[e]`, above 0.
    """
    w = dt[:, None] * A / 2
    below = (1 - w.real) ** 2 + w.imag**2  # |1 - w|^2
    above = (1 + w.real) ** 2 + w.imag**2
    # log(above / below): by log1p near 1, and finite where Abar is 0 (a real mode, dt A = -2).
    gone, excess = above == 0, 4 * w.real / below
    slow = excess > -0.5
    ratio = jnp.where(gone, jnp.finfo(below.dtype).tiny, above / below)
    real = 0.5 * jnp.where(slow, jnp.log1p(jnp.where(slow, excess, 0)), jnp.log(ratio))
    angle = jnp.arctan2(2 * w.imag, jnp.where(gone, 1, 1 - w.real**2 - w.imag**2))
    return Modes(jax.lax.complex(real, angle), dt[:, None] / (1 - w))


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


def kernel(step: Modes, C: jax.Array, length: int) -> jax.Array:
    """The convolution kernel `[e length]` of C, complex `[e n/2]`.

    A Vandermonde product by baby steps and giant steps: with i = s g + j, Abar^i is
    Abar^(s g) Abar^j, so that n (s + length / s) numbers are kept and not n length.
    """
    baby = _baby(length)
    giant = _powers(step, baby * jnp.arange(-(-length // baby)))  # [e n/2 g]
    rows = _real_rows((2 * C * step.B)[..., None] * giant)
    columns = _stack(_powers(step, jnp.arange(baby)))
    return einsum("eng,ens->egs", rows, columns).reshape(C.shape[0], -1)[:, :length]


def respond(step: Modes, C: jax.Array, h: jax.Array, length: int) -> jax.Array:
    """What a state h `[e b n]` still gives: 2 Re(C Abar^(i+1) h), `[e b length]`."""
    baby = _baby(length)
    giant = _powers(step, 1 + baby * jnp.arange(-(-length // baby)))
    rows = _real_rows((2 * C)[:, None, :, None] * _modes(h)[..., None] * giant[:, None], axis=2)
    columns = _stack(_powers(step, jnp.arange(baby)))
    return einsum("ebng,ens->ebgs", rows, columns).reshape(*h.shape[:2], -1)[..., :length]


def absorb(
    step: Modes, u: jax.Array, count: jax.Array | int, h: jax.Array | None = None
) -> jax.Array:
    """The state after some inputs: Abar^count h + sum_i Abar^i Bbar u[i].

    Args:
        step: of each feature.
        u: inputs `[e b t]`, the latest first.
        count: int32 `[b]` or one int: how many steps h lies back.
        h: the state before `[e b n]`; None = zeros.

    Returns:
        `[e b n]`.
    """
    t = u.shape[-1]
    baby = _baby(t)
    u = jnp.pad(u, ((0, 0), (0, 0), (0, -t % baby))).reshape(*u.shape[:2], -1, baby)
    columns = _stack(step.B[..., None] * _powers(step, jnp.arange(baby)))
    sums = _modes(einsum("ens,ebgs->ebgn", columns, u))
    giant = jnp.swapaxes(_powers(step, baby * jnp.arange(u.shape[2])), 1, 2)  # [e g n/2]
    after = jnp.sum(sums * giant[:, None], axis=2)
    if h is not None:
        back = _powers(step, jnp.atleast_1d(jnp.asarray(count)))  # [e n/2 b]
        after += jnp.swapaxes(back, 1, 2) * _modes(h)
    return _stack(after, axis=-1)


def advance(step: Modes, C: jax.Array, u: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: u `[b e]` and h `[b e n]` give y `[b e]` and the state after it."""
    after = jnp.exp(step.log_A) * _modes(h) + step.B * u[..., None]
    return 2 * jnp.sum((C * after).real, -1), _stack(after, axis=-1)


def _baby(length: int) -> int:
    return max(1, round(math.sqrt(length)))


def _powers(step: Modes, k: jax.Array) -> jax.Array:
    """Abar^k, complex `[e n/2 k]`."""
    return jnp.exp(step.log_A[..., None] * k.astype(step.log_A.real.dtype))


def _modes(h: jax.Array) -> jax.Array:
    """Real `[... n]` as complex `[... n/2]`."""
    half = h.shape[-1] // 2
    return jax.lax.complex(h[..., :half], h[..., half:])


def _stack(modes: jax.Array, axis: int = 1) -> jax.Array:
    """Real parts, then imaginary parts, along an axis."""
    return jnp.concatenate([modes.real, modes.imag], axis)


def _real_rows(modes: jax.Array, axis: int = 1) -> jax.Array:
    """What gives Re(a b) when multiplied with `_stack(b)` and summed along the axis."""
    return jnp.concatenate([modes.real, -modes.imag], axis)
