"""Channel mixers: what a block does to each token alone, after the sequence mixer."""

import jax
from flax import nnx

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
        n_residuals: int = 1,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        width = _width(d_model, d_ff, 8 / 3)
        common = dict(dtype=dtype, rngs=rngs)
        self.gate = linear(d_model, width, axes=("embed", "mlp"), **common)
        self.up = linear(d_model, width, axes=("embed", "mlp"), **common)
        self.down = linear(
            width, d_model, axes=("mlp", "embed"), kernel_init=_shrunk(n_residuals), **common
        )

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
            width, d_model, axes=("mlp", "embed"), kernel_init=_shrunk(n_residuals), **common
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d]` to `[b t d]`."""
        return self.down(jax.nn.gelu(self.up(x)))


def _shrunk(n_residuals: int):
    return nnx.initializers.variance_scaling(1.0 / n_residuals, "fan_in", "normal")
