"""Norms around linear recurrences: of queries and keys before, of what is read after."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.param import param


def l2_norm(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32, given back in the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale * silu(gate), over the last axis: norm first, then gate.

    Args:
        width: of the last axis; for `[b t h v]` that of one head, so that heads share the scale.
        n_groups: parts of the last axis that are divided by their own root.
        eps: added under the root.
        dtype: of the output; inside it is float32.
        rngs: unused; the scale starts at 1.

    Raises:
        ValueError: n_groups does not divide the width.

    Source: the gated output norm of Mamba-2 and of linear attention (fla's FusedRMSNormGated).
    """

    def __init__(
        self,
        width: int,
        *,
        n_groups: int = 1,
        eps: float = 1e-5,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        del rngs
        if n_groups < 1 or width % n_groups:
            raise ValueError(f"n_groups is {n_groups}; it must divide the width {width}")
        self.n_groups, self.eps, self.dtype = n_groups, float(eps), str(jnp.dtype(dtype))
        self.scale = param(jnp.ones(width, jnp.float32), axes=(None,), decay=False)

    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """Maps `[... v]` to `[... v]`; the gate has the same shape, None = no gate."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        parts = x.reshape(*x.shape[:-1], self.n_groups, x.shape[-1] // self.n_groups)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + self.eps)
        y = parts.reshape(x.shape) * self.scale[...]
        if gate is not None:
            y = y * jax.nn.silu(gate.astype(y.dtype))
        return y.astype(self.dtype)
