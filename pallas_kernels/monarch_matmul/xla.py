"""monarch_matmul as one or two batched matrix products, with a backward pass of as many pairs.

Each product multiplies numbers of the dtype of x, adds them up in float32 at least, and rounds the
sum to that dtype, as linear layers do.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, w1, w2, *, config):
    """See `monarch_matmul`; gives y."""
    del config
    return _block_diagonal(x, w1) if w2 is None else _monarch(x, w1, w2)


def _split(x, k: int):
    """`[b t n]` as `[b t k p]`."""
    return x.reshape(*x.shape[:2], k, -1)


def _flat(x):
    """`[b t k p]` as `[b t n]`."""
    return x.reshape(*x.shape[:2], -1)


# --- One factor ---------------------------------------------------------------------------------


@jax.custom_vjp
def _block_diagonal(x, w):
    return _apply(x, w)


def _apply(x, w):
    """The blocks of w `[k q p]` on x `[b t k*p]`, rounded to the dtype of x."""
    return _flat(einsum("btkp,kqp->btkq", _split(x, w.shape[0]), w.astype(x.dtype)))


def _apply_forward(x, w):
    return _apply(x, w), (x, w)


def _apply_backward(residuals, dy):
    x, w = residuals
    k = w.shape[0]
    dx = einsum("btkq,kqp->btkp", _split(dy, k), w.astype(x.dtype))
    dw = einsum("btkq,btkp->kqp", _split(dy, k), _split(x, k))
    return _flat(dx), dw.astype(w.dtype)


_block_diagonal.defvjp(_apply_forward, _apply_backward)


# --- Two factors --------------------------------------------------------------------------------


@jax.custom_vjp
def _monarch(x, w1, w2):
    return _second(_between(x, w1, w2), w2)


def _between(x, w1, w2):
    """Z' `[b t l r]` in the dtype of x."""
    return jnp.swapaxes(_split(_apply(x, w1), w2.shape[2]), 2, 3)


def _second(z, w2):
    return _flat(einsum("btlr,lsr->btsl", z, w2.astype(z.dtype)))


def _monarch_forward(x, w1, w2):
    z = _between(x, w1, w2)
    return _second(z, w2), (x, w1, w2, z)


def _monarch_backward(residuals, dy):
    x, w1, w2, z = residuals
    dy = _split(dy, w2.shape[1])  # [b t s l]
    dw2 = einsum("btsl,btlr->lsr", dy, z)
    dz = einsum("btsl,lsr->btrl", dy, w2.astype(x.dtype))
    dx, dw1 = _apply_backward((x, w1), _flat(dz))
    return dx, dw1, dw2.astype(w2.dtype)


_monarch.defvjp(_monarch_forward, _monarch_backward)
