"""The packed feature map: 1 + s + s^2 / 2 of s = q.k as a dot product of features.

    phi(x) = [1, x_i, x_i^2 / sqrt(2), x_i x_j for i < j],    f = 1 + k + k (k + 1) / 2

The order is that of fla's TaylorFeatureMap.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.numerics import einsum

# Beyond it a head's state is longer than most sequences: 2,145 features at 64.
WIDEST = 64


def feature_count(k: int) -> int:
    """Features f of a key width k.

    Raises:
        ValueError: there is no such map, or it would be unreasonably wide.
    """
    if not 1 <= k <= WIDEST:
        raise ValueError(
            f"taylor_attention: the width of queries and keys is {k}, which gives "
            f"{1 + k + k * (k + 1) // 2} features per head; allowed are 1 to {WIDEST}"
        )
    return 1 + k + k * (k + 1) // 2


def features_by_definition(x: jax.Array) -> jax.Array:
    """phi of `[... k]`, `[... f]`, as it is written."""
    first, second = np.triu_indices(x.shape[-1], 1)
    parts = (jnp.ones_like(x[..., :1]), x, x * x / math.sqrt(2), x[..., first] * x[..., second])
    return jnp.concatenate(parts, axis=-1)


def features(x: jax.Array) -> jax.Array:
    """phi of `[... k]`, `[... f]`, as the product of two linear maps of x.

    They pick columns by a matrix product, which is exact and quick on any device, and so is its
    gradient.
    """
    k = x.shape[-1]
    matrix, shift = _two_maps(k)
    both = einsum("...k,kf->...f", x, jnp.asarray(matrix, x.dtype)) + jnp.asarray(shift, x.dtype)
    left, right = jnp.split(both, 2, axis=-1)
    return left * right


@functools.lru_cache
def _two_maps(k: int) -> tuple[np.ndarray, np.ndarray]:
    """A `[k 2f]` and a `[2f]` so that phi(x) is left * right of x A + a."""
    first, second = np.triu_indices(k, 1)
    each = np.arange(k)
    f = feature_count(k)
    left, right = np.zeros((k, f)), np.zeros((k, f))
    left[each, 1 + each] = 1
    left[each, 1 + k + each], right[each, 1 + k + each] = 1 / math.sqrt(2), 1
    pairs = np.arange(1 + 2 * k, f)
    left[first, pairs], right[second, pairs] = 1, 1
    ones = np.zeros((2, f))
    ones[0, 0] = 1
    ones[1, : 1 + k] = 1
    return np.concatenate([left, right], axis=1), ones.reshape(-1)
