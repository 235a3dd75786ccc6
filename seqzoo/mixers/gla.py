"""GLA: gated linear attention, whose state fades channel by channel as the token says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.gla import GLAState, gla
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call, head_widths
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.sharded import sharded


class GLAMixerState(NamedTuple):
    """What a GLA layer keeps of everything it has read; its size does not grow.

    Attributes:
        convs: the last `d_conv - 1` inputs of the convolutions of q, k and v, `[b w-1 e]` float32
            each; empty without convolutions.
        rule: the recurrence `[b h k v]` float32; all parts carry the id of the last document.
    """

    convs: tuple[ShortConvState, ...]
    rule: GLAState


class GLA(nnx.Module):
    """Linear attention with a decay per key channel, which depends on the token.

        q, k, v = x W_q, x W_k, x W_v
        g_t     = logsigmoid(x W_1 W_2 + b) / gate_normalizer        log decays, in float32
        S_t     = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        out     = (norm(S_t^T q_t / sqrt(k)) * silu(x W_gate)) W_o   the norm per head

    Args:
        d_model: width of the input and output.
        n_heads: heads (h).
        expand_k: width of all queries over d_model: k = expand_k * d_model / n_heads.
        expand_v: width of all values over d_model: v = expand_v * d_model / n_heads.
        gate_low_rank: rank of the decays' projection.
        gate_normalizer: divides the log decays: decays start near 2^(-1 / gate_normalizer).
        use_output_gate: multiply by silu(x W_gate) after the norm.
        use_short_conv: a causal convolution and silu on q, k and v, which the published models do
            without.
        d_conv: taps of those convolutions (w).
        norm_eps: added under the root of the output norm.
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, decays and norm are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training"
    (arXiv 2312.06635), section 4.4; `GatedLinearAttention` of fla-org/flash-linear-attention.

    Differs from source: matrices start uniform within +- 1 / sqrt(inputs), as the source's layer by
    itself does; its published models, at a width of 1024, draw normal values of about that size
    (0.02). Documents can be packed and streamed; each query head has its own keys and values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        use_output_gate: bool = True,
        use_short_conv: bool = False,
        d_conv: int = 4,
        norm_eps: float = 1e-5,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(
            1,
            d_model=d_model,
            n_heads=n_heads,
            gate_low_rank=gate_low_rank,
            d_conv=d_conv,
            n_residuals=n_residuals,
        )
        if gate_normalizer <= 0:
            raise ValueError(f"gate_normalizer is {gate_normalizer}; it must be above 0")
        keys, values = (
            head_widths(d_model, n_heads, name, expand)
            for name, expand in dict(expand_k=expand_k, expand_v=expand_v).items()
        )
        self.n_heads, self.head_k_dim, self.head_v_dim = n_heads, keys // n_heads, values // n_heads
        self.gate_normalizer, self.d_conv = float(gate_normalizer), d_conv
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        project = lambda width: linear(
            d_model, width, axes=("embed", "heads"), kernel_init=inits.uniform(), **common
        )
        self.q_proj, self.k_proj, self.v_proj = project(keys), project(keys), project(values)
        self.decay_down = linear(
            d_model, gate_low_rank, axes=("embed", None), kernel_init=inits.uniform(), **common
        )
        self.decay_up = linear(
            gate_low_rank,
            keys,
            axes=(None, "heads"),
            use_bias=True,
            kernel_init=inits.uniform(),
            **common,
        )
        if use_short_conv:
            conv = lambda width: ShortConv(
                width, d_conv, use_bias=False, implementation=implementation, **common
            )
            self.q_conv, self.k_conv, self.v_conv = conv(keys), conv(keys), conv(values)
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
        state: GLAMixerState | None = None,
    ) -> tuple[jax.Array, GLAMixerState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, GLAMixerState)
        b, t, _ = x.shape
        if state is None:
            state = self.init_state(b)
        qkv, convs = (self.q_proj(x), self.k_proj(x), self.v_proj(x)), ()
        if self.use_short_conv:
            layers = zip((self.q_conv, self.k_conv, self.v_conv), qkv, state.convs, strict=True)
            run = [conv(y, segment_ids=segment_ids, state=kept) for conv, y, kept in layers]
            qkv, convs = tuple(y for y, _ in run), tuple(kept for _, kept in run)
        logits = self.decay_up(self.decay_down(x))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        heads = lambda y: y.reshape(b, t, self.n_heads, y.shape[-1] // self.n_heads)
        y, rule = sharded(
            gla,
            *map(heads, qkv),
            heads(jax.nn.log_sigmoid(logits) / self.gate_normalizer),
            initial_state=state.rule,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = heads(self.gate_proj(x)) if self.use_output_gate else None
        return self.out_proj(jax.lax.collapse(self.norm(y, gate), 2)), GLAMixerState(convs, rule)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> GLAMixerState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        convs = ()
        if self.use_short_conv:
            layers = (self.q_conv, self.k_conv, self.v_conv)
            convs = tuple(conv.init_state(batch_size) for conv in layers)
        shape = (batch_size, self.n_heads, self.head_k_dim, self.head_v_dim)
        s = jnp.zeros(shape, state_dtype(self.dtype))
        return GLAMixerState(convs, GLAState(s, jnp.zeros((batch_size,), jnp.int32)))

    def step(self, x_t: jax.Array, state: GLAMixerState) -> tuple[jax.Array, GLAMixerState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the recurrence alone, and with the conv inputs and the ids."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        recurrent = each * self.n_heads * self.head_k_dim * self.head_v_dim
        total = recurrent + 4
        if self.use_short_conv:
            width = self.n_heads * (2 * self.head_k_dim + self.head_v_dim)
            total += each * width * (self.d_conv - 1) + 3 * 4
        return {"recurrent": recurrent, "total": total}
