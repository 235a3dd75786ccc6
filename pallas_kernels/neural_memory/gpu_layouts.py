"""Arrays as the GPU kernels of neural_memory take them: filled up to tiles of 64."""

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.memory import Weights


def fill(x: jax.Array, *sizes: int) -> jax.Array:
    """Zeros behind the last axes, up to these sizes."""
    last = x.ndim - len(sizes)
    more = [(0, 0 if i < last else sizes[i - last] - n) for i, n in enumerate(x.shape)]
    return jnp.pad(x, more) if any(n for _, n in more) else x


def filled(weights: Weights, hidden: int) -> Weights:
    """Weights of so many hidden units, and of columns up to a tile's."""
    w_in = None if weights.w_in is None else fill(weights.w_in, hidden, SIZE)
    gamma = None if weights.gamma is None else fill(weights.gamma, SIZE)
    return Weights(fill(weights.w_out, SIZE, hidden), w_in, None, gamma)


def cut(weights: Weights, like: Weights) -> Weights:
    """What of filled weights is there."""
    take = lambda x, y: x[tuple(slice(n) for n in y.shape)]
    return jax.tree.map(take, weights, like)
