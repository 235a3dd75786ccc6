"""The gated delta rule on some chunks: matrix products for all of them, then a pass of states.

Letters: chunks n, of c tokens i and j; README.md derives the form and its gradient. All arrays are
in the dtype to compute in, and 0 where there is no token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import chunks
from pallas_kernels.core.chunks import Plan, keep
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.triangular import inverse


class Tokens(NamedTuple):
    """The arguments, cut into chunks.

    Attributes:
        q, k: `[n b h c k]`; q is scaled.
        v: `[n b h c v]`.
        g, beta: `[n b h c]`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array


class Inside(NamedTuple):
    """What a chunk is before it meets a state.

    Attributes:
        faded: D, what is left at token i of what token j brought, `[n b h c c]`; 0 for j > i.
        start: what is left at token i of the state before the chunk, `[n b h c]`.
        alike: k_i . k_j D_ij for j < i, `[n b h c c]`.
        solved: T = (I + diag(beta) alike)^-1, `[n b h c c]`.
        values: U = T diag(beta) V: what tokens write if the state before is 0, `[n b h c v]`.
        keys: W = T diag(beta start) K: how the state before changes that, `[n b h c k]`.
    """

    faded: jax.Array
    start: jax.Array
    alike: jax.Array
    solved: jax.Array
    values: jax.Array
    keys: jax.Array

    @property
    def end(self) -> jax.Array:
        """What is left at the end of the chunk of what token j brought, `[n b h c]`."""
        return self.faded[..., -1, :]

    @property
    def through(self) -> jax.Array:
        """What is left at the end of the state before, `[n b h]`."""
        return self.start[..., -1]


