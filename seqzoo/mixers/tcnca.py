"""TCNCA: a temporal convolution network and attention inside chunks."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from seqzoo.nn.mega_block import MegaBlock, MegaState
from seqzoo.nn.simple_block import SimpleBlock
from seqzoo.nn.tcn import TCN

GATINGS = ("mega", "simple")


class TCNCA(nnx.Module):
    """MEGA with a temporal convolution network in place of its moving average.

    gating "mega": the block of MEGA (seqzoo.nn.mega_block), with its own norm and gated residual.
    gating "simple": without its gates, scales and offsets; the norm and the residual are the
    model's:

        m       = silu(tcn(x))
        q, k, v = m W_q + b_q, m W_k + b_k, m W_v + b_v
        out     = attention(q, k, v) W_o + b_o                 inside chunks of chunk_size tokens

    Chunks do not overlap and count from the start of each document; what lies before the chunk is
    seen through the network alone.

    Args:
        d_model: width of the input and output.
        gating: "mega" or "simple".
        kernel_size: taps of a level of the network (K); odd where it looks both ways.
        dilation_growth: by which the dilation grows from level to level, at most kernel_size.
        n_levels: levels.
        dilations: one per level, in place of dilation_growth and n_levels; None = those.
        preset: of the network: "relu_res", "linear" or "separable".
        weight_norm: size and direction of a channel's taps are parameters of their own.
        use_bias: whether levels have a bias.
        max_length: of the longest sequence: levels that reach no other token of it are left out,
            with a warning; None = leave out nothing.
        z_dim: width of queries and keys (z); None = d_model / 4, at least 2, made even.
        v_dim: width of values (v); None = 2 d_model.
        chunk_size: tokens of a chunk; None = the whole row (only with causal=False).
        attention: "softmax", "laplace" or "relu2".
        rel_pos_bias: "simple" or "rotary".
        max_positions: simple bias without chunks: tokens of the longest row.
        causal: looks back only; else both ways (and has no step).
        norm: gating mega: "layernorm", "scalenorm" or "rmsnorm".
        norm_eps: gating mega: added under its root.
        prenorm: gating mega: norm of what comes in; else of what goes out.
        n_residuals: gating simple: residual additions of the whole network; W_o starts divided by
            its root.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, norms and the softmax are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Terzic et al., "TCNCA" (arXiv 2312.05605), of which only the abstract is public; Ma et
    al., "Mega" (arXiv 2209.10655), and facebookresearch/mega.

    Differs from source: everything that the abstract does not say is ours: levels, taps and growth
    of the network, relu with a residual per level, and the simple form.
    """

    def __init__(
        self,
        d_model: int,
        *,
        gating: str = "mega",
        kernel_size: int = 16,
        dilation_growth: int = 16,
        n_levels: int = 3,
        dilations: Sequence[int] | None = None,
        preset: str = "relu_res",
        weight_norm: bool = True,
        use_bias: bool = True,
        max_length: int | None = None,
        z_dim: int | None = None,
        v_dim: int | None = None,
        chunk_size: int | None = 128,
        attention: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        causal: bool = True,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        prenorm: bool = True,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if gating not in GATINGS:
            raise ValueError(f"gating is {gating!r}; allowed: {', '.join(GATINGS)}")
        move = TCN(
            d_model,
            kernel_size=kernel_size,
            dilation_growth=dilation_growth,
            n_levels=n_levels,
            dilations=dilations,
            preset=preset,
            causal=causal,
            weight_norm=weight_norm,
            use_bias=use_bias,
            skip=gating == "mega",
            max_length=max_length,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        common: dict[str, Any] = dict(
            move=move,
            z_dim=z_dim,
            v_dim=v_dim,
            chunk_size=chunk_size,
            attention=attention,
            rel_pos_bias=rel_pos_bias,
            max_positions=max_positions,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        if gating == "mega":
            self.block = MegaBlock(d_model, norm=norm, norm_eps=norm_eps, prenorm=prenorm, **common)
        else:
            self.block = SimpleBlock(d_model, n_residuals=n_residuals, **common)
        self.owns_residual = gating == "mega"
        self.causal, self.causality = causal, move.causality

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MegaState | None = None,
    ) -> tuple[jax.Array, MegaState | None]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding), with gating mega the residual connection included,
            and the state after the last token (None where it looks both ways).
        """
        return self.block(x, segment_ids=segment_ids, state=state)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MegaState:
        """The state before the first token; `max_length` changes nothing here."""
        return self.block.init_state(batch_size, max_length=max_length)

    def step(self, x_t: jax.Array, state: MegaState) -> tuple[jax.Array, MegaState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        return self.block.step(x_t, state)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the network's rings and the keys and values of a chunk."""
        return self.block.state_bytes(context_length)
