"""Titans with memory as a context: attention within segments, also to what the memory recalls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core import parts
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.combined import Combined
from seqzoo.nn.linear import linear
from seqzoo.nn.neural_memory import memory_heads
from seqzoo.nn.persistent_attention import check_rope
from seqzoo.nn.projections import Projections
from seqzoo.nn.rotary import rotate
from seqzoo.nn.segment import Carried, Segment, one_document, segments


class TitansMACState(NamedTuple):
    """What the layer keeps; its size does not grow.

    Attributes:
        convs: inputs of the convolution of the queries that the memory is asked.
        carried: the memory, the memory at the start of the segment, and the keys and values of the
            segment that is open.
        count: int32 `[b]`, tokens of the current document so far.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    convs: tuple
    carried: Carried
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


class TitansMAC(nnx.Module):
    """Attention within segments, to what a long-term memory recalls as well (MAC).

    Segment by segment of `segment` tokens, M_0 being the memory before the segment:

        h_i = M_0(q_i)                                     read; q = silu(conv(x W_r)), of length 1
        y_i = softmax attention of x_i to persistent tokens, h_1 ... h_i and x_1 ... x_i
        M_i = M_{i-1} trained on y_i, as TitansLMM trains on x_i                             write
        out = (norm(y_i) * sigmoid(norm(M_i(y_i)))) W_o    read again; norms per head, with gains

    Attention never leaves its segment, so what came before reaches a token through the memory
    alone. Segments count from the start of each document. Layers are sequential in segments.

    Args:
        d_model: width of the input and output.
        n_heads, head_dim: heads of the memory and of attention; None = as many as make d_model.
        segment: tokens of a segment, a multiple of chunk.
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
        n_persistent: learned tokens that attention sees in every segment, 0 = none.
        rope: turn queries and keys by their positions: 0 to segment - 1 for what is recalled, then
            the tokens; persistent tokens have none.
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
    2501.00663), section 4.1 and figure 5a. No code of the authors is public.

    Differs from source: a token sees what is recalled for itself and for those before it; the paper
    shows every token all of its segment's, which lets it see tokens that come later. The second
    reading is M_i(y_i), token by token, for the same reason. Documents can be packed and streamed.
    """

    def __init__(
        self,
        d_model: int,
        *,
        segment: int = 128,
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
        rope: bool = True,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        n_heads = memory_heads(d_model, n_heads, head_dim)
        at_least(1, segment=segment, chunk=chunk)
        at_least(0, n_persistent=n_persistent)
        check_rope(head_dim, rope)
        if segment % chunk:
            raise ValueError(
                f"segment is {segment} and chunk {chunk}; segment must be a multiple of chunk, or "
                "a segment would end inside a chunk of the memory"
            )
        self.n_heads, self.head_dim, self.segment = n_heads, head_dim, segment
        self.rope, self.rope_theta = rope, float(rope_theta)
        common = dict(dtype=str(jnp.dtype(dtype)), rngs=rngs)
        inner = n_heads * head_dim
        self.q_proj = linear(d_model, inner, axes=("embed", "heads"), **common)
        self.read = Projections(
            d_model,
            n_heads,
            head_dim,
            unit=1,
            n_out=1,
            d_conv=d_conv,
            conv_init_std=conv_init_std,
            implementation=implementation,
            **common,
        )
        self.inside = Segment(
            d_model,
            segment=segment,
            n_persistent=n_persistent,
            rope_theta=self.rope_theta if rope else None,
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
            norm_eps=norm_eps,
            implementation=implementation,
            **common,
        )
        self.inside_def = nnx.split(self.inside)[0]
        self.combined = Combined(n_heads, head_dim, eps=norm_eps, **common)
        self.out_proj = linear(inner, d_model, axes=("heads", "embed"), **common)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: TitansMACState | None = None,
    ) -> tuple[jax.Array, TitansMACState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, TitansMACState)
        b, t, _ = x.shape
        alone = state is None and segment_ids is None
        state = self.init_state(b) if state is None else state
        if not x.size:  # nothing to read
            return x.astype(self.inside.dtype), state
        if segment_ids is not None:  # what stands at padding must not reach anyone
            x = jnp.where((segment_ids > 0)[..., None], x, 0)
        (asked,), convs = self.read(x, segment_ids=segment_ids, states=state.convs)
        place, valid, count, last_id = parts.places(segment_ids, state.count, state.last_id, t)
        heads = lambda y: y.reshape(b, t, self.n_heads, self.head_dim)
        q, k, v = (heads(f(x)) for f in (self.q_proj, self.inside.k_proj, self.inside.v_proj))
        turned = (q, k)
        if self.rope:
            at = self.segment + place % self.segment
            turned = (rotate(a, at, theta=self.rope_theta) for a in turned)
        params = nnx.as_pure(nnx.state(self.inside, nnx.Param))
        tokens = (asked, q, *turned, v)
        if alone:
            carried = self.inside.opened(b)
            carried, (y, m, *gates) = one_document(
                self.inside_def, params, carried, tokens, self.segment
            )
        else:
            carried, (y, m, *gates) = segments(
                self.inside_def, params, state.carried, tokens, place, valid, self.segment
            )
        self.inside.memory.report(gates, segment_ids, carried.state(count))
        return self.out_proj(self.combined(y, m)), TitansMACState(convs, carried, count, last_id)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> TitansMACState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return TitansMACState(
            self.read.init_states(batch_size), self.inside.init_state(batch_size), count, last_id
        )

    def step(self, x_t: jax.Array, state: TitansMACState) -> tuple[jax.Array, TitansMACState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: memories, keys and values of a segment; and all."""
        del context_length
        inside = self.inside.state_bytes()
        return {**inside, "total": inside["total"] + self.read.state_bytes() + 8}
