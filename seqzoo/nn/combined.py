"""How Titans joins what attention says and what the memory says."""

import jax
from flax import nnx

from seqzoo.nn.gated_norm import GatedRMSNorm


class Combined(nnx.Module):
    """norm(y) * sigmoid(norm(m)), with a learned gain on either norm; both per head.

    Args:
        n_heads, head_dim: heads and the width of each.
        eps: added under the roots.
        dtype: of the output; inside it is float32.
        rngs: unused; gains start at 1.

    Source: "Titans" (arXiv 2501.00663), section 4.2: "we normalize the outputs y and M(x) using
    learnable vector-valued weights, followed by a non-linearity"; which one is not said.
    """

    def __init__(
        self,
        n_heads: int,
        head_dim: int,
        *,
        eps: float = 1e-5,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        norm = lambda dtype: GatedRMSNorm(
            n_heads * head_dim, n_groups=n_heads, eps=eps, dtype=dtype, rngs=rngs
        )
        self.y_norm, self.m_norm = norm(dtype), norm(dtype)

    def __call__(self, y: jax.Array, m: jax.Array) -> jax.Array:
        """`[b t h*k]` of both."""
        return self.y_norm(y) * jax.nn.sigmoid(self.m_norm(m))
