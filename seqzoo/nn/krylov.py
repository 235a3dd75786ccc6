"""Linear state spaces with a dense matrix: discretised, as a convolution kernel, as a state.

    x_t = Abar x_{t-1} + Bbar u_t,   y_t = C x_t,   kernel[i] = C Abar^i Bbar

Powers lose their digits where a product rounds its inputs: everything here is float32 (or float64)
with full-precision products, on every device. Features come first: `[e ...]`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum

# Numbers of a matrix per feature that are worked on at once. Of such arrays some forty live in the
# backward pass (powers, their cotangents, factors): 160 MiB in float32.
_BLOCK = 2**20


class Discrete(NamedTuple):
    """One step of the recurrence.

    Attributes:
        A: Abar `[e n n]`.
        B: Bbar `[e n]`.
    """

    A: jax.Array
    B: jax.Array


def bilinear(A: jax.Array, B: jax.Array, dt: jax.Array) -> Discrete:
    """Abar = (I - dt/2 A)^-1 (I + dt/2 A),  Bbar = (I - dt/2 A)^-1 dt B.

    Args:
        A: `[n n]`, or `[e n n]`.
        B: `[n]`, or `[e n]`.
        dt: step sizes `[e]`, above 0.
    """
    eye = jnp.eye(A.shape[-1], dtype=A.dtype)
    implicit = inverse(eye - 0.5 * dt[:, None, None] * A)
    # I + dt/2 A = 2 I - (I - dt/2 A): one inverse serves both.
    return Discrete(2 * implicit - eye, dt[:, None] * jnp.sum(implicit * B[..., None, :], -1))


@jax.custom_vjp
def inverse(M: jax.Array) -> jax.Array:
    """Inverses `[... n n]`, with a gradient by products alone: batched solves are slow on CPUs.

    There they may also never end. jaxlib hands a batched solve to the threads of the program and
    waits inside one of them: with two threads and two solves at a time, each waits for the other.
    """
    return jax.lax.platform_dependent(M, cpu=_eliminated, default=_solved)


def _solved(M: jax.Array) -> jax.Array:
    return jnp.linalg.solve(M, _unit(M))


def _unit(M: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(M.shape[-1], dtype=M.dtype), M.shape)


def _eliminated(M: jax.Array) -> jax.Array:
    """Inverses by Gauss and Jordan, column by column, with the largest pivot."""
    n = M.shape[-1]
    both = jnp.concatenate([M, _unit(M)], axis=-1).reshape(-1, n, 2 * n)
    which = jnp.arange(both.shape[0])

    def column(i, both):
        candidates = jnp.where(jnp.arange(n) >= i, jnp.abs(both[:, :, i]), -1)
        pivot = jnp.argmax(candidates, axis=1)
        row = both[which, pivot]
        both = both.at[which, pivot].set(both[:, i])
        row = row / row[:, i, None]
        # Row i becomes the pivot's; from the others so much of it is taken that the column is 0.
        factors = both[:, :, i].at[:, i].set(-1)
        return both.at[:, i].set(0) - factors[:, :, None] * row[:, None]

    both = jax.lax.fori_loop(0, n, column, both)
    return both[:, :, n:].reshape(M.shape)


def _inverse_forward(M):
    found = inverse(M)
    return found, found


def _inverse_backward(found, cotangent):
    half = einsum("...ji,...jk->...ik", found, cotangent)
    return (-einsum("...ik,...lk->...il", half, found),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def kernel(step: Discrete, C: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The convolution kernel, and how fast powers grow.

    With i = s g + j: kernel[i] = (C Abar^(s g)) (Abar^j Bbar), s baby steps of Bbar and length / s
    giant steps of C, both by doubling. What is kept is n (s + m length / s) numbers per feature
    where all Abar^i Bbar would be n length.

    Args:
        step: of each feature.
        C: `[e m n]`.
        length: of the kernel, at least 1.

    Returns:
        `[e m length]`, and |Abar^k|^(1/k) `[e]` (Frobenius; k the largest power of 2 below length):
        never below the spectral radius, and near to it for a large k.
    """
    e, m, _ = C.shape
    powers = squares(step.A, max(1, (length - 1).bit_length()))
    baby = _power_of_two(math.sqrt(m * length), length)
    columns = _columns(powers, step.B[..., None], baby)[..., 0]  # [e n s]
    rows = _rows(powers, C, baby, -(-length // baby))  # [e m g n]
    k = einsum("emgn,ens->emgs", rows, columns).reshape(e, m, -1)[..., :length]
    return k, _growth(powers, length)


def scan(step: Discrete, C: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The convolution itself, in chunks: products with Toeplitz matrices, and a state in between.

    With chunks of about n tokens that is some 8 n operations per token, all in matrix products, and
    the powers of one chunk. Rows hold one document each.

    Args:
        step: of each feature.
        C: `[e m n]`.
        u: `[e b t]`.

    Returns:
        y `[e b t m]`, and |Abar^k|^(1/k) `[e]` as from `kernel`.
    """
    (e, b, t), m, n = u.shape, C.shape[1], C.shape[2]
    chunk = min(_power_of_two(n, n), 2 ** (t - 1).bit_length())
    powers = squares(step.A, chunk.bit_length())  # to Abar^chunk
    columns = _columns(powers, step.B[..., None], chunk)[..., 0]  # Abar^j Bbar, [e n s]
    rows = _rows(powers, einsum("emk,ekn->emn", C, step.A), 1, chunk)  # C Abar^(i+1), [e m s n]
    u = jnp.pad(u, ((0, 0), (0, 0), (0, -t % chunk))).reshape(e, b, -1, chunk)
    sums = einsum("ens,ebgs->gebn", columns[..., ::-1], u)
    forward = lambda x, new: (einsum("enk,ebk->ebn", powers[-1], x) + new, x)
    _, before = jax.lax.scan(forward, jnp.zeros(sums.shape[1:], sums.dtype), sums)
    inside = _toeplitz(einsum("emn,ens->ems", C, columns))
    y = einsum("ebgj,emji->ebgim", u, inside) + einsum("gebn,emin->ebgim", before, rows)
    return y.reshape(e, b, -1, m)[:, :, :t], _growth(powers, t)


def respond(step: Discrete, C: jax.Array, x: jax.Array, length: int) -> jax.Array:
    """What a state still gives: y[i] = C Abar^(i+1) x.

    Args:
        step: of each feature.
        C: `[e m n]`.
        x: `[e b n]`.
        length: at least 1.

    Returns:
        `[e b m length]`.
    """
    (e, m, _), b = C.shape, x.shape[1]
    powers = squares(step.A, max(1, (length - 1).bit_length()))
    baby = _power_of_two(math.sqrt(m * length / b), length)
    columns = _columns(powers, einsum("enk,ebk->enb", step.A, x), baby)  # [e n s b]
    rows = _rows(powers, C, baby, -(-length // baby))
    return einsum("emgn,ensb->ebmgs", rows, columns).reshape(e, b, m, -1)[..., :length]


def absorb(
    step: Discrete, u: jax.Array, count: jax.Array | int, x: jax.Array | None = None
) -> jax.Array:
    """The state after some inputs: Abar^count x + sum_i Abar^i Bbar u[i].

    Args:
        step: of each feature.
        u: inputs `[e b t]`, the latest first.
        count: int32 `[b]` or one int, at most t: how many steps x lies back.
        x: the state before `[e b n]`; None = zeros.

    Returns:
        `[e b n]`.
    """
    _, b, t = u.shape
    powers = squares(step.A, t.bit_length())
    baby = _power_of_two(math.sqrt(b * t), t)
    columns = _columns(powers, step.B[..., None], baby)[..., 0]  # [e n s]
    u = jnp.pad(u, ((0, 0), (0, 0), (0, -t % baby)))
    sums = einsum("ens,ebgs->ebgn", columns, u.reshape(*u.shape[:2], -1, baby))
    for power in powers[baby.bit_length() - 1 :]:  # pairs of neighbours until one is left
        if sums.shape[2] == 1:
            break
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, sums.shape[2] % 2), (0, 0)))
        sums = sums[:, :, ::2] + einsum("enk,ebgk->ebgn", power, sums[:, :, 1::2])
    if x is None:
        return sums[:, :, 0]
    for i, power in enumerate(powers):
        taken = (jnp.asarray(count) >> i) & 1 == 1
        x = jnp.where(jnp.reshape(taken, (1, -1, 1)), einsum("enk,ebk->ebn", power, x), x)
    return sums[:, :, 0] + x


def squares(A: jax.Array, count: int) -> list[jax.Array]:
    """A, A^2, A^4, ...: `count` of them."""
    powers = [A]
    while len(powers) < count:
        powers.append(einsum("enk,ekl->enl", powers[-1], powers[-1]))
    return powers


def in_blocks(function: Callable, arrays: Any, n: int) -> Any:
    """function(*arrays), some features at a time, computed again in the backward pass.

    Args:
        function: maps arrays `[e' ...]` to arrays `[e' ...]`, feature by feature.
        arrays: a tuple of trees of arrays `[e ...]`.
        n: side of the matrices that function makes per feature.
    """
    e = jax.tree.leaves(arrays)[0].shape[0]
    blocks = next(i for i in range(1, e + 1) if e % i == 0 and e // i * n * n <= _BLOCK or i == e)
    if blocks == 1:
        return jax.checkpoint(function)(*arrays)
    # Feature i goes to block i % blocks: features stay on the devices that hold them.
    cut = lambda a: jnp.swapaxes(a.reshape(e // blocks, blocks, *a.shape[1:]), 0, 1)
    join = lambda a: jnp.swapaxes(a, 0, 1).reshape(e, *a.shape[2:])
    one = jax.checkpoint(lambda block: function(*block), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(cut, arrays)))


def _columns(powers: list[jax.Array], x: jax.Array, count: int) -> jax.Array:
    """x, A x, A^2 x, ...: `[e n q]` to `[e n count q]`, count a power of 2."""
    x = x[:, :, None]
    for power in powers[: count.bit_length() - 1]:
        x = jnp.concatenate([x, einsum("enk,eksq->ensq", power, x)], axis=2)
    return x


def _rows(powers: list[jax.Array], C: jax.Array, stride: int, count: int) -> jax.Array:
    """C, C A^stride, C A^(2 stride), ...: `[e m n]` to `[e m count n]`, stride a power of 2."""
    rows = C[:, :, None]
    for power in powers[stride.bit_length() - 1 :]:
        more = rows[:, :, : count - rows.shape[2]]
        rows = jnp.concatenate([rows, einsum("emgn,enk->emgk", more, power)], axis=2)
    return rows


def _toeplitz(k: jax.Array) -> jax.Array:
    """`[... s]` to `[... j i]`: k[i - j] where i >= j, else 0."""
    s = k.shape[-1]
    line = jnp.pad(k, [(0, 0)] * (k.ndim - 1) + [(0, s)])
    # Each row of 2 s - 1 begins one earlier in the line.
    lines = jnp.broadcast_to(line[..., None, :], (*k.shape, 2 * s)).reshape(*k.shape[:-1], -1)
    return lines[..., : s * (2 * s - 1)].reshape(*k.shape[:-1], s, -1)[..., :s]


def _growth(powers: list[jax.Array], length: int) -> jax.Array:
    """|A^k|^(1/k) `[e]` for k, the largest power of 2 below length (at least 1)."""
    last, k = jax.lax.stop_gradient(powers[-1]), 2 ** (len(powers) - 1)
    while 2 * k < length:
        last, k = einsum("enk,ekl->enl", last, last), 2 * k
    return jnp.sqrt(jnp.sum(last**2, (-2, -1))) ** (1 / k)


def _power_of_two(about: float, most: int) -> int:
    """The power of 2 that is nearest in ratio, from 1 to the last one that is at most `most`."""
    return 2 ** min(max(0, round(math.log2(about))), most.bit_length() - 1)
