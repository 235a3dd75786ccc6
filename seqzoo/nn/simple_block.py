"""The simple form of TCNCA: attention inside chunks to what a `move` along time gives."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.chunk_attention import ChunkAttentionState, chunk_attention
from pallas_kernels.core.numerics import state_dtype
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.mega_block import ATTENTIONS, MegaState
from seqzoo.nn.relative_bias import BIASES
from seqzoo.nn.sharded import sharded


class SimpleBlock(nnx.Module):
    """A MEGA block without gates, scales, offsets, norm and residual.

        m       = move(x)
        q, k, v = m W_q + b_q, m W_k + b_k, m W_v + b_v        widths z, z, v
        out     = attention(q, k, v) W_o + b_o                 inside chunks of chunk_size tokens

    Args:
        d_model: width of the input and output.
        move: see seqzoo.nn.mega_block.MegaBlock.
        z_dim: width of queries and keys (z); None = d_model / 4, at least 2, made even.
        v_dim: width of values (v); None = 2 d_model.
        chunk_size: tokens of a chunk; None = the whole row (only where the move looks both ways).
        attention: "softmax", "laplace" or "relu2".
        rel_pos_bias: added to the scores by distance: "simple" or "rotary".
        max_positions: simple bias without chunks: tokens of the longest row.
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: which implementation of the operators; None = the best.
        dtype: what to compute in.
        rngs: source of the initial values: matrices normal with 1 / sqrt(inputs).

    Raises:
        ValueError: a setting is out of range.

    Source: the simplified TCNCA of arXiv 2312.05605, without MEGA's many multiplicative and
    additive interactions. Only the abstract is public; the form is ours.
    """

    def __init__(
        self,
        d_model: int,
        *,
        move: nnx.Module,
        z_dim: int | None = None,
        v_dim: int | None = None,
        chunk_size: int | None = 128,
        attention: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        z = max(2, d_model // 8 * 2) if z_dim is None else z_dim
        v = 2 * d_model if v_dim is None else v_dim
        at_least(1, d_model=d_model, z_dim=z, v_dim=v, max_positions=max_positions)
        for name, value, allowed in (
            ("attention", attention, ATTENTIONS),
            ("rel_pos_bias", rel_pos_bias, tuple(BIASES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if chunk_size is None and move.causal:
            raise ValueError(
                "chunk_size is null and the mixer is causal: its state holds the keys of a chunk; "
                "set chunk_size (at least the length for full attention), or causal=false"
            )
        if chunk_size is not None:
            at_least(1, chunk_size=chunk_size)
        self.z_dim, self.v_dim, self.chunk_size = z, v, chunk_size
        self.attention, self.causal = attention, move.causal
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        project = lambda d_in, d_out, axes, residuals=1: linear(
            d_in,
            d_out,
            axes=axes,
            use_bias=True,
            kernel_init=inits.normal(residuals),
            dtype=self.dtype,
            rngs=rngs,
        )
        self.move = move
        self.q_proj, self.k_proj = (project(d_model, z, ("embed", None)) for _ in range(2))
        self.v_proj = project(d_model, v, ("embed", "inner"))
        self.out_proj = project(v, d_model, ("inner", "embed"), n_residuals)
        self.rel_pos_bias = BIASES[rel_pos_bias](
            z, max_positions=max_positions if chunk_size is None else chunk_size, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MegaState | None = None,
    ) -> tuple[jax.Array, MegaState | None]:
        """Maps `[b t d]` to `[b t d]` in `dtype` (0 at padding), with the state after it."""
        if state is not None:
            self._refuse_streams("a state")
        check_call(x, segment_ids, state, MegaState)
        x = x.astype(self.dtype)
        if segment_ids is not None:
            x = jnp.where((segment_ids > 0)[..., None], x, 0)
        m, move = self.move(x, segment_ids=segment_ids, state=None if state is None else state.move)
        y, attention = self._attend(m, segment_ids, None if state is None else state.attention)
        if segment_ids is not None:
            y = jnp.where((segment_ids > 0)[..., None], y, 0)
        return y, MegaState(move, attention) if self.causal else None

    def step(self, x_t: jax.Array, state: MegaState) -> tuple[jax.Array, MegaState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        self._refuse_streams("step")
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MegaState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        self._refuse_streams("init_state")
        shape, dtype = (batch_size, 1, self.chunk_size), state_dtype(self.dtype)
        ring = lambda width: jnp.zeros((*shape, width), dtype)
        # One array each: a state is donated, and no buffer can be given away twice.
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        attention = ChunkAttentionState(ring(self.z_dim), ring(self.v_dim), count, last_id)
        return MegaState(self.move.init_state(batch_size), attention)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the move's and the keys and values of a chunk."""
        self._refuse_streams("state_bytes")
        move = self.move.state_bytes(context_length)
        chunk = state_dtype(self.dtype).itemsize * self.chunk_size * (self.z_dim + self.v_dim)
        return {"recurrent": move["recurrent"] + chunk, "total": move["total"] + chunk + 8}

    def _attend(self, m, segment_ids, state):
        q, k, v = (project(m)[:, :, None] for project in (self.q_proj, self.k_proj, self.v_proj))
        chunk = max(1, m.shape[1]) if self.chunk_size is None else self.chunk_size
        o, state = sharded(
            chunk_attention,
            q,
            k,
            v,
            self.rel_pos_bias(chunk)[None],
            chunk=chunk,
            score=self.attention,
            causal=self.causal,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return self.out_proj(o[:, :, 0]), state

    def _refuse_streams(self, what: str) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{what}: this mixer looks both ways (causal=false), so a token's output depends "
                "on tokens that a stream has not read yet"
            )
