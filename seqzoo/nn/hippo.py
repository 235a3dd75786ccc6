"""HiPPO: the state matrices whose state remembers the input as coefficients of polynomials.

All are stable: x' = A x + B u. (The LSSL paper prints LegS with the opposite sign in its appendix.)
Source: Gu et al., "HiPPO" (arXiv 2008.07669); Gu et al., "Combining Recurrent, Convolutional, and
Continuous-time Models with Linear State-Space Layers" (arXiv 2110.13985), appendix B and E.3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqzoo.nn.krylov import inverse


def legs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled Legendre, all of the past: A `[n n]` lower triangular and B `[n]`, float64.

    A[i, k] = -sqrt((2i+1)(2k+1)) below the diagonal, -(i+1) on it;  B[i] = sqrt(2i+1). The factor
    1/t of the original is left out: the system does not change with time.
    """
    root = np.sqrt(2.0 * np.arange(n) + 1)
    A = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0)
    return A, root


def legt(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Translated Legendre, a sliding window: A `[n n]` and B `[n]`, float64.

    A[i, k] = -sqrt((2i+1)(2k+1)) * (1 where i >= k, else (-1)^(i-k));  B[i] = sqrt(2i+1). Twice
    what later code of the authors calls LegT.
    """
    root = np.sqrt(2.0 * np.arange(n) + 1)
    i, k = np.indices((n, n))
    return -np.outer(root, root) * np.where(i >= k, 1.0, (-1.0) ** (i - k)), root


def lagt(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Translated Laguerre, a fading past: A = I/2 - (lower ones) `[n n]`, B = ones, float64."""
    return np.eye(n) / 2 - np.tril(np.ones((n, n))), np.ones(n)


MEASURES = {"legs": legs, "legt": legt, "lagt": lagt}


class Transition(NamedTuple):
    """A trainable A of O(n) numbers that holds every measure (3-quasiseparable matrices).

        A = -diag(pl) (T^-1 + diag(c)) diag(pr),   B = pl * b,   T tridiagonal

    Attributes:
        dl: `[... n+1]`, dl[i] stands in row i, column i-1; both ends are not read.
        d: `[... n]`, the diagonal of T.
        du: `[... n+1]`, du[i+1] stands in row i, column i+1; both ends are not read.
        pl, pr: `[... n]`, scales of rows and columns.
        c: `[... n]`, added to the diagonal.
        b: `[... n]`.

    Source: `TriDInverseAdaptiveTransition` of state-spaces/s4 (which stores -A as well).
    """

    dl: jax.Array
    d: jax.Array
    du: jax.Array
    pl: jax.Array
    pr: jax.Array
    c: jax.Array
    b: jax.Array


def transition(measure: str, n: int, noise: np.ndarray | jax.Array | None = None) -> Transition:
    """The vectors that give a measure.

    Args:
        measure: "legs", "legt" or "lagt".
        n: states.
        noise: standard normal `[n]`; a hundredth of it is added to T's diagonal for legt, as in the
            source (the exact one is 0 between the corners). None = none.
    """
    i, one, none = np.arange(n), np.ones(n), np.zeros(n)
    root = np.sqrt(2.0 * i + 1) if measure != "lagt" else one
    inner = np.pad(np.ones(n - 1), 1)  # dl and du with their unread ends
    if measure == "legt":
        d = none.copy()
        d[0] += 0.5
        d[-1] += 0.5
        dl, du, c = -inner / 2, inner / 2, none
        d = d if noise is None else d + 1e-2 * noise
    else:
        dl, d, du = -inner, one, 0 * inner
        c = -i / (2.0 * i + 1) if measure == "legs" else -one / 2
    parts = (dl, d, du, root, root, c, one)
    return Transition(*(jnp.asarray(part, jnp.result_type(float)) for part in parts))


def matrices(vectors: Transition) -> tuple[jax.Array, jax.Array]:
    """A `[... n n]` and B `[... n]` of a transition, in its dtype."""
    dl, d, du, pl, pr, c, b = vectors
    n = d.shape[-1]
    eye = jnp.eye(n, dtype=d.dtype)
    # Row i of T: dl[i] left of the diagonal, du[i+1] right of it.
    T = d[..., None] * eye
    T += dl[..., :n, None] * jnp.eye(n, k=-1, dtype=d.dtype)
    T += du[..., 1:, None] * jnp.eye(n, k=1, dtype=d.dtype)
    return -pl[..., None] * (inverse(T) + c[..., None] * eye) * pr[..., None, :], pl * b


def normal_legs(n: int) -> np.ndarray:
    """Eigenvalues of the normal part of LegS with positive imaginary part, complex128 `[n/2]`.

    LegS = (a normal matrix) - p p^T with p = sqrt(i + 1/2); the normal one is -I/2 plus a
    skew-symmetric matrix. In rising order.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893), section 4.2.
    """
    A, _ = legs(n)
    p = np.sqrt(np.arange(n) + 0.5)
    skew = A + np.outer(p, p) + np.eye(n) / 2
    return -0.5 + 1j * np.linalg.eigvalsh(-1j * skew)[n // 2 :]
