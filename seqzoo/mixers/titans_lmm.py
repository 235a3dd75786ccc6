"""Titans, the memory alone: a network that is trained while the sequence is read."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.checks import check_call
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.neural_memory import MemoryState, NeuralMemory, memory_heads


class TitansLMM(nnx.Module):
    """Long-term memory as the only mixer (LMM).

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v));  q, k of length 1
        alpha, eta = sigmoid(x w_a + b_a), sigmoid(x w_e + b_e),
        theta = theta_max sigmoid(x w_t + b_t)
        S_t = eta_t S_{t-1} - theta_t gradient of |M(k_t) - v_t|^2   at the weights before t's chunk
        W_t = (1 - alpha_t) W_{t-1} + S_t
        out = (norm(M_t(q_t)) * x W_g) W_o                           the norm per head

    A document begins with learned weights into which learned tokens (persistent memory) have been
    written. The convolution does not run from those into the document.

    What the paper leaves open is a keyword here. Its defaults: two layers, heads of 64, an inner
    width of four times that, chunks of 64 (16 for small models), convolutions of 4 taps, a norm
    with a residual inside the memory (`memory_norm`, off = the paper's bare network), gradients
    clipped token by token to length 1, forgetting that starts at 1.8 % and momentum at 0.73.

    Args:
        d_model: width of the input and output.
        n_heads: heads (h); None = as many as make d_model, at least one.
        head_dim: width of queries, keys and values of a head (k).
        chunk: tokens whose gradients are taken at the same weights; 1 = the exact recurrence.
        memory_layers: layers of the network; 1 = linear.
        memory_expand: its inner width over head_dim.
        memory_norm: LayerNorm of its output, scaled, and its input added.
        activation: between its layers, "gelu" or "silu".
        empty_memory: its last layer starts at 0 (and is learned): it holds nothing at first.
        memory_lr: peak learning rate of the weights that documents begin with; None = optimizer.lr.
        d_conv: taps of the convolutions of q, k and v; 0 = none.
        conv_init_std: they start as the identity plus normal values of this standard deviation.
        use_momentum: else eta is 0.
        use_forgetting: else alpha is 0.
        theta_max: largest step size; None = (1 - eta) / chunk, eta being that of eta_bias.
        alpha_bias, eta_bias, theta_bias: b_a, b_e, b_t at the start.
        limit: of each token's gradient by each matrix: "none"; "clip" = no longer than max_norm;
            "normalise" = of length max_norm.
        max_norm: that length.
        detach_norm: whether it counts as a constant when the layer is differentiated.
        n_persistent: learned tokens written before each document, 0 = none.
        output_gate: "linear" (as the paper has it), "silu" or "none".
        norm_eps: added under the root of the norms.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, the memory, its gates and norms are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Warns:
        UserWarning: theta_max is above (1 - eta) / chunk, where the memory may diverge.

    Source: Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv
    2501.00663), sections 3.1, 3.3 and 4.4. No code of the authors is public.

    Differs from source: documents can be packed and streamed; what the keywords add.
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
        output_gate: str = "linear",
        norm_eps: float = 1e-5,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        n_heads = memory_heads(d_model, n_heads, head_dim)
        if output_gate not in ("linear", "silu", "none"):
            raise ValueError(f"output_gate is {output_gate!r}; allowed: linear, silu, none")
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
        self.output_gate = output_gate
        self.norm = GatedRMSNorm(inner, n_groups=n_heads, eps=norm_eps, **common)
        if output_gate != "none":
            self.gate_proj = linear(d_model, inner, axes=("embed", "heads"), **common)
        self.out_proj = linear(inner, d_model, axes=("heads", "embed"), **common)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MemoryState | None = None,
    ) -> tuple[jax.Array, MemoryState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, MemoryState)
        steps = x.shape[1] == 1 and segment_ids is None
        opening, _ = self.memory.opening(state, steps=steps)
        m, state = self.memory(x, segment_ids=segment_ids, state=state, opening=opening)
        if self.output_gate == "silu":
            y = self.norm(m, self.gate_proj(x))
        elif self.output_gate == "linear":
            y = self.norm(m) * self.gate_proj(x)
        else:
            y = self.norm(m)
        return self.out_proj(y), state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MemoryState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        return self.memory.init_state(batch_size)

    def step(self, x_t: jax.Array, state: MemoryState) -> tuple[jax.Array, MemoryState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: weights (now, and at the chunk's start) and momentum; all."""
        del context_length
        return self.memory.state_bytes()
