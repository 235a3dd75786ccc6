"""The gated short convolution of BASED, and that of the recall experiments."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.linear import linear

FORMS = ("lm", "zoology")


class BaseConv(nnx.Module):
    """A convolution of few taps, multiplied by a projection of its input.

    form="lm", the block of the language models (inner width e = expand * d_model):

        u, z = split(x W_in + b_in)
        out  = (silu(conv(u)) z) W_out + b_out

    form="zoology", the block of the recall experiments, which adds its input by itself:

        out  = conv(x) (x W + b) + x

    Args:
        d_model: width of the input and output.
        form: "lm" or "zoology".
        d_conv: taps of the convolution (w).
        expand: inner width over d_model; form "lm" only.
        use_bias: bias on the projections.
        use_conv_bias: bias on the convolution; None = as the form's source: lm none, zoology one.
        init_std: standard deviation that the projections start with; None = 1 / sqrt(width of
            their input).
        n_residuals: residual additions of the whole network; W_out starts divided by its root
            (form "lm" only).
        implementation: which implementation of the operator ("xla", ...); None = the best.
        dtype: what to compute in; parameters and state are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff" (arXiv 2402.18668), `BaseConv` of HazyResearch/based; "Zoology" (arXiv 2312.04927),
    `BaseConv` of HazyResearch/zoology.

    Differs from source: documents can be packed and streamed; the state keeps d_conv - 1 inputs
    (the source keeps d_conv), and a step adds the bias of the convolution (the source's does not).
    `expand` counts one half: the source's expand_proj=4 is expand=2.
    """

    def __init__(
        self,
        d_model: int,
        *,
        form: str = "lm",
        d_conv: int = 3,
        expand: int = 2,
        use_bias: bool = True,
        use_conv_bias: bool | None = None,
        init_std: float | None = 0.02,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
        at_least(1, d_model=d_model, d_conv=d_conv, expand=expand, n_residuals=n_residuals)
        if init_std is not None and init_std <= 0:
            raise ValueError(f"init_std is {init_std}; it must be above 0, or null")
        lm = form == "lm"
        self.form, self.dtype = form, str(jnp.dtype(dtype))
        self.d_conv, self.d_inner = d_conv, expand * d_model if lm else d_model

        common = dict(dtype=self.dtype, rngs=rngs)
        self.in_proj = linear(
            d_model,
            2 * self.d_inner if lm else d_model,
            axes=("embed", "inner"),
            use_bias=use_bias,
            kernel_init=inits.normal(1, init_std),
            **common,
        )
        self.conv = ShortConv(
            self.d_inner,
            d_conv,
            use_bias=not lm if use_conv_bias is None else use_conv_bias,
            activation="silu" if lm else None,
            implementation=implementation,
            **common,
        )
        if lm:
            self.out_proj = linear(
                self.d_inner,
                d_model,
                axes=("inner", "embed"),
                use_bias=use_bias,
                kernel_init=inits.normal(n_residuals, init_std),
                **common,
            )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: ShortConvState | None = None,
    ) -> tuple[jax.Array, ShortConvState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, ShortConvState)
        projected = self.in_proj(x)
        if self.form == "lm":
            u, gate = jnp.split(projected, 2, axis=-1)  # [b t e] each
            u, state = self.conv(u, segment_ids=segment_ids, state=state)
            out = self.out_proj(u * gate)
        else:
            u, state = self.conv(x, segment_ids=segment_ids, state=state)
            out = u * projected + x.astype(self.dtype)
        if segment_ids is not None:  # a bias or x itself would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ShortConvState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        return self.conv.init_state(batch_size)

    def step(self, x_t: jax.Array, state: ShortConvState) -> tuple[jax.Array, ShortConvState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the inputs of the convolution, and with the id."""
        del context_length
        inputs = state_dtype(self.dtype).itemsize * (self.d_conv - 1) * self.d_inner
        return {"recurrent": inputs, "total": inputs + 4}
