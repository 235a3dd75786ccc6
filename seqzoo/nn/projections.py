"""Queries, keys and values of a recurrence: projected, convolved, through silu, of length 1."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState, short_conv
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.gated_norm import l2_norm
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param


class Projections(nnx.Module):
    """Heads out of the stream: activation(conv(x W)), some of them of length 1.

    Args:
        d_in: width of what comes in.
        n_heads, head_dim: heads (h) and the width of each (k).
        unit: how many of what comes out have length 1 (queries and keys; the first ones).
        n_out: how many heads' inputs come out.
        d_conv: taps of the convolution, 0 = none.
        activation: "silu" or None.
        conv_init_std: it starts as the identity plus normal values of this standard deviation.
        implementation: which implementation of the convolution; None = the best.
        dtype: of what comes out.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        d_in: int,
        n_heads: int,
        head_dim: int,
        *,
        unit: int,
        n_out: int,
        d_conv: int,
        conv_init_std: float,
        activation: str | None = "silu",
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.n_heads, self.head_dim, self.unit, self.n_out = n_heads, head_dim, unit, n_out
        self.activation = activation
        width = n_out * n_heads * head_dim
        common = dict(dtype=str(jnp.dtype(dtype)), rngs=rngs)
        self.proj = linear(d_in, width, axes=("embed", "heads"), **common)
        if d_conv:
            self.conv = ShortConv(
                width,
                d_conv,
                use_bias=False,
                activation=activation,
                implementation=implementation,
                **common,
            )
            weight = conv_init_std * jax.random.normal(rngs.params(), (d_conv, width))
            self.conv.weight = param(weight.at[-1].add(1.0), axes=("conv", "inner"))
        self.d_conv = d_conv

    def __call__(self, x, *, segment_ids=None, states=None):
        """`[b t d]` to n_out arrays `[b t h k]`, and the convolution's state in a tuple."""
        y = self.proj(x)
        after = ()
        if self.d_conv:
            state = states[0] if states else None
            y, state = self.conv(y, segment_ids=segment_ids, state=state)
            after = (state,)
        elif self.activation:
            y = jax.nn.silu(y)
        return self._heads(y), after

    def shared(self, tokens: jax.Array):
        """`[n d]` tokens that all rows share to n_out arrays `[1 n h k]`.

        One row is not cut over the mesh, so its convolution has a form that GSPMD can partition.
        """
        y = self.proj(tokens[None])
        if self.d_conv:
            y, _ = short_conv(
                y,
                self.conv.weight[...],
                activation=self.activation,
                implementation=plain(self.conv.implementation),
            )
        elif self.activation:
            y = jax.nn.silu(y)
        return self._heads(y)

    def _heads(self, y):
        # Head by head, so that heads can be cut apart.
        y = y.reshape(*y.shape[:2], self.n_heads, self.n_out, self.head_dim)
        parts = (y[..., i, :] for i in range(self.n_out))
        return tuple(l2_norm(p) if i < self.unit else p for i, p in enumerate(parts))

    def init_states(self, batch_size: int) -> tuple[ShortConvState, ...]:
        """Before the first token, in a tuple; empty without a convolution."""
        return (self.conv.init_state(batch_size),) if self.d_conv else ()

    def state_bytes(self) -> int:
        """Bytes of that per sequence."""
        if not self.d_conv:
            return 0
        width = self.n_out * self.n_heads * self.head_dim
        return state_dtype(self.conv.dtype).itemsize * width * (self.d_conv - 1) + 4


def plain(implementation: str | None) -> str:
    """An operator's form that GSPMD can partition, for calls outside of shard_map."""
    return "reference" if implementation == "reference" else "xla"
