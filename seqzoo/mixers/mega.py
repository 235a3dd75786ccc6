"""MEGA: moving averages, and gated attention inside chunks."""

from flax import nnx

from seqzoo.nn.ema import EMA
from seqzoo.nn.mega_block import MegaBlock


class Mega(MegaBlock):
    """The block of MEGA with its exponential moving average along time.

    Attention of one head inside chunks; what lies before the chunk is seen through the moving
    average alone. It has its own norm and its own gated residual connection: a stack gives it the
    stream and takes the new one. The equations stand at seqzoo.nn.mega_block.MegaBlock and
    seqzoo.nn.ema.EMA.

    Args:
        d_model: width of the input and output.
        d_state: averages per channel (n).
        causal: looks back only; else both ways (and has no step).
        truncation: lags after which an average is cut off; None = never.
        form: how averages of whole sequences are computed: "chunk", "fft" or "monarch".
        z_dim: width of queries and keys (z); None = d_model / 4, at least 2, made even.
        v_dim: width of values (v); None = 2 d_model.
        chunk_size: tokens of a chunk; None = the whole row (only with causal=False).
        attention: "softmax", "laplace" or "relu2".
        rel_pos_bias: "simple" or "rotary".
        max_positions: simple bias without chunks: tokens of the longest row.
        norm: "layernorm", "scalenorm" or "rmsnorm".
        norm_eps: added under its root.
        prenorm: norm of what comes in; else of what goes out.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, averages, norms and attention's weights are
            float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Ma et al., "Mega: Moving Average Equipped Gated Attention" (arXiv 2209.10655);
    facebookresearch/mega.

    Differs from source: no dropout inside the block; documents can be packed and streamed; any
    length; weight decay spares delta, alpha and omega of the average, gamma and beta of q and k,
    norms and biases, where the source's optimizer decays every parameter.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        causal: bool = True,
        truncation: int | None = None,
        form: str = "chunk",
        z_dim: int | None = None,
        v_dim: int | None = None,
        chunk_size: int | None = 128,
        attention: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        prenorm: bool = True,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        move = EMA(
            d_model,
            d_state=d_state,
            causal=causal,
            truncation=truncation,
            form=form,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        super().__init__(
            d_model,
            move=move,
            z_dim=z_dim,
            v_dim=v_dim,
            chunk_size=chunk_size,
            attention=attention,
            rel_pos_bias=rel_pos_bias,
            max_positions=max_positions,
            norm=norm,
            norm_eps=norm_eps,
            prenorm=prenorm,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
