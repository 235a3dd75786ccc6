"""The packed features inside a TPU kernel: tokens on lanes, features on sublanes.

Products of pairs are ordered by their distance on a circle of the key's components,

    [x_i, x_i^2 / sqrt(2), x_i x_{i+1}, ..., x_i x_{i+k/2-1}, x_i x_{i+k/2} for i < k/2, 1]

with indices modulo k, so that each group is x times x shifted by whole sublanes, and every group is
as long as a register is high (k is a multiple of 16, padded with zeros). Each pair stands there
once: these are the features of features.py in another order, 153 of 160 rows at k = 16.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.tpu import SUBLANES
from pallas_kernels.taylor_attention.features import feature_count

_ROOT_HALF = math.sqrt(0.5)


def rows_of(k: int) -> int:
    """Rows of the features of a key width that is a multiple of 16."""
    return k + k * (k // 2) + k // 2 + SUBLANES


def phi(x: jax.Array) -> jax.Array:
    """Features `[f c]` of float32 tokens `[k c]`."""
    k, c = x.shape
    half = k // 2
    groups = [x, x * x * _ROOT_HALF]
    groups += [x * _ahead(x, d) for d in range(1, half)]
    groups.append(x[:half] * x[half:])
    groups.append((jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, c), 0) == 0).astype(x.dtype))
    return jnp.concatenate(groups, axis=0)


def pull(x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of x `[k c]` from that of its features `[f c]`."""
    k = x.shape[0]
    half = k // 2
    dx = g[:k] + (2 * _ROOT_HALF) * x * g[k : 2 * k]
    for d in range(1, half):
        g_d = g[(d + 1) * k : (d + 2) * k]
        dx = dx + g_d * _ahead(x, d) + _ahead(g_d * x, k - d)
    g_half = g[(half + 1) * k : (half + 1) * k + half]
    return dx + jnp.concatenate([g_half * x[half:], g_half * x[:half]], axis=0)


def _ahead(x: jax.Array, d: int) -> jax.Array:
    """Row i is row i + d of x, modulo its rows."""
    return jnp.concatenate([x[d:], x[:d]], axis=0)


@functools.lru_cache
def orders(k: int, padded: int) -> tuple[np.ndarray, np.ndarray]:
    """How the two orders of features map to each other.

    Args:
        k: width of the keys.
        padded: the multiple of 16 that it was padded to.

    Returns:
        For each row of the kernel's order its place in that of features.py, or their number f where
        it has none; and for each of those f its row in the kernel's.
    """
    f, half = feature_count(k), padded // 2
    first, second = np.triu_indices(k, 1)
    number = {(i, i): 1 + k + i for i in range(k)}
    for n, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        number[i, j] = 1 + 2 * k + n
    there = [1 + i if i < k else f for i in range(padded)]
    for d in range(half + 1):
        for i in range(padded if d < half else half):
            j = (i + d) % padded
            there.append(number.get((min(i, j), max(i, j)), f))
    there += [0] + [f] * (SUBLANES - 1)
    places = np.asarray(there, np.int32)
    back = np.zeros(f, np.int32)
    back[places[places < f]] = np.flatnonzero(places < f)
    return places, back
