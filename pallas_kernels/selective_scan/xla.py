"""selective_scan for any device that XLA compiles for: chunks, and a backward pass of its own.

The forward pass keeps the state at the start of each chunk and nothing else; the backward pass
computes the states inside a chunk again and walks back through it. The state is held as
`[b n e]`: channels are contiguous, so that a step is a few wide vector operations. README.md has
the maths, and what was tried and measured.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, numerics
from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.segments import boundaries

# States of this many numbers stay near a CPU core while a chunk is worked on.
_NEAR = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        chunk: tokens per chunk. One state per chunk is kept for the backward pass, and two per
            token of the chunk in hand.
        rows: sequences of the batch worked on at a time; None = all.
    """

    chunk: int = 32
    rows: int | None = None

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> "XlaConfig":
        """All rows at once, on a CPU as many as stay near a core."""
        rows = None
        if device_kind == "cpu":
            fit = max(2, _NEAR // (sizes["e"] * sizes["n"]))
            rows = max(r for r in range(1, fit + 1) if sizes["b"] % r == 0)
        return cls(rows=rows, device_kind=device_kind)


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(u, delta, A, B, C, D, z, delta_bias, h, last_id, segment_ids, *, delta_softplus, config):
    """See `selective_scan`; h `[b e n]` in the dtype to compute in. Returns y, h, last_id."""
    b, t, e = u.shape
    sizes = dict(b=b, t=t, e=e, n=A.shape[1])
    config = XlaConfig.of(config, sizes, dispatch.device_kind(config))
    if segment_ids is None:
        reset = valid = None
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    chunk = min(config.chunk, t)
    padding = -t % chunk
    if padding:
        valid = jnp.ones((b, t), bool) if valid is None else valid
        u, delta, B, C, z, reset, valid = (
            _pad(x, padding) for x in (u, delta, B, C, z, reset, valid)
        )
    y, h = _scan(
        (u, delta, B, C, z),
        (A, D, delta_bias),
        jnp.swapaxes(h, 1, 2),
        (reset, valid),
        (chunk, config.rows or b, delta_softplus),
    )
    return y[:, :t], jnp.swapaxes(h, 1, 2), last_id


def _pad(x, padding: int):
    """More tokens, all zero, behind those of `[b t ...]`."""
    return None if x is None else jnp.pad(x, [(0, padding * (i == 1)) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(inputs, weights, h, masks, how):
    """y `[b t e]` and the last state `[b n e]`; t is a multiple of the chunk."""
    return _scan_forward(inputs, weights, h, masks, how)[0]


def _scan_forward(inputs, weights, h, masks, how):
    chunk, rows, softplus = how
    block = lambda batched: _forward(batched, weights, chunk, softplus)
    y, last, starts = _by_rows(block, rows, (inputs, masks, h))
    return (y, last), (inputs, weights, masks, starts)


def _scan_backward(how, residuals, cotangents):
    chunk, rows, softplus = how
    inputs, weights, masks, starts = residuals
    dy, dlast = cotangents
    block = lambda batched: _backward(batched, weights, chunk, softplus)
    dinputs, dweights, dh = _by_rows(block, rows, (inputs, masks, starts, dy, dlast))
    total = lambda x, like: None if x is None else jnp.sum(x, axis=0).astype(like.dtype)
    dA, dD, dbias = map(total, dweights, weights)
    return dinputs, (dA, dD, dbias), dh, (None, None)


_scan.defvjp(_scan_forward, _scan_backward)


def _by_rows(function, rows: int, batched):
    """Applies a function of `[b ...]` arrays to as many rows at a time, one block after another."""
    blocks = jax.tree.leaves(batched)[0].shape[0] // rows
    if blocks == 1:
        return function(batched)
    cut = lambda x: x.reshape(blocks, rows, *x.shape[1:])
    join = lambda x: x.reshape(blocks * rows, *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(cut, batched)))


def _forward(batched, weights, chunk: int, softplus: bool):
    """y `[b t e]`, the last state and those at the starts of chunks `[b t/c n e]`."""
    (u, delta, B, C, z), (reset, valid), h = batched
    A, D, delta_bias = weights
    dtype = h.dtype
    At = A.astype(dtype).T  # [n e]

    def one_chunk(carry, i):
        h, y = carry
        u_c, delta_c, B_c, C_c, z_c, reset_c, valid_c = _chunks(
            i, chunk, dtype, u, delta, B, C, z, reset, valid
        )
        u_c, B_c, C_c, z_c = (_keep(x, valid_c) for x in (u_c, B_c, C_c, z_c))
        d_c, _ = _step_sizes(delta_c, delta_bias, softplus, valid_c)

        def token(h, x):
            d, u, B, C, reset = x
            h = _decays(d, At, reset) * h + _n(d * u) * _e(B)
            return h, einsum("bne,bn->be", h, C)

        last, y_c = jax.lax.scan(token, h, (d_c, u_c, B_c, C_c, reset_c))
        if D is not None:
            y_c = y_c + D.astype(dtype) * u_c
        if z_c is not None:
            y_c = y_c * jax.nn.silu(z_c)
        return (last, _write(y, y_c, i, chunk)), h

    steps = jnp.arange(u.shape[1] // chunk)
    (last, y), starts = jax.lax.scan(one_chunk, (h, jnp.zeros_like(u)), steps)
    return y, last, jnp.swapaxes(starts, 0, 1)


def _backward(batched, weights, chunk: int, softplus: bool):
    """Gradients of the inputs, of the weights row by row, and of the state before."""
    (u, delta, B, C, z), (reset, valid), starts, dy, dlast = batched
    A, D, delta_bias = weights
    dtype = starts.dtype
    At = A.astype(dtype).T
    b = u.shape[0]

    def one_chunk(carry, x):
        # lam is the gradient by h_t, the part that comes from later tokens.
        lam, (dA, dD, dbias), outs = carry
        i, start = x
        u_c, delta_c, B_c, C_c, z_c, dy_c, reset_c, valid_c = _chunks(
            i, chunk, dtype, u, delta, B, C, z, dy, reset, valid
        )
        u_c, B_c, C_c, z_c, dy_c = (_keep(x, valid_c) for x in (u_c, B_c, C_c, z_c, dy_c))
        d_c, slope_c = _step_sizes(delta_c, delta_bias, softplus, valid_c)
        du_c = d_c * u_c  # what B brings into the state
        decay_c = _decays(d_c, At, reset_c)

        def again(h, x):
            decay, du, B = x
            kept = decay * h
            return kept + _n(du) * _e(B), kept

        _, kept_c = jax.lax.scan(again, start, (decay_c, du_c, B_c))  # [c b n e]
        dz_c = None
        if z_c is not None:
            y_c = einsum("cbne,cbn->cbe", kept_c, C_c)
            y_c = y_c + du_c * einsum("cbn,cbn->cb", B_c, C_c)[..., None]
            y_c = y_c if D is None else y_c + D.astype(dtype) * u_c
            gate, pull_gate = jax.vjp(jax.nn.silu, z_c)
            (dz_c,) = pull_gate(dy_c * y_c)
            dy_c = dy_c * gate

        def back(carry, x):
            lam, dA = carry
            decay, kept, d, du, B, C, dy = x
            dB = einsum("bne,be->bn", lam, du)  # less the part of dy, which is below
            lam = lam + _n(dy) * _e(C)
            by_decay = lam * kept
            by_input, by_size = _two_sums(lam * _e(B), by_decay * At, axis=1)
            return (lam * decay, dA + by_decay * _n(d)), (by_input, by_size, dB)

        (lam, dA), (by_input, by_size, dB_c) = jax.lax.scan(
            back, (lam, dA), (decay_c, kept_c, d_c, du_c, B_c, C_c, dy_c), reverse=True
        )
        both = einsum("cbe,cbe->cb", dy_c, du_c)[..., None]
        dB_c = dB_c + C_c * both
        dC_c = einsum("cbne,cbe->cbn", kept_c, dy_c) + B_c * both
        ddelta_c = u_c * by_input + by_size
        ddelta_c = ddelta_c if slope_c is None else ddelta_c * slope_c
        dinput_c = d_c * by_input
        if D is not None:
            dinput_c = dinput_c + D.astype(dtype) * dy_c
            dD = dD + einsum("cbe,cbe->be", dy_c, u_c)
        if delta_bias is not None:
            dbias = dbias + jnp.sum(_keep(ddelta_c, valid_c), axis=0)
        parts = (dinput_c, ddelta_c, dB_c, dC_c, dz_c)
        outs = tuple(
            None if out is None else _write(out, _keep(part, valid_c), i, chunk)
            for out, part in zip(outs, parts, strict=True)
        )
        return (lam, (dA, dD, dbias), outs), None

    zeros_like = lambda x: None if x is None else jnp.zeros_like(x)
    by_row = lambda x: None if x is None else jnp.zeros((b, *x.shape), dtype)
    (lam, (dA, dD, dbias), dinputs), _ = jax.lax.scan(
        one_chunk,
        (
            dlast.astype(dtype),
            (jnp.zeros_like(dlast, dtype), by_row(D), by_row(delta_bias)),
            tuple(map(zeros_like, (u, delta, B, C, z))),
        ),
        (jnp.arange(u.shape[1] // chunk), jnp.swapaxes(starts, 0, 1)),
        reverse=True,
    )
    return dinputs, (jnp.swapaxes(dA, 1, 2), dD, dbias), lam


def _n(x):
    """`[... e]` with an axis for the states: `[... 1 e]`."""
    return x[..., None, :]


def _e(x):
    """`[... n]` with an axis for the channels: `[... n 1]`."""
    return x[..., None]


def _decays(d, At, reset):
    """exp(d A) `[... b n e]`; 0 where a document begins."""
    decay = jnp.exp(_n(d) * At)
    return decay if reset is None else jnp.where(reset[..., None, None], 0, decay)


def _step_sizes(delta_c, delta_bias, softplus: bool, valid_c):
    """The step sizes of a chunk `[c b e]`, and their slope by delta (None = 1).

    At padding the size is 0: the state then stays as it was.
    """
    x = _keep(delta_c, valid_c)
    x = x if delta_bias is None else x + delta_bias.astype(x.dtype)
    if not softplus:
        return _keep(x, valid_c), None
    size, slope = numerics.softplus(x)
    return _keep(size, valid_c), slope


def _two_sums(x, y, *, axis: int):
    """Both sums over an axis in one pass (two of XLA's own are many times slower on a CPU)."""
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    zero = jnp.zeros((), x.dtype)
    return jax.lax.reduce((x, y), (zero, zero), add, (axis,))


def _chunks(i, chunk: int, dtype, *arrays: Any) -> list:
    """Chunk i of `[b t ...]` arrays as `[c b ...]`, floats in dtype."""

    def cut(x):
        if x is None:
            return None
        x = jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        return jnp.swapaxes(x if x.dtype == bool else x.astype(dtype), 0, 1)

    return [cut(x) for x in arrays]


def _write(out, x_c, i, chunk: int):
    """Puts a chunk `[c b e]` into its place of `[b t e]`."""
    x_c = jnp.swapaxes(x_c, 0, 1).astype(out.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, x_c, i * chunk, axis=1)


def _keep(x, valid_c):
    """Sets padding to 0, whatever stands there (a nan times 0 would stay)."""
    if x is None or valid_c is None:
        return x
    return jnp.where(valid_c[:, :, None], x, 0)
