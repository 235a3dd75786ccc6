"""Retention: linear attention whose heads fade at fixed rates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.simple_gla import SimpleGLAState, simple_gla
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call, head_widths
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.rotary import count_positions, rotate
from seqzoo.nn.sharded import sharded


class RetentionState(NamedTuple):
    """What a retention layer keeps of everything it has read; its size does not grow.

    Attributes:
        rule: the recurrence `[b h k v]` float32, with the id of the last document.
        count: int32 `[b]`, tokens of that document so far.
    """

    rule: SimpleGLAState
    count: jax.Array


class Retention(nnx.Module):
    """Linear attention in which head h forgets by gamma_h = 1 - 2^(-5-h) per token.

        q, k, v = x W_q, x W_k, x W_v,        q, k turned by their positions
        S_t     = gamma_h S_{t-1} + k_t v_t^T
        out     = (norm(S_t^T q_t / sqrt(k)) * silu(x W_gate)) W_o       the norm per head

    Positions count from the start of each document.

    Args:
        d_model: width of the input and output.
        n_heads: heads (h).
        expand_k: width of all queries over d_model: k = expand_k * d_model / n_heads.
        expand_v: width of all values over d_model: v = expand_v * d_model / n_heads.
        rope: turn queries and keys by their positions; k must be even then.
        rope_theta: base of the rotary wavelengths.
        use_output_gate: multiply by silu(x W_gate) after the norm.
        norm_eps: added under the root of the output norm.
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: which implementation of the operator ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state and norm are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Sun et al., "Retentive Network" (arXiv 2307.08621), section 2;
    `MultiScaleRetention` of fla-org/flash-linear-attention.

    Differs from source: the norm per head divides by the root mean square and has a scale that
    heads share, as the second source has it (the paper's group norm subtracts the mean); halves are
    turned as pairs, as in Llama; matrices start uniform within +- 1 / sqrt(inputs); documents can
    be packed and streamed.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope: bool = True,
        rope_theta: float = 10000.0,
        use_output_gate: bool = True,
        norm_eps: float = 1e-5,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, n_heads=n_heads, n_residuals=n_residuals)
        keys, values = (
            head_widths(d_model, n_heads, name, expand)
            for name, expand in dict(expand_k=expand_k, expand_v=expand_v).items()
        )
        self.n_heads, self.head_k_dim, self.head_v_dim = n_heads, keys // n_heads, values // n_heads
        if rope and self.head_k_dim % 2:
            raise ValueError(
                f"expand_k is {expand_k}: queries of {self.head_k_dim} channels per head cannot be "
                "turned in pairs; change expand_k or n_heads, or set rope=false"
            )
        self.rope, self.rope_theta = rope, float(rope_theta)
        self.use_output_gate = use_output_gate
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        project = lambda width: linear(
            d_model, width, axes=("embed", "heads"), kernel_init=inits.uniform(), **common
        )
        self.q_proj, self.k_proj, self.v_proj = project(keys), project(keys), project(values)
        if use_output_gate:
            self.gate_proj = project(values)
        self.norm = GatedRMSNorm(self.head_v_dim, eps=norm_eps, **common)
        self.out_proj = linear(
            values,
            d_model,
            axes=("heads", "embed"),
            kernel_init=inits.uniform(n_residuals),
            **common,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: RetentionState | None = None,
    ) -> tuple[jax.Array, RetentionState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, RetentionState)
        b, t, _ = x.shape
        if state is None:
            state = self.init_state(b)
        heads = lambda y: y.reshape(b, t, self.n_heads, y.shape[-1] // self.n_heads)
        q, k, v = (heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        positions, count = count_positions(segment_ids, state.count, state.rule.last_id, t)
        if self.rope:
            q, k = (rotate(a, positions, theta=self.rope_theta) for a in (q, k))
        y, rule = sharded(
            simple_gla,
            q,
            k,
            v,
            jnp.broadcast_to(log_decays(self.n_heads), (b, t, self.n_heads)),
            initial_state=state.rule,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = heads(self.gate_proj(x)) if self.use_output_gate else None
        return self.out_proj(jax.lax.collapse(self.norm(y, gate), 2)), RetentionState(rule, count)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> RetentionState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        shape = (batch_size, self.n_heads, self.head_k_dim, self.head_v_dim)
        s = jnp.zeros(shape, state_dtype(self.dtype))
        # One array each: a state is donated, and no buffer can be given away twice.
        last_id, count = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return RetentionState(SimpleGLAState(s, last_id), count)

    def step(self, x_t: jax.Array, state: RetentionState) -> tuple[jax.Array, RetentionState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the recurrence alone, and with the count and the id."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        recurrent = each * self.n_heads * self.head_k_dim * self.head_v_dim
        return {"recurrent": recurrent, "total": recurrent + 8}


def log_decays(n_heads: int) -> jax.Array:
    """log(1 - 2^(-5-h)) `[h]`, float32."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(n_heads, dtype=jnp.float32))))
