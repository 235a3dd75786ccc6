"""selective_scan for any device that XLA compiles for: chunks, and a backward pass of its own.

The forward pass keeps the state at the start of each chunk and nothing else; the backward pass
computes the states inside a chunk again and walks back through it. The state is held as
`[b n e]`: channels are contiguous, so that a step is a few wide vector operations. What was tried
and measured is in README.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.segments import boundaries

# Tokens per chunk. Longer ones keep fewer states and need more room while walking back; 16 to 64
# were equally fast on a CPU.
CHUNK = 32


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(u, delta, A, B, C, D, z, delta_bias, h, last_id, segment_ids, *, delta_softplus, config):
    """See `selective_scan`; h `[b e n]` in the dtype to compute in. Returns y, h, last_id."""
    del config
    t = u.shape[1]
    if segment_ids is None:
        reset = valid = None
    else:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    chunk = min(CHUNK, t)
    padding = -t % chunk
    if padding:
        if valid is None:
            valid = jnp.ones(u.shape[:2], bool)
        else:
            reset = jnp.pad(reset, ((0, 0), (0, padding)))
        valid = jnp.pad(valid, ((0, 0), (0, padding)))
        pad = lambda x: None if x is None else jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        u, delta, B, C, z = map(pad, (u, delta, B, C, z))
    y, h = _scan(
        (u, delta, A, B, C, D, z, delta_bias, jnp.swapaxes(h, 1, 2)),
        (reset, valid),
        chunk,
        delta_softplus,
    )
    return y[:, :t], jnp.swapaxes(h, 1, 2), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(inputs, masks, chunk: int, softplus: bool):
    """y `[b t e]` and the last state `[b n e]`; t is a multiple of chunk."""
    return _forward(inputs, masks, chunk, softplus)[0]


def _forward(inputs, masks, chunk, softplus):
    u, delta, A, B, C, D, z, delta_bias, h0 = inputs
    reset, valid = masks
    dtype = h0.dtype
    At = A.astype(dtype).T  # [n e]

    def one_chunk(carry, i):
        h, y = carry
        u_c, delta_c, B_c, C_c, z_c, reset_c, valid_c = _chunks(
            i, chunk, dtype, u, delta, B, C, z, reset, valid
        )
        u_c, B_c, C_c = (_keep(x, valid_c) for x in (u_c, B_c, C_c))
        d_c = _step_sizes(delta_c, delta_bias, softplus, valid_c)

        def token(h, x):
            d_t, u_t, B_t, C_t, reset_t = x
            h = _advance(h, At, d_t, u_t, B_t, reset_t)
            return h, jnp.sum(h * C_t[:, :, None], axis=1)

        last, y_c = jax.lax.scan(token, h, (d_c, u_c, B_c, C_c, reset_c))
        if D is not None:
            y_c += D.astype(dtype) * u_c
        if z is not None:
            y_c *= jax.nn.silu(_keep(z_c, valid_c))
        y_c = _keep(y_c, valid_c)  # the D path is 0 there already; the state's is not
        return (last, _write(y, y_c, i, chunk)), h

    steps = jnp.arange(u.shape[1] // chunk)
    (h, y), starts = jax.lax.scan(one_chunk, (h0, jnp.zeros_like(u)), steps)
    return (y, h), starts


def _scan_forward(inputs, masks, chunk, softplus):
    outputs, starts = _forward(inputs, masks, chunk, softplus)
    return outputs, (inputs, masks, starts)


def _scan_backward(chunk, softplus, residuals, cotangents):
    inputs, masks, starts = residuals
    u, delta, A, B, C, D, z, delta_bias, h0 = inputs
    reset, valid = masks
    dy, dh = cotangents
    dtype = h0.dtype
    At = A.astype(dtype).T

    def one_chunk(carry, x):
        lam, sums, outs = carry
        i, start = x
        u_c, delta_c, B_c, C_c, z_c, dy_c, reset_c, valid_c = _chunks(
            i, chunk, dtype, u, delta, B, C, z, dy, reset, valid
        )
        u_c, B_c, C_c, dy_c = (_keep(x, valid_c) for x in (u_c, B_c, C_c, dy_c))
        sizes, pull_sizes = jax.vjp(
            lambda delta_c, bias: _step_sizes(delta_c, bias, softplus, valid_c), delta_c, delta_bias
        )

        def again(h, x):
            d_t, u_t, B_t, reset_t = x
            return _advance(h, At, d_t, u_t, B_t, reset_t), h

        last, before = jax.lax.scan(again, start, (sizes, u_c, B_c, reset_c))
        dz_c = None
        if z is not None:
            after = jnp.concatenate([before[1:], last[None]])
            y_c = jnp.einsum("cbne,cbn->cbe", after, C_c)
            y_c = y_c if D is None else y_c + D.astype(dtype) * u_c
            gate, pull_gate = jax.vjp(jax.nn.silu, _keep(z_c, valid_c))
            (dz_c,) = pull_gate(dy_c * y_c)
            dy_c = dy_c * gate

        def back(carry, x):
            lam, dA = carry  # lam: the gradient by h_t, the part that comes from later tokens
            h, d_t, u_t, B_t, C_t, dy_t, reset_t = x
            h = h if reset_t is None else jnp.where(reset_t[:, None, None], 0, h)
            decay = jnp.exp(d_t[:, None, :] * At)
            kept, du = decay * h, d_t * u_t
            lam = lam + dy_t[:, None, :] * C_t[:, :, None]
            dC_t = jnp.einsum("be,bne->bn", dy_t, kept + du[:, None, :] * B_t[:, :, None])
            dB_t = jnp.einsum("be,bne->bn", du, lam)
            by_input = jnp.sum(lam * B_t[:, :, None], axis=1)
            by_decay = lam * kept
            dd_t = u_t * by_input + jnp.sum(by_decay * At, axis=1)
            lam = lam * decay
            lam = lam if reset_t is None else jnp.where(reset_t[:, None, None], 0, lam)
            return (lam, dA + by_decay * d_t[:, None, :]), (d_t * by_input, dd_t, dB_t, dC_t)

        dA, dD, d_bias = sums
        (lam, dA), (du_c, dd_c, dB_c, dC_c) = jax.lax.scan(
            back, (lam, dA), (before, sizes, u_c, B_c, C_c, dy_c, reset_c), reverse=True
        )
        if D is not None:
            du_c += D.astype(dtype) * dy_c
            dD = dD + jnp.einsum("cbe,cbe->e", dy_c, u_c)
        ddelta_c, bias_c = pull_sizes(dd_c)
        d_bias = None if delta_bias is None else d_bias + bias_c.astype(dtype)
        parts = (du_c, ddelta_c, dB_c, dC_c, dz_c)
        outs = tuple(
            None if out is None else _write(out, _keep(part, valid_c), i, chunk)
            for out, part in zip(outs, parts, strict=True)
        )
        return (lam, (dA, dD, d_bias), outs), None

    zeros_like = lambda x: None if x is None else jnp.zeros_like(x)
    sums = (
        jnp.zeros_like(h0),
        None if D is None else jnp.zeros(D.shape, dtype),
        None if delta_bias is None else jnp.zeros(delta_bias.shape, dtype),
    )
    steps = jnp.arange(u.shape[1] // chunk)
    (lam, (dA, dD, d_bias), (du, ddelta, dB, dC, dz)), _ = jax.lax.scan(
        one_chunk,
        (dh.astype(dtype), sums, tuple(map(zeros_like, (u, delta, B, C, z)))),
        (steps, starts),
        reverse=True,
    )
    dA = jnp.sum(dA, axis=0).T.astype(A.dtype)
    dD = None if D is None else dD.astype(D.dtype)
    d_bias = None if delta_bias is None else d_bias.astype(delta_bias.dtype)
    return (du, ddelta, dA, dB, dC, dD, dz, d_bias, lam), (None, None)


_scan.defvjp(_scan_forward, _scan_backward)


def _advance(h, At, d_t, u_t, B_t, reset_t):
    """One token: h `[b n e]` from d_t, u_t `[b e]` and B_t `[b n]`."""
    h = h if reset_t is None else jnp.where(reset_t[:, None, None], 0, h)
    return jnp.exp(d_t[:, None, :] * At) * h + (d_t * u_t)[:, None, :] * B_t[:, :, None]


def _step_sizes(delta_c, delta_bias, softplus, valid_c):
    """The step sizes of a chunk `[c b e]`; 0 at padding, where the state then stays as it was."""
    d_c = _keep(delta_c, valid_c)
    d_c = d_c if delta_bias is None else d_c + delta_bias.astype(d_c.dtype)
    return _keep(jax.nn.softplus(d_c) if softplus else d_c, valid_c)


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
