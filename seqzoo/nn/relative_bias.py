"""What attention adds to its scores for the distance of two tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.param import param


class SimpleBias(nnx.Module):
    """b_ij = w[j - i]: one learned number per distance.

    Args:
        width: unused; there is one number for all channels.
        max_positions: tokens that can see each other (p): distances are -(p-1) .. p-1.
        rngs: source of the initial values: normal, standard deviation 0.02.

    Raises:
        ValueError: a setting is out of range.

    Source: Ma et al., "Mega" (arXiv 2209.10655); `SimpleRelativePositionalBias` of
    facebookresearch/mega, where distances lie in the same order, -(p-1) first.
    """

    def __init__(self, width: int, *, max_positions: int, rngs: nnx.Rngs):
        del width
        at_least(1, max_positions=max_positions)
        self.max_positions = max_positions
        values = inits.normal(std=0.02)(rngs.params(), (2 * max_positions - 1,), jnp.float32)
        self.weight = param(values, axes=(None,), decay=False)

    def __call__(self, positions: int) -> jax.Array:
        """`[2 positions - 1]`: of the distances -(positions-1) .. positions-1.

        Raises:
            ValueError: there are more positions than were learned.
        """
        if positions > self.max_positions:
            raise ValueError(
                f"{positions} tokens see each other and rel_pos_bias=simple has numbers for "
                f"max_positions={self.max_positions}; raise it, set chunk_size, or take "
                "rel_pos_bias=rotary"
            )
        start = self.max_positions - positions
        return self.weight[...][start : start + 2 * positions - 1]


class RotaryBias(nnx.Module):
    """b_ij = <turn_i(alpha), turn_j(beta)>, two learned vectors turned as rotary positions are.

    It depends on j - i alone, and serves distances that were never trained.

    Args:
        width: of alpha and beta (z), even.
        max_positions: unused; any distance has a bias.
        theta: base of the wavelengths.
        rngs: source of the initial values: normal, standard deviation 0.02.

    Raises:
        ValueError: a setting is out of range.

    Source: Ma et al., "Mega" (arXiv 2209.10655); `RotaryRelativePositionalBias` of
    facebookresearch/mega.

    Differs from source: one sum per distance in place of a product of all pairs; equal up to
    rounding.
    """

    def __init__(
        self, width: int, *, max_positions: int = 1, theta: float = 10000.0, rngs: nnx.Rngs
    ):
        del max_positions
        if width < 2 or width % 2:
            raise ValueError(
                f"z_dim is {width}; rel_pos_bias=rotary turns pairs of channels: it must be even"
            )
        self.theta = float(theta)
        draw = lambda: param(
            inits.normal(std=0.02)(rngs.params(), (width,), jnp.float32), axes=(None,), decay=False
        )
        self.alpha, self.beta = draw(), draw()

    def __call__(self, positions: int) -> jax.Array:
        """`[2 positions - 1]`: of the distances -(positions-1) .. positions-1."""
        a, b = self.alpha[...], self.beta[...]
        (a1, a2), (b1, b2) = jnp.split(a, 2), jnp.split(b, 2)
        half = a1.size
        frequency = self.theta ** (-jnp.arange(half, dtype=a.dtype) / half)
        distance = jnp.arange(1 - positions, positions, dtype=a.dtype)
        # Pairs as complex numbers: Re(conj(alpha) beta e^{i (j - i) w}), summed over pairs.
        angle = distance[:, None] * frequency
        return jnp.sum(
            jnp.cos(angle) * (a1 * b1 + a2 * b2) - jnp.sin(angle) * (a1 * b2 - a2 * b1), axis=-1
        )


BIASES = {"simple": SimpleBias, "rotary": RotaryBias}
