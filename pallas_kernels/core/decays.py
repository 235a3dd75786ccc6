"""Sums of log decays between tokens, each made of its own terms alone.

The usual way, differences of one running sum, loses digits where decays are strong: after a log
decay of -1000 the sum is about -1000, so a later decay of exp(-0.01) comes out as a difference of
large numbers, off by 6e-5 in float32. Here no sum holds a term that lies outside of its stretch.
All sums are <= 0 where the log decays are, so no exponential overflows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.core.numerics import einsum

# exp of it is 0 in any precision, and sums of it are finite: a 0 times -inf would be nan.
_LOWEST = -1e30


def between(g: jax.Array) -> jax.Array:
    """What decays on the way from token j to token i.

    Args:
        g: log decays `[... c]`, one per token; -inf is a decay to 0.

    Returns:
        `[... i j]`: the sum of g over the tokens after j up to i; 0 where i <= j.
    """
    c = g.shape[-1]
    after = jnp.tri(c, k=-1, dtype=bool)  # [l j]: token l comes after j
    terms = jnp.where(after, jnp.maximum(g, _LOWEST)[..., :, None], 0)
    return einsum("il,...lj->...ij", jnp.tri(c, dtype=g.dtype), terms)
