"""monarch_matmul by its definition, block after block. Slow and obvious."""

import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum, state_dtype


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(x, w1, w2, *, config):
    """See `monarch_matmul`; gives y."""
    del config
    dtype = state_dtype(x, w1, w2)
    y = _blocks(x.astype(dtype), w1.astype(dtype))
    if w2 is not None:
        n_blocks, s, r = w2.shape
        y = _blocks(_turned(y, r, n_blocks), w2.astype(dtype))  # [l s] as one axis
        y = _turned(y, n_blocks, s)  # [s l]
    return y.astype(x.dtype)


def _blocks(x, w):
    """Each block of w `[k q p]` maps its own p channels of x `[b t k*p]` to q."""
    p = w.shape[2]
    parts = [einsum("btp,qp->btq", x[..., i * p : (i + 1) * p], w[i]) for i in range(len(w))]
    return jnp.concatenate(parts, axis=-1)


def _turned(x, rows: int, columns: int):
    """The last axis as a matrix `[rows columns]`, turned round."""
    place = [i * columns + j for j in range(columns) for i in range(rows)]
    return x[..., jnp.array(place)]
