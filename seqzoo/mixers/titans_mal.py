"""Titans with memory as a layer: a long-term memory, and attention to a window of what it says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.checks import check_call
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.neural_memory import MemoryState, NeuralMemory, memory_heads
from seqzoo.nn.persistent_attention import AttentionState, PersistentAttention


class TitansMALState(NamedTuple):
    """What the layer keeps; its size does not grow.

    Attributes:
        memory: weights and momentum of every head, conv inputs.
        attention: keys and values of the last tokens, conv inputs.
    """

    memory: MemoryState
    attention: AttentionState


class TitansMAL(nnx.Module):
    """A long-term memory, and behind it a window of attention (MAL).

        m   = norm(M_t(q_t)), a memory that is trained on x as TitansLMM has it; the norm per head
        out = W_o softmax attention of m to the last `window` of them and to the persistent tokens

    The persistent tokens are written into the memory before each document; what it says at them is
    what attention sees of them, from everywhere. They have no position: queries meet them unturned.

    Args:
        d_model: width of the input and output.
        n_heads, head_dim: heads of the memory and of attention; None = as many as make d_model.
        chunk: tokens whose gradients are taken at the same weights.
        memory_layers: layers of the network; 1 = linear.
        memory_expand: its inner width over head_dim.
        memory_norm: LayerNorm of its output, scaled, and its input added.
        activation: between its layers, "gelu" or "silu".
        empty_memory: its last layer starts at 0 (and is learned), so that it holds nothing at
            first; else Xavier's uniform like the others.
        memory_lr: peak learning rate of these weights; None = the optimizer's.
        d_conv: taps of the convolution, 0 = none.
        conv_init_std: it starts as the identity plus normal values of this standard deviation.
        use_momentum: else eta is 0.
        use_forgetting: else alpha is 0.
        theta_max: largest step size; None = (1 - eta) / chunk with the eta of eta_bias.
        alpha_bias, eta_bias, theta_bias: b_a, b_e, b_t at the start.
        limit: of each token's gradient by each matrix: "none", "clip" or "normalise".
        max_norm: to which length.
        detach_norm: whether that length counts as a constant when differentiated.
        n_persistent: learned tokens before each document and in every window, 0 = none.
        window: tokens that attention sees, itself included.
        attention_conv: taps of the convolutions of attention's q, k and v; 0 = none.
        rope: turn queries and keys by their positions, persistent tokens not.
        rope_theta: base of the rotary wavelengths.
        norm_eps: added under the root of the norms.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, the memory, gates, norms and the softmax are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Warns:
        UserWarning: theta_max is above (1 - eta) / chunk, where the memory may diverge.

    Source: Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv
    2501.00663), section 4.3. No code of the authors is public.

    Differs from source: a norm between memory and attention; the paper leaves widths, windows and
    positions open; documents can be packed and streamed.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int = 64,
        chunk: int = 64,
        memory_layers: int = 2,
        memory_expand: float = 4.0,
        memory_norm: bool = True,
        activation: str = "gelu",
        empty_memory: bool = False,
        memory_lr: float | None = None,
        d_conv: int = 4,
        conv_init_std: float = 0.02,
        use_momentum: bool = True,
        use_forgetting: bool = True,
        theta_max: float | None = None,
        alpha_bias: float = -4.0,
        eta_bias: float = 1.0,
        theta_bias: float = 0.0,
        limit: str = "clip",
        max_norm: float = 1.0,
        detach_norm: bool = False,
        n_persistent: int = 4,
        window: int = 512,
        attention_conv: int = 4,
        rope: bool = True,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        n_heads = memory_heads(d_model, n_heads, head_dim)
        common = dict(dtype=str(jnp.dtype(dtype)), rngs=rngs)
        self.memory = NeuralMemory(
            d_model,
            n_heads=n_heads,
            head_dim=head_dim,
            chunk=chunk,
            memory_layers=memory_layers,
            memory_expand=memory_expand,
            memory_norm=memory_norm,
            activation=activation,
            empty_memory=empty_memory,
            memory_lr=memory_lr,
            d_conv=d_conv,
            conv_init_std=conv_init_std,
            use_momentum=use_momentum,
            use_forgetting=use_forgetting,
            theta_max=theta_max,
            alpha_bias=alpha_bias,
            eta_bias=eta_bias,
            theta_bias=theta_bias,
            limit=limit,
            max_norm=max_norm,
            detach_norm=detach_norm,
            n_persistent=n_persistent,
            norm_eps=norm_eps,
            implementation=implementation,
            **common,
        )
        inner = n_heads * head_dim
        self.norm = GatedRMSNorm(inner, n_groups=n_heads, eps=norm_eps, **common)
        self.attention = PersistentAttention(
            inner,
            n_heads=n_heads,
            head_dim=head_dim,
            window=window,
            d_conv=attention_conv,
            conv_init_std=conv_init_std,
            rope=rope,
            rope_theta=rope_theta,
            implementation=implementation,
            **common,
        )
        self.out_proj = linear(inner, d_model, axes=("heads", "embed"), **common)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: TitansMALState | None = None,
    ) -> tuple[jax.Array, TitansMALState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, TitansMALState)
        memory, attention = (None, None) if state is None else state
        opening, said = self.memory.opening(memory)
        m, memory = self.memory(x, segment_ids=segment_ids, state=memory, opening=opening)
        y, attention = self.attention(
            self.norm(m),
            persistent=None if said is None else self.norm(said),
            segment_ids=segment_ids,
            state=attention,
        )
        return self.out_proj(y), TitansMALState(memory, attention)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> TitansMALState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        return TitansMALState(
            self.memory.init_state(batch_size), self.attention.init_state(batch_size)
        )

    def step(self, x_t: jax.Array, state: TitansMALState) -> tuple[jax.Array, TitansMALState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the memory and the window; and all."""
        del context_length
        memory, window = self.memory.state_bytes(), self.attention.state_bytes()
        return {name: memory[name] + window[name] for name in memory}
