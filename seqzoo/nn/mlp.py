"""Channel mixers: what a block does to each token alone, after the sequence mixer."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn import inits
from seqzoo.nn.linear import linear


def _width(d_model: int, d_ff: int | None, default: float) -> int:
    """The inner width: as given, else `default * d_model` rounded up to a multiple of 8."""
    width = -(-int(default * d_model) // 8) * 8 if d_ff is None else d_ff
    if d_model < 1 or width < 1:
        raise ValueError(f"d_model is {d_model} and d_ff {d_ff}; both must be at least 1")
    return width


class SwiGLU(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x).

    Args:
        d_model: width of the input and output.
        d_ff: inner width; None = 8/3 d_model, rounded up to a multiple of 8.
        init_std: standard deviation that W starts with; None = 1 / sqrt(width of its input).
        n_residuals: residual additions of the whole network; W_down starts divided by its root.
        dtype: what to compute in.
        rngs: source of the initial values.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        init_std: float | None = None,
        n_residuals: int = 1,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        width = _width(d_model, d_ff, 8 / 3)
        common = dict(dtype=dtype, rngs=rngs)
        init, init_down = inits.normal(1, init_std), inits.normal(n_residuals, init_std)
        self.gate = linear(d_model, width, axes=("embed", "mlp"), kernel_init=init, **common)
        self.up = linear(d_model, width, axes=("embed", "mlp"), kernel_init=init, **common)
        self.down = linear(width, d_model, axes=("mlp", "embed"), kernel_init=init_down, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d]` to `[b t d]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GELU(nnx.Module):
    """y = W_down gelu(W_up x).

    Args:
        d_model: width of the input and output.
        d_ff: inner width; None = 4 d_model.
        n_residuals: residual additions of the whole network; W_down starts divided by its root.
        dtype: what to compute in.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        n_residuals: int = 1,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        width = _width(d_model, d_ff, 4)
        common = dict(dtype=dtype, rngs=rngs)
        self.up = linear(d_model, width, axes=("embed", "mlp"), **common)
        self.down = linear(
            width, d_model, axes=("mlp", "embed"), kernel_init=inits.normal(n_residuals), **common
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d]` to `[b t d]`."""
        return self.down(jax.nn.gelu(self.up(x)))


class SiLU(nnx.Module):
    """y = W_down silu(W_up x + b_up) + b_down.

    Args:
        d_model: width of the input and output.
        d_ff: inner width; None = 2 d_model.
        init_std: standard deviation that W starts with; None = 1 / sqrt(width of its input).
        n_residuals: residual additions of the whole network; W_down starts divided by its root.
        dtype: what to compute in.
        rngs: source of the initial values; biases start at 0.

    Source: `NormalizedFeedForwardNetwork` of facebookresearch/mega (arXiv 2209.10655), without its
    norm and residual, which are the block's.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        init_std: float | None = 0.02,
        n_residuals: int = 1,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        width = _width(d_model, d_ff, 2)
        common = dict(use_bias=True, dtype=dtype, rngs=rngs)
        init, init_down = inits.normal(1, init_std), inits.normal(n_residuals, init_std)
        self.up = linear(d_model, width, axes=("embed", "mlp"), kernel_init=init, **common)
        self.down = linear(width, d_model, axes=("mlp", "embed"), kernel_init=init_down, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d]` to `[b t d]`."""
        return self.down(jax.nn.silu(self.up(x)))


class Identity(nnx.Module):
    """y = x: behind its norm it adds the normalised stream to the stream, as Zoology's blocks do.

    Args:
        d_model: width of the input and output.
        dtype: of the output.
        rngs: unused; there are no parameters.
    """

    def __init__(self, d_model: int, *, dtype: str = "float32", rngs: nnx.Rngs):
        del rngs
        _width(d_model, None, 1)
        self.dtype = str(jnp.dtype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[b t d]` as it is, in `dtype`."""
        return x.astype(self.dtype)
