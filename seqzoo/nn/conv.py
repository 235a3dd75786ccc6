"""The short causal convolution that stands before many recurrences, as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState, short_conv
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded


class ShortConv(nnx.Module):
    """u_t = activation(sum_i weight_i x_{t-w+1+i} + bias), channel by channel.

    Args:
        width: channels (e).
        d_conv: taps (w); the last one falls on the current token.
        use_bias: whether there is a bias.
        activation: None or "silu".
        implementation: which implementation of the operator; None = the best.
        dtype: of the output.
        rngs: source of the initial values: uniform within +- 1 / sqrt(d_conv), as in the source.

    Source: the `conv1d` of Mamba (arXiv 2312.00752, section 3.4), as torch initialises it.
    """

    def __init__(
        self,
        width: int,
        d_conv: int,
        *,
        use_bias: bool = True,
        activation: str | None = "silu",
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.width, self.d_conv = width, d_conv
        self.activation, self.implementation = activation, implementation
        self.dtype = str(jnp.dtype(dtype))
        bound = d_conv**-0.5
        draw = lambda shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.weight = param(draw((d_conv, width)), axes=("conv", "inner"))
        self.bias = param(draw((width,)), axes=("inner",), decay=False) if use_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: ShortConvState | None = None,
    ) -> tuple[jax.Array, ShortConvState]:
        """Maps `[b t e]` to `[b t e]` in `dtype`, and gives the state after the last token."""
        return sharded(
            short_conv,
            x.astype(self.dtype),
            self.weight[...],
            None if self.bias is None else self.bias[...],
            activation=self.activation,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_state(self, batch_size: int) -> ShortConvState:
        """The state before the first token: zeros, `[b w-1 e]`, float32 at least."""
        x = jnp.zeros((batch_size, self.d_conv - 1, self.width), state_dtype(self.dtype))
        return ShortConvState(x, jnp.zeros((batch_size,), jnp.int32))
