"""Sliding-window attention beside learned tokens that are always in sight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn.checks import at_least
from seqzoo.nn.projections import Projections
from seqzoo.nn.rotary import count_positions, rotate
from seqzoo.nn.sharded import sharded
from seqzoo.nn.window_attention import WindowState, empty_window, window_attention


class AttentionState(NamedTuple):
    """What the layer keeps; its size does not grow.

    Attributes:
        convs: inputs of the convolution, empty without one.
        window: keys and values of the last tokens.
    """

    convs: tuple[ShortConvState, ...]
    window: WindowState


class PersistentAttention(nnx.Module):
    """y_i = softmax over the persistent tokens and the last `window` tokens of the document.

        q, k, v = conv(x W_q), conv(x W_k), conv(x W_v)

    Queries and keys are turned by their positions; persistent tokens have none: they are asked by
    queries that are not turned.

    Args:
        d_in: width of what comes in.
        n_heads, head_dim: heads (h) and their width (k), even with rope.
        window: tokens that a token sees, itself included.
        d_conv: taps of the convolutions, 0 = none.
        conv_init_std: they start as the identity plus normal values of this standard deviation.
        rope: turn queries and keys by their positions.
        rope_theta: base of the rotary wavelengths.
        implementation: which implementation of the convolution; None = the best.
        dtype: what to compute in; the softmax and the state are float32 at least.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        d_in: int,
        *,
        n_heads: int,
        head_dim: int,
        window: int,
        d_conv: int = 0,
        conv_init_std: float = 0.02,
        rope: bool = True,
        rope_theta: float = 10000.0,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, window=window)
        at_least(0, attention_conv=d_conv)
        check_rope(head_dim, rope)
        self.n_heads, self.head_dim, self.window = n_heads, head_dim, window
        self.rope, self.rope_theta, self.dtype = rope, float(rope_theta), str(jnp.dtype(dtype))
        self.inputs = Projections(
            d_in,
            n_heads,
            head_dim,
            unit=0,
            n_out=3,
            d_conv=d_conv,
            conv_init_std=conv_init_std,
            activation=None,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        persistent: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: AttentionState | None = None,
    ) -> tuple[jax.Array, AttentionState]:
        """Maps `[b t d]` to `[b t h*k]` (0 at padding); persistent tokens are `[n d]`."""
        b, t, _ = x.shape
        convs, window = (None, None) if state is None else state
        (q, k, v), convs = self.inputs(x, segment_ids=segment_ids, states=convs)
        constant = (None, None, None)
        if persistent is not None:
            _, *tokens = self.inputs.shared(persistent)
            constant = (q, *(y[0] for y in tokens))
        none = jnp.zeros((b,), jnp.int32)
        count, last_id = (none, none) if window is None else (window.count, window.last_id)
        place, _ = count_positions(segment_ids, count, last_id, t)
        if self.rope:
            q, k = (rotate(a, place, theta=self.rope_theta) for a in (q, k))
        y, window = sharded(
            window_attention,
            q,
            k,
            v,
            place,
            *constant,
            window=self.window,
            initial_state=window,
            segment_ids=segment_ids,
        )
        return jax.lax.collapse(y, 2), AttentionState(convs, window)

    def init_state(self, batch_size: int) -> AttentionState:
        """Nothing read."""
        return AttentionState(
            self.inputs.init_states(batch_size),
            empty_window(batch_size, self.window, self.n_heads, self.head_dim, self.dtype),
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the keys and values, and with the conv inputs, the count and the ids."""
        each = state_dtype(self.dtype).itemsize
        kept = 2 * each * (self.window - 1) * self.n_heads * self.head_dim
        return {"recurrent": kept, "total": kept + 8 + self.inputs.state_bytes()}


def check_rope(head_dim: int, rope: bool) -> None:
    """Refuses heads that cannot be turned.

    Raises:
        ValueError: head_dim is below 1, or odd with rope.
    """
    if head_dim < 1 or (rope and head_dim % 2):
        raise ValueError(f"head_dim is {head_dim}; it must be at least 1, and even with rope")