def forward(tokens: Tokens, s: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """y `[n b h c v]` and the states after, from the states before `[b h k v]` (`[b m h k v]`)."""
    q, _, v, _, _ = tokens
    x = _inside(tokens, plan)
    s, (written, starts) = _states(tokens, x, s, plan)
    y = _wide(x.start, v) * einsum("...ik,...kv->...iv", q, starts)
    return y + einsum("...ij,...jv->...iv", _scores(tokens, x), written), s


def backward(
    tokens: Tokens, s: jax.Array, plan: Plan, dy: jax.Array, ds: jax.Array
) -> tuple[Tokens, jax.Array]:
    """Gradients of the tokens, and of the states before from those of the states after.

    Args:
        tokens, s, plan: what `forward` was given.
        dy: gradient of y.
        ds: of the states after.
    """
    q, k, v, _, beta = tokens
    x = _inside(tokens, plan)
    scores = _scores(tokens, x)
    _, (written, starts) = _states(tokens, x, s, plan)

    # The states, from the last chunk to the first.
    def step(ds, chunk):
        dwritten, read, k_end, keys, through = chunk
        dwritten = dwritten + einsum("bhck,bhkv->bhcv", k_end, ds)
        before = _wide(through, ds) * ds + read - einsum("bhck,bhcv->bhkv", keys, dwritten)
        return before, (dwritten, ds)

    inputs = (
        einsum("...ij,...iv->...jv", scores, dy),
        einsum("...ik,...iv->...kv", _wide(x.start, q) * q, dy),
        _wide(x.end, k) * k,
        x.keys,
        x.through,
    )
    ds, (dvalues, dends) = chunks.carry(step, ds, inputs, plan.memory, reverse=True)

    # What was written: through T, whose gradient is dL = -T^T dT T^T.
    dkeys = -einsum("...iv,...kv->...ik", dvalues, starts)
    dv_beta = einsum("...ij,...iv->...jv", x.solved, dvalues)
    dk_beta = einsum("...ij,...ik->...jk", x.solved, dkeys)
    dlower = -keep(
        einsum("...iv,...jv->...ij", dv_beta, x.values)
        + einsum("...ik,...jk->...ij", dk_beta, x.keys),
        chunks.sees(Plan(None, None, None), beta.shape[-1], strictly=True),
    )
    dalike = _wide(beta, dlower) * dlower

    # What was read.
    dscores = einsum("...iv,...jv->...ij", dy, written)
    dq_start = einsum("...iv,...kv->...ik", dy, starts)
    dk_end = einsum("...iv,...kv->...ik", written, dends)

    by_q, by_k = dscores * x.faded, dalike * x.faded
    dq = _wide(x.start, q) * dq_start + einsum("...ij,...jk->...ik", by_q, k)
    dk = (
        einsum("...ij,...ik->...jk", by_q, q)
        + einsum("...ij,...jk->...ik", by_k + jnp.swapaxes(by_k, -1, -2), k)
        + _wide(beta * x.start, k) * dk_beta
        + _wide(x.end, k) * dk_end
    )
    # Row sums as products of matrices: XLA's own sums along a row are slow on a CPU.
    rows = lambda a, b: einsum("...ij,...ij->...i", a, b)
    columns = lambda a, b: einsum("...ij,...ij->...j", a, b)
    by_alike, by_start, by_end = rows(dlower, x.alike), x.start * rows(dk_beta, k), x.end
    by_end = by_end * rows(dk_end, k)
    dbeta = rows(dv_beta, v) + by_alike + by_start
    # A log decay acts on all that passes its token: sums over what comes after.
    dsum = rows(dscores, scores) - columns(dscores, scores)
    dsum = dsum + beta * by_alike - columns(dalike, x.alike)
    dsum = dsum + beta * by_start + x.start * rows(dq_start, q) - by_end
    at_end = x.through * einsum("...kv,...kv->...", starts, dends) + jnp.sum(by_end, axis=-1)
    dg = einsum("ij,...i->...j", _lower(beta), dsum) + at_end[..., None]
    return Tokens(dq, dk, _wide(beta, v) * dv_beta, dg, dbeta), ds


def _inside(tokens: Tokens, plan: Plan) -> Inside:
    _, k, v, g, beta = tokens
    c = g.shape[-1]
    # Sums of log decays over the tokens after j up to i: of their own terms alone, so that no digit
    # is lost where decays are strong.
    after_j = jnp.tri(c, k=-1, dtype=g.dtype)
    sums = einsum("il,...lj->...ij", _lower(g), g[..., None] * after_j)
    faded = keep(jnp.exp(sums), chunks.sees(plan, c))
    start = jnp.exp(einsum("ij,...j->...i", _lower(g), g))
    start = keep(start, chunks.sees_start(plan))
    alike = keep(einsum("...ik,...jk->...ij", k, k) * faded, after_j > 0)
    solved = inverse(_wide(beta, alike) * alike)
    return Inside(
        faded,
        start,
        alike,
        solved,
        values=einsum("...ij,...jv->...iv", solved, _wide(beta, v) * v),
        keys=einsum("...ij,...jk->...ik", solved, _wide(beta * start, k) * k),
    )


def _states(tokens: Tokens, x: Inside, s: jax.Array, plan: Plan):
    """The states after; what tokens write `[n b h c v]`, chunks' first states `[n b h k v]`."""

    def step(s, chunk):
        values, keys, k_end, through = chunk
        written = values - einsum("bhck,bhkv->bhcv", keys, s)
        after = _wide(through, s) * s + einsum("bhck,bhcv->bhkv", k_end, written)
        return after, (written, s)

    inputs = (x.values, x.keys, _wide(x.end, tokens.k) * tokens.k, x.through)
    return chunks.carry(step, s, inputs, plan.memory)


def _scores(tokens: Tokens, inside: Inside) -> jax.Array:
    return einsum("...ik,...jk->...ij", tokens.q, tokens.k) * inside.faded


def _lower(x: jax.Array) -> jax.Array:
    """`[c c]`: ones where j <= i."""
    return jnp.tri(x.shape[-1], dtype=x.dtype)


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with axes of 1 behind its own, to stand beside `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
