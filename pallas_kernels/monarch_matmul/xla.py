"""monarch_matmul as one or two batched matrix products, with a backward pass of as many pairs.

Each product multiplies numbers of the dtype of x and adds them up in float32 at least. What stands
between products and y are rounded to that dtype; gradients of factors are not.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum, state_dtype


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, w1, w2, *, config):
    """See `monarch_matmul`; gives y."""
    del config
    return _block_diagonal(x, w1) if w2 is None else _monarch(x, w1, w2)


def _product(equation: str, x, y):
    """The product of two arrays of one dtype, in float32 at least."""
    wide = state_dtype(x, y)
    if x.dtype == wide:
        return einsum(equation, x, y)
    # XLA's dot for CPUs adds up in bfloat16, or has no form for float32 out of bfloat16.
    widened = lambda x, y: einsum(equation, x.astype(wide), y.astype(wide))
    mixed = lambda x, y: einsum(equation, x, y, preferred_element_type=wide)
    return jax.lax.platform_dependent(x, y, cpu=widened, default=mixed)


def _split(x, k: int):
    """`[b t n]` as `[b t k p]`."""
    return x.reshape(*x.shape[:2], k, x.shape[2] // k)


def _flat(x):
    """`[b t k p]` as `[b t n]`."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


# --- One factor ---------------------------------------------------------------------------------


@jax.custom_vjp
def _block_diagonal(x, w):
    return _apply(x, w)


def _apply(x, w):
    """The blocks of w `[k q p]` on x `[b t k*p]`, rounded to the dtype of x."""
    y = _product("btkp,kqp->btkq", _split(x, w.shape[0]), w.astype(x.dtype))
    return _flat(y).astype(x.dtype)


def _apply_forward(x, w):
    return _apply(x, w), (x, w)


def _apply_backward(residuals, dy):
    x, w = residuals
    k = w.shape[0]
    dx = _product("btkq,kqp->btkp", _split(dy, k), w.astype(x.dtype))
    dw = _product("btkq,btkp->kqp", _split(dy, k), _split(x, k))
    return _flat(dx).astype(x.dtype), dw.astype(w.dtype)


_block_diagonal.defvjp(_apply_forward, _apply_backward)


# --- Two factors --------------------------------------------------------------------------------


@jax.custom_vjp
def _monarch(x, w1, w2):
    return _second(_between(x, w1, w2), w2)


def _between(x, w1, w2):
    """Z' `[b t l r]` in the dtype of x."""
    return jnp.swapaxes(_split(_apply(x, w1), w2.shape[2]), 2, 3)


def _second(z, w2):
    return _flat(_product("btlr,lsr->btsl", z, w2.astype(z.dtype))).astype(z.dtype)


def _monarch_forward(x, w1, w2):
    z = _between(x, w1, w2)
    return _second(z, w2), (x, w1, w2, z)


def _monarch_backward(residuals, dy):
    x, w1, w2, z = residuals
    dy = _split(dy, w2.shape[1])  # [b t s l]
    dw2 = _product("btsl,btlr->lsr", dy, z)
    dz = _product("btsl,lsr->btrl", dy, w2.astype(x.dtype)).astype(x.dtype)
    dx, dw1 = _apply_backward((x, w1), _flat(dz))
    return dx, dw1, dw2.astype(w2.dtype)


_monarch.defvjp(_monarch_forward, _monarch_backward)
