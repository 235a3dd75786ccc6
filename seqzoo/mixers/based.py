"""BASED's linear attention: a second-order Taylor feature map of narrow queries and keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.taylor_attention import TaylorAttentionState, taylor_attention
from pallas_kernels.taylor_attention.features import WIDEST, feature_count
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.sharded import sharded


class Based(nnx.Module):
    """Linear attention whose weights are those of softmax attention to second order.

        q, k = x W_q, x W_k  (feature_dim per head),    v = x W_v  (head_dim per head)
        s_ij = q_i . k_j / sqrt(feature_dim),           w_ij = 1 + s_ij + s_ij^2 / 2  >= 1/2
        out  = (sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + eps)) W_o

    The weights are dot products of 1 + k + k (k + 1) / 2 features (153 at feature_dim 16), so the
    state is one matrix of features by head_dim per head. No positions, gates or decays: BASED puts
    such layers between sliding-window attention and short convolutions, which see order.

    Args:
        d_model: width of the input and output.
        n_heads: heads (h).
        feature_dim: width of queries and keys per head (k), 1 to 64: it sets the size of the state.
        head_dim: width of values per head (v); None = d_model / n_heads.
        normalize: whether the weights' sum divides.
        eps: added to that sum.
        use_bias: bias on all four projections.
        init_std: standard deviation of the weights at the start; None = 1 / sqrt(inputs) of each.
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: which implementation of the operator ("xla", ...); None = the best.
        dtype: what to compute in; parameters, sums and the state are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff" (arXiv 2402.18668); `LinearAttention` of HazyResearch/based, whose released models the
    defaults follow.

    Differs from source: the packed feature map, equal up to rounding; documents can be packed and
    streamed; eps is that of the kernels which the released models were trained with (1e-6; the
    source's plain path has 1e-12), far below what float32 can tell.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 16,
        feature_dim: int = 16,
        head_dim: int | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
        use_bias: bool = False,
        init_std: float | None = 0.02,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, n_heads=n_heads, n_residuals=n_residuals)
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model is {d_model} and n_heads {n_heads}: d_model is no multiple of n_heads; "
                "change one or set head_dim"
            )
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; it must be at least 1")
        if not 1 <= feature_dim <= WIDEST:
            raise ValueError(
                f"feature_dim is {feature_dim}; it must be 1 to {WIDEST}: a head's state has "
                "1 + k + k (k + 1) / 2 rows for a feature_dim of k"
            )
        if eps < 0:
            raise ValueError(f"eps is {eps}; it must be at least 0")
        if init_std is not None and init_std <= 0:
            raise ValueError(f"init_std is {init_std}; it must be positive, or null")

        self.n_heads, self.feature_dim, self.head_dim = n_heads, feature_dim, head_dim
        self.normalize, self.eps = normalize, float(eps)
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        def projection(d_in, d_out, axes, shrink=1):
            return linear(
                d_in,
                d_out,
                axes=axes,
                use_bias=use_bias,
                kernel_init=inits.normal(shrink, init_std),
                dtype=self.dtype,
                rngs=rngs,
            )

        narrow, inner = n_heads * feature_dim, n_heads * head_dim
        self.q_proj = projection(d_model, narrow, ("embed", "heads"))
        self.k_proj = projection(d_model, narrow, ("embed", "heads"))
        self.v_proj = projection(d_model, inner, ("embed", "heads"))
        self.out_proj = projection(inner, d_model, ("heads", "embed"), n_residuals)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: TaylorAttentionState | None = None,
    ) -> tuple[jax.Array, TaylorAttentionState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, TaylorAttentionState)
        b, t, _ = x.shape
        heads = lambda y: y.reshape(b, t, self.n_heads, y.shape[-1] // self.n_heads)
        y, state = sharded(
            taylor_attention,
            heads(self.q_proj(x)),
            heads(self.k_proj(x)),
            heads(self.v_proj(x)),
            normalize=self.normalize,
            eps=self.eps,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        out = self.out_proj(jax.lax.collapse(y, 2))
        if segment_ids is not None:  # a bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> TaylorAttentionState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        shape = (batch_size, self.n_heads, feature_count(self.feature_dim))
        z = jnp.zeros(shape, state_dtype(self.dtype))
        kv = jnp.zeros((*shape, self.head_dim), z.dtype)
        return TaylorAttentionState(kv, z, jnp.zeros((batch_size,), jnp.int32))

    def step(
        self, x_t: jax.Array, state: TaylorAttentionState
    ) -> tuple[jax.Array, TaylorAttentionState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: sums of features times values and of features; with the id."""
        del context_length
        kept = self.n_heads * feature_count(self.feature_dim) * (self.head_dim + 1)
        recurrent = state_dtype(self.dtype).itemsize * kept
        return {"recurrent": recurrent, "total": recurrent + 4}
