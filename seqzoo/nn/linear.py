"""Linear layers, embeddings and norms of flax, with our parameter metadata and precision."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn import inits
from seqzoo.nn.param import metadata, param


def linear(
    d_in: int,
    d_out: int,
    *,
    axes: tuple[str | None, str | None],
    use_bias: bool = False,
    kernel_init=None,
    decay: bool = True,
    dtype: str = "float32",
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """y = x W + b, computed in `dtype` from float32 parameters.

    Args:
        d_in, d_out: widths.
        axes: logical names of W's two dimensions.
        use_bias: whether there is a b (it starts at 0).
        kernel_init: of W; None = normal with standard deviation 1 / sqrt(d_in).
        decay: whether weight decay applies to W (never to b).
        dtype: what to compute in.
        rngs: source of the initial values.
    """
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        kernel_init=kernel_init or inits.normal(),
        kernel_metadata=metadata(*axes, decay=decay),
        bias_metadata=metadata(axes[1], decay=False),
        rngs=rngs,
    )


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale, in float32, given back in `dtype`.

    Args:
        d_model: width.
        eps: added under the root.
        dtype: of the output.
        rngs: unused; norms start at 1.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, dtype: str = "float32", rngs: nnx.Rngs):
        super().__init__(
            d_model,
            epsilon=eps,
            dtype=jnp.promote_types(dtype, jnp.float32),
            scale_metadata=metadata("embed", decay=False),
            rngs=rngs,
        )
        self.out_dtype = str(jnp.dtype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.out_dtype)


class LayerNorm(nnx.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32, given back in `dtype`.

    Args:
        d_model: width.
        eps: added under the root.
        dtype: of the output.
        rngs: unused; norms start at 1 and 0.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, dtype: str = "float32", rngs: nnx.Rngs):
        super().__init__(
            d_model,
            epsilon=eps,
            dtype=jnp.promote_types(dtype, jnp.float32),
            use_fast_variance=False,
            scale_metadata=metadata("embed", decay=False),
            bias_metadata=metadata("embed", decay=False),
            rngs=rngs,
        )
        self.out_dtype = str(jnp.dtype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.out_dtype)


class ScaleNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * s with one number s, in float32, given back in `dtype`.

    Args:
        d_model: width; the norm does not depend on it.
        eps: added under the root.
        dtype: of the output.
        rngs: unused; s starts at 1.

    Source: Nguyen and Salazar, "Transformers without Tears" (arXiv 1910.05895), with the mean in
    place of the sum of squares, as MEGA has it.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, dtype: str = "float32", rngs: nnx.Rngs):
        del d_model, rngs
        self.scale = param(jnp.ones(()), axes=(), decay=False)
        self.eps, self.dtype = eps, str(jnp.dtype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[... d]` to `[... d]`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * size * self.scale[...]).astype(self.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "scalenorm": ScaleNorm}
