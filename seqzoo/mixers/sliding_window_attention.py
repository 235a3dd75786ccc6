"""Softmax attention to a window of the last tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.chunk_attention import ChunkAttentionState, chunk_attention
from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.core.segments import boundaries
from seqzoo.errors import MeshError
from seqzoo.nn import inits
from seqzoo.nn.checks import check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.rotary import rotate
from seqzoo.nn.sharded import sharded
from seqzoo.nn.sharding import mesh_in_force, spec_of


class SlidingWindowAttention(nnx.Module):
    """Causal softmax attention in which a token sees the last `window` tokens, itself included.

        y_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j W_o,    i - window < j <= i

    Queries and keys are turned by their positions, which count from the start of each document; a
    key is turned before it is kept. The state is a ring of the last `window` keys and values: it
    does not grow, and a step writes one slot of it.

    Args:
        d_model: width of the input and output.
        window: keys that a token sees (w), at least 1.
        n_heads: query heads (h).
        n_kv_heads: key-value heads (g), a divisor of n_heads; None = n_heads.
        head_dim: width of a head (k), even with rope; None = d_model / n_heads.
        rope: turn queries and keys by their positions.
        rope_theta: base of the rotary wavelengths.
        use_bias: bias on all four projections.
        init_std: standard deviation that the projections start with; None = 1 / sqrt(width of
            their input).
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: which implementation of the operator ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state and the softmax are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.
        MeshError: when called: the mesh cuts query heads otherwise than key-value heads.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff" (arXiv 2402.18668), section 5; `SlidingAttention` of HazyResearch/based.

    Differs from source: `window` is what a token sees: the source's window_size=256 lets it see
    256 // 2 + 1 = 129 keys, which is window=129 here. The state is a ring, where the source keeps
    every key; grouped queries; documents can be packed and streamed.
    """

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 64,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        use_bias: bool = False,
        init_std: float | None = None,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 (a token sees itself)")
        if d_model < 1 or n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads is {n_heads} and n_kv_heads {n_kv_heads}; "
                "n_heads must be a multiple of n_kv_heads, both at least 1"
            )
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model is {d_model} and n_heads {n_heads}: d_model is no multiple of n_heads; "
                "change one or set head_dim"
            )
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if head_dim < 1 or (rope and head_dim % 2):
            raise ValueError(f"head_dim is {head_dim}; it must be at least 1, and even with rope")
        if init_std is not None and init_std <= 0:
            raise ValueError(f"init_std is {init_std}; it must be above 0, or null")

        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.window, self.rope, self.rope_theta = window, rope, float(rope_theta)
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        inner, kv_inner = n_heads * head_dim, n_kv_heads * head_dim
        common = dict(use_bias=use_bias, dtype=self.dtype, rngs=rngs)
        init, init_out = inits.normal(1, init_std), inits.normal(n_residuals, init_std)
        self.q_proj = linear(d_model, inner, axes=("embed", "heads"), kernel_init=init, **common)
        self.k_proj = linear(
            d_model, kv_inner, axes=("embed", "kv_heads"), kernel_init=init, **common
        )
        self.v_proj = linear(
            d_model, kv_inner, axes=("embed", "kv_heads"), kernel_init=init, **common
        )
        self.out_proj = linear(
            inner, d_model, axes=("heads", "embed"), kernel_init=init_out, **common
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: ChunkAttentionState | None = None,
    ) -> tuple[jax.Array, ChunkAttentionState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, ChunkAttentionState)
        b, t, _ = x.shape
        if state is None:
            state = self.init_state(b)
        self._check_mesh()
        heads = lambda y, n: y.reshape(b, t, n, self.head_dim)
        q = heads(self.q_proj(x), self.n_heads)
        k, v = (heads(f(x), self.n_kv_heads) for f in (self.k_proj, self.v_proj))
        if self.rope:
            positions = _positions(segment_ids, state, t)
            q, k = (rotate(a, positions, theta=self.rope_theta) for a in (q, k))
        y, state = sharded(
            chunk_attention,
            q,
            k,
            v,
            window=self.window,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        out = self.out_proj(jax.lax.collapse(y, 2))
        if segment_ids is not None:  # a bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ChunkAttentionState:
        """An empty ring; `max_length` changes nothing here."""
        del max_length
        shape = (batch_size, self.n_kv_heads, self.window, self.head_dim)
        # One array each: a state is donated, and no buffer can be given away twice.
        k, v = (jnp.zeros(shape, state_dtype(self.dtype)) for _ in range(2))
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return ChunkAttentionState(k, v, count, last_id)

    def step(
        self, x_t: jax.Array, state: ChunkAttentionState
    ) -> tuple[jax.Array, ChunkAttentionState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the ring, and with its count and the id."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        ring = 2 * each * self.window * self.n_kv_heads * self.head_dim
        return {"recurrent": ring, "total": ring + 8}

    def _check_mesh(self) -> None:
        """Query heads and key-value heads that belong together must lie on the same device."""
        mesh = mesh_in_force()
        if mesh is None or self.n_kv_heads in (1, self.n_heads):  # one serves all wherever they are
            return
        queries = spec_of(("heads",), (self.n_heads,), mesh, what="queries")
        keys = spec_of(("kv_heads",), (self.n_kv_heads,), mesh, what="keys")
        if queries != keys:
            raise MeshError(
                f"mesh.rules spread heads over {queries[0]} and kv_heads over {keys[0]}: grouped "
                "queries would meet other keys; give both the same rule"
            )


def _positions(segment_ids, state: ChunkAttentionState, t: int) -> jax.Array:
    """Tokens since the start of its document, for each of t new tokens: int32 `[b t]`."""
    if segment_ids is None:
        return state.count[:, None] + jnp.arange(t, dtype=jnp.int32)
    reset, valid, _ = boundaries(segment_ids, state.last_id)
    place = state.count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
    return place - jax.lax.cummax(jnp.where(reset, place, 0), axis=1)
