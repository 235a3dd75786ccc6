"""Sliding-window attention beside learned tokens that are always in sight."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.checks import at_least
from seqzoo.nn.linear import linear
from seqzoo.nn.rotary import count_positions, rotate
from seqzoo.nn.window_attention import WindowState, empty_window, window_attention


class PersistentAttention(nnx.Module):
    """y_i = softmax over the persistent tokens and the last `window` tokens of the document.

    Queries and keys are turned by their positions; persistent tokens have none: they are asked by
    queries that are not turned.

    Args:
        d_in: width of what comes in.
        n_heads, head_dim: heads (h) and their width (k), even with rope.
        window: tokens that a token sees, itself included.
        rope: turn queries and keys by their positions.
        rope_theta: base of the rotary wavelengths.
        dtype: what to compute in; the softmax and the state are float32.
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
        rope: bool = True,
        rope_theta: float = 10000.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, window=window)
        check_rope(head_dim, rope)
        self.n_heads, self.head_dim, self.window = n_heads, head_dim, window
        self.rope, self.rope_theta, self.dtype = rope, float(rope_theta), str(jnp.dtype(dtype))
        project = lambda: linear(
            d_in, n_heads * head_dim, axes=("embed", "heads"), dtype=dtype, rngs=rngs
        )
        self.q_proj, self.k_proj, self.v_proj = project(), project(), project()

    def __call__(
        self,
        x: jax.Array,
        *,
        persistent: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: WindowState | None = None,
    ) -> tuple[jax.Array, WindowState]:
        """Maps `[b t d]` to `[b t h*k]` (0 at padding); persistent tokens are `[n d]`."""
        b, t, _ = x.shape
        heads = lambda y: y.reshape(*y.shape[:-1], self.n_heads, self.head_dim)
        q, k, v = (heads(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        constant = None
        if persistent is not None:
            constant = (q, heads(self.k_proj(persistent)), heads(self.v_proj(persistent)))
        none = jnp.zeros((b,), jnp.int32)
        count, last_id = (none, none) if state is None else (state.count, state.last_id)
        place, _ = count_positions(segment_ids, count, last_id, t)
        if self.rope:
            q, k = (rotate(a, place, theta=self.rope_theta) for a in (q, k))
        y, state = window_attention(
            q, k, v, place, constant, state, window=self.window, segment_ids=segment_ids
        )
        return y.reshape(b, t, -1), state

    def init_state(self, batch_size: int) -> WindowState:
        """Nothing read."""
        return empty_window(batch_size, self.window, self.n_heads, self.head_dim)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the keys and values, and with the count and the id."""
        kept = 2 * 4 * (self.window - 1) * self.n_heads * self.head_dim
        return {"recurrent": kept, "total": kept + 8}


def check_rope(head_dim: int, rope: bool) -> None:
    """Refuses heads that cannot be turned.

    Raises:
        ValueError: head_dim is below 1, or odd with rope.
    """
    if head_dim < 1 or (rope and head_dim % 2):
        raise ValueError(f"head_dim is {head_dim}; it must be at least 1, and even with rope")
