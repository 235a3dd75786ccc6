"""Sums of log decays between tokens, each made of its own terms alone.

The usual way, differences of one running sum, loses digits where decays are strong: after a log
decay of -1000 the sum is about -1000, so a later decay of exp(-0.01) comes out as a difference of
large numbers, off by 6e-5 in float32. Here no sum holds a term that lies outside of its stretch.
All sums are <= 0 where the log decays are, so no exponential overflows.
"""

import jax
import jax.numpy as jnp


def between(g: jax.Array) -> jax.Array:
    """What decays on the way from token j to token i.

    Args:
        g: log decays `[... c x]`, one per token and channel.

    Returns:
        `[... i j x]`: the sum of g over the tokens after j up to i; 0 where i <= j.
    """
    later = jnp.tri(g.shape[-2], k=-1, dtype=bool)  # [l j]: token l comes after j
    return jnp.cumsum(jnp.where(later[..., None], g[..., :, None, :], 0), axis=-3)
