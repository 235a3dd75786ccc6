"""Gated DeltaNet: a memory that fades as the token says, and overwrites what a key stands for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.gated_delta_rule import GatedDeltaRuleState, gated_delta_rule
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.decay import SoftplusDecay
from seqzoo.nn.gated_norm import GatedRMSNorm, l2_norm
from seqzoo.nn.linear import linear
from seqzoo.nn.sharded import sharded


class GatedDeltaNetState(NamedTuple):
    """What a Gated DeltaNet layer keeps of everything it has read; its size does not grow.

    Attributes:
        convs: the last `d_conv - 1` inputs of the convolutions of q, k and v, `[b w-1 e]` float32
            each; empty without convolutions.
        rule: the memory `[b h k v]` float32; all parts carry the id of the last document.
    """

    convs: tuple[ShortConvState, ...]
    rule: GatedDeltaRuleState


class GatedDeltaNet(nnx.Module):
    """The gated delta rule, with short convolutions before it and a gated norm behind.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))
        q, k    = q / |q|, k / |k|                                 per head
        beta    = sigmoid(x W_b)                                   per head, in float32
        g       = -exp(A_log) softplus(x W_a + dt_bias)            log decays, in float32
        S       = exp(g_t) S_{t-1};   S_t = S + k_t (beta_t (v_t - S^T k_t))^T
        out     = (norm(S_t^T q_t / sqrt(k)) * silu(x W_g)) W_o    the norm per head

    Args:
        d_model: width of the input and output.
        n_heads: heads of queries and keys; None = as many as make 3/4 d_model, at least one, as the
            authors advise: the layer then has about 6 d_model^2 parameters.
        n_v_heads: heads of values (h), a multiple of n_heads: several then share a query and a key;
            None = n_heads.
        head_dim: width of a query and a key (k).
        expand_v: width of a value over head_dim.
        use_output_gate: multiply by silu(x W_g) after the norm.
        use_short_conv: causal convolutions on q, k and v; without them silu stands alone.
        d_conv: taps of the convolutions (w).
        use_conv_bias: bias on the convolutions.
        allow_negative_eigenvalues: beta from 0 to 2 instead of 1: a write may turn what stands
            under its key around (arXiv 2411.12537).
        norm_eps: added under the root of the output norm.
        init_gain: matrices start uniform within init_gain times Xavier's bound, the root of
            6 / (inputs + outputs). The authors' value makes small models slow to begin; 1 does not.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, gates and norms are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv
    2412.06464), section 3.4; `GatedDeltaNet` of fla-org/flash-linear-attention.

    Differs from source: matrices and convolutions start as the first releases drew them (Xavier's
    uniform times 2^-5/2, torch's default), where the present one draws normal values of 0.02; rates
    start above 1e-3. Documents can be packed and streamed; the state keeps d_conv - 1 inputs (the
    source keeps d_conv).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_v_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        d_conv: int = 4,
        use_conv_bias: bool = False,
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        init_gain: float = 2**-2.5,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, head_dim=head_dim, d_conv=d_conv)
        if n_heads is None:
            n_heads = max(1, round(0.75 * d_model / head_dim))
        n_v_heads = n_heads if n_v_heads is None else n_v_heads
        if n_heads < 1 or n_v_heads < 1 or n_v_heads % n_heads:
            raise ValueError(
                f"n_heads is {n_heads} and n_v_heads {n_v_heads}; "
                "n_v_heads must be a multiple of n_heads, both at least 1"
            )
        head_v_dim = round(head_dim * expand_v)
        if head_v_dim < 1 or abs(head_v_dim - head_dim * expand_v) > 1e-5 * head_v_dim:
            raise ValueError(
                f"expand_v is {expand_v}: it makes {head_dim * expand_v:g} channels of a value of "
                f"head_dim {head_dim}; that must be a whole number of at least 1"
            )
        if init_gain <= 0:
            raise ValueError(f"init_gain is {init_gain}; it must be above 0")

        self.n_heads, self.n_v_heads = n_heads, n_v_heads
        self.head_k_dim, self.head_v_dim, self.d_conv = head_dim, head_v_dim, d_conv
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        init = inits.xavier_uniform(init_gain)
        keys, values = n_heads * head_dim, n_v_heads * head_v_dim
        project = lambda width: linear(
            d_model, width, axes=("embed", "heads"), kernel_init=init, **common
        )
        self.q_proj, self.k_proj, self.v_proj = project(keys), project(keys), project(values)
        self.a_proj, self.b_proj = project(n_v_heads), project(n_v_heads)
        self.decay = SoftplusDecay(n_v_heads, rngs=rngs)
        if use_short_conv:
            conv = lambda width: ShortConv(
                width, d_conv, use_bias=use_conv_bias, implementation=implementation, **common
            )
            self.q_conv, self.k_conv, self.v_conv = conv(keys), conv(keys), conv(values)
        if use_output_gate:
            self.gate_proj = project(values)
        self.norm = GatedRMSNorm(head_v_dim, eps=norm_eps, **common)
        self.out_proj = linear(values, d_model, axes=("heads", "embed"), kernel_init=init, **common)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: GatedDeltaNetState | None = None,
    ) -> tuple[jax.Array, GatedDeltaNetState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, GatedDeltaNetState)
        b, t, _ = x.shape
        if state is None:
            state = self.init_state(b)
        (q, k, v), convs = self._convolve(x, segment_ids, state.convs)
        shared = self.n_v_heads // self.n_heads
        by_key = lambda y: y.reshape(b, t, self.n_heads, self.head_k_dim)
        q, k = (jnp.repeat(l2_norm(by_key(y)), shared, axis=2) for y in (q, k))
        beta = self.b_proj(x)
        beta = jax.nn.sigmoid(beta.astype(jnp.promote_types(beta.dtype, jnp.float32)))
        by_head = lambda y: y.reshape(b, t, self.n_v_heads, self.head_v_dim)
        y, rule = sharded(
            gated_delta_rule,
            q,
            k,
            by_head(v),
            self.decay(self.a_proj(x)),
            2 * beta if self.allow_negative_eigenvalues else beta,
            initial_state=state.rule,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = by_head(self.gate_proj(x)) if self.use_output_gate else None
        y = jax.lax.collapse(self.norm(y, gate), 2)
        return self.out_proj(y), GatedDeltaNetState(convs, rule)

    def _convolve(self, x, segment_ids, states):
        """Queries, keys and values `[b t e]` of x, and the convolutions' states."""
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if not self.use_short_conv:
            return tuple(map(jax.nn.silu, qkv)), ()
        layers = zip((self.q_conv, self.k_conv, self.v_conv), qkv, states, strict=True)
        run = [conv(y, segment_ids=segment_ids, state=kept) for conv, y, kept in layers]
        return tuple(y for y, _ in run), tuple(kept for _, kept in run)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> GatedDeltaNetState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        convs = ()
        if self.use_short_conv:
            layers = (self.q_conv, self.k_conv, self.v_conv)
            convs = tuple(conv.init_state(batch_size) for conv in layers)
        shape = (batch_size, self.n_v_heads, self.head_k_dim, self.head_v_dim)
        s = jnp.zeros(shape, state_dtype(self.dtype))
        return GatedDeltaNetState(
            convs, GatedDeltaRuleState(s, jnp.zeros((batch_size,), jnp.int32))
        )

    def step(
        self, x_t: jax.Array, state: GatedDeltaNetState
    ) -> tuple[jax.Array, GatedDeltaNetState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the memory alone, and with the conv inputs and the ids."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        recurrent = each * self.n_v_heads * self.head_k_dim * self.head_v_dim
        total = recurrent + 4
        if self.use_short_conv:
            width = 2 * self.n_heads * self.head_k_dim + self.n_v_heads * self.head_v_dim
            total += each * width * (self.d_conv - 1) + 3 * 4
        return {"recurrent": recurrent, "total": total}
