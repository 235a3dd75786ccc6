"""Monarch Mixer: a gated long convolution with an implicit kernel, as in M2-BERT."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.long_conv import LongConvState, long_conv
from pallas_kernels.long_conv.xla import XlaConfig
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.implicit_filter import ImplicitFilter
from seqzoo.nn.linear import LayerNorm, linear
from seqzoo.nn.sharded import sharded

_NO_STATE = "monarch_mixer with causal=False sees later tokens: it reads whole sequences, stateless"

CONV_FORMS = ("auto", "direct", "fft", "monarch")


class Memory(NamedTuple):
    """One long convolution while it writes.

    Attributes:
        conv: the last l - 1 inputs `[b l-1 e]` float32, with the id of their document.
        kernel: `[e l]` float32, what the parameters made of it when it was last computed.
    """

    conv: LongConvState
    kernel: jax.Array


class MonarchMixerState(NamedTuple):
    """What a causal Monarch Mixer layer keeps; it is as large as the cache was made.

    Attributes:
        short: the last inputs of the short convolution `[b w-1 3d]` float32.
        long: of the gated convolution.
        residual: of the second one, or None.
    """

    short: ShortConvState
    long: Memory
    residual: Memory | None


class MonarchMixer(nnx.Module):
    """A convolution as long as the sequence, between two gates, and one beside them.

        x_1, x_2, v = split(conv(u W_in + b_in))            causal, depthwise, d_conv taps
        y           = (k * (v x_1) + D v x_1) x_2           * is a convolution over time
        y           = y + (k_2 * u + D_2 u)                 with residual_long_conv
        out         = y W_out + b_out

    Kernels are implicit (nn/implicit_filter.py), no longer than max_length, and made in float32
    once per call. The convolution is order-2 Monarch in the frequency domain: with sequences
    filled up to twice their length, the transform and its inverse are Monarch matrices
    (`conv_form: monarch` computes it as such).

    With causal=False a second kernel reaches ahead, and there is neither state nor step. A causal
    state keeps the inputs of the convolutions and their kernels, `max_length` lags of both at most:
    `init_state(max_length=n)` sizes them, and tokens further back than n are forgotten. Whole
    sequences and chunks make kernels anew from the parameters (`prepared()` keeps them); `step`
    takes those of the state.

    Padding is no token: a sequence gives the same, whatever length it is padded to.

    Args:
        d_model: width of the input and output (d, the e of the convolutions).
        max_length: lags of the kernels, the longest sequence that is read in one piece.
        causal: tokens see no later ones; False = an encoder's.
        owns_residual: the output is the new residual stream (M2-BERT's block has neither norm nor
            addition around the mixer); False = the block's usual norm and addition.
        residual_long_conv: a second, ungated long convolution of the input.
        input_norm: a LayerNorm of the input (`hyena_training_additions`, as the released 80M has).
        d_conv: taps of the short convolution (w).
        filter_order: width of the kernels' networks.
        filter_emb_dim: features of a lag, odd.
        filter_frequency: what the frequencies of the sines start at.
        filter_lr: peak learning rate of the kernels' networks; null = the optimizer's.
        filter_pos_lr: the same of the features of lags.
        filter_weight_decay: of the kernels' networks; null = the optimizer's.
        init_std: standard deviation of all matrices at the start, biases 0; null = uniform within
            +- 1 / sqrt(inputs).
        conv_form: how xla computes long convolutions: auto, direct, fft or monarch.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, kernels, convolutions and state are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: `MonarchMixerSequenceMixing` of HazyResearch/m2 (bert/src/mm, commit 7d359e8); Fu et
    al., "Monarch Mixer" (arXiv 2310.12109).

    Differs from source: padding is zeroed before every convolution (there it leaks: issue 43);
    documents can be packed, and streamed when causal; the dropout that `hyena_training_additions`
    brings is left out; see ImplicitFilter for the optimizer's groups.
    """

    def __init__(
        self,
        d_model: int,
        *,
        max_length: int = 1024,
        causal: bool = True,
        owns_residual: bool = False,
        residual_long_conv: bool = True,
        input_norm: bool = False,
        d_conv: int = 3,
        filter_order: int = 128,
        filter_emb_dim: int = 5,
        filter_frequency: float = 10.0,
        filter_lr: float | None = 1e-3,
        filter_pos_lr: float | None = 1e-5,
        filter_weight_decay: float | None = 0.1,
        init_std: float | None = 0.02,
        conv_form: str = "auto",
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, max_length=max_length, d_conv=d_conv)
        if conv_form not in CONV_FORMS:
            raise ValueError(f"conv_form is {conv_form!r}; allowed: {', '.join(CONV_FORMS)}")
        self.d_model, self.max_length, self.d_conv = d_model, max_length, d_conv
        exact = "exact" if conv_form == "direct" else "fft"
        self.causal, self.causality = causal, exact if causal else "none"
        self.owns_residual = owns_residual
        self.conv_form, self.implementation = conv_form, implementation
        self.dtype = str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        init = inits.uniform() if init_std is None else inits.normal(std=init_std)
        project = lambda width, axes: linear(
            d_model, width, axes=axes, use_bias=True, kernel_init=init, **common
        )
        make_filter = lambda: ImplicitFilter(
            d_model,
            max_length=max_length,
            two_sided=not causal,
            emb_dim=filter_emb_dim,
            order=filter_order,
            frequency=filter_frequency,
            init_std=init_std,
            lr=filter_lr,
            pos_lr=filter_pos_lr,
            weight_decay=filter_weight_decay,
            rngs=rngs,
        )
        self.input_norm = LayerNorm(d_model, **common) if input_norm else None
        self.in_proj = project(3 * d_model, ("embed", "inner"))
        self.conv = ShortConv(
            3 * d_model, d_conv, activation=None, implementation=implementation, **common
        )
        self.filter = make_filter()
        self.residual_filter = make_filter() if residual_long_conv else None
        self.out_proj = project(d_model, ("inner", "embed"))

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MonarchMixerState | None = None,
    ) -> tuple[jax.Array, MonarchMixerState | None]:
        """Mixes whole sequences, or (causal) the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one for max_length tokens.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token (None with
            causal=False).

        Raises:
            ValueError: a fresh sequence is longer than max_length.
            NotImplementedError: a state was given with causal=False.
        """
        if state is not None and not self.causal:
            raise NotImplementedError(_NO_STATE)
        return self._mix(x, segment_ids, state, anew=True)

    def _mix(self, x, segment_ids, state, anew: bool):
        check_call(x, segment_ids, state, MonarchMixerState)
        x = x.astype(self.dtype)
        u = x if self.input_norm is None else self.input_norm(x)
        short, long, residual = (None, None, None) if state is None else state
        parts, short = self.conv(self.in_proj(u), segment_ids=segment_ids, state=short)
        before, after, v = jnp.split(parts, 3, axis=-1)
        y, long = self._convolve(self.filter, v, before, after, segment_ids, long, anew)
        if self.residual_filter is not None:
            more, residual = self._convolve(
                self.residual_filter, u, None, None, segment_ids, residual, anew
            )
            y = y + more
        out = self.out_proj(y)
        if segment_ids is not None:  # a bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, MonarchMixerState(short, long, residual) if self.causal else None

    def _convolve(self, made_by, u, before, after, segment_ids, memory, anew: bool):
        """One long convolution, and what it remembers."""
        t = u.shape[1]
        if memory is None:  # one lag more than tokens: the state reaches the first of them
            more = t < (self.max_length if self.causal else 1)
            kernel, reverse = made_by(t + more)
        elif anew:
            kernel, reverse = made_by(memory.kernel.shape[1])
        else:
            kernel, reverse = memory.kernel, None
        y, conv = sharded(
            long_conv,
            u,
            kernel,
            made_by.skip[...],
            reverse,
            None,
            before,
            after,
            initial_state=None if memory is None else memory.conv,
            segment_ids=segment_ids,
            implementation=self.implementation,
            config=self._config(),
        )
        if not self.causal:
            return y, None
        if memory is None:  # room for max_length tokens, where nobody asks it costs nothing
            missing = self.max_length - kernel.shape[1]
            conv = conv._replace(v=jnp.pad(conv.v, ((0, 0), (missing, 0), (0, 0))))
            kernel, _ = made_by(self.max_length)
        return y, Memory(conv, kernel)

    def _config(self):
        return None if self.conv_form == "auto" else XlaConfig(form=self.conv_form)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MonarchMixerState:
        """The state before the first token: the kernels, and room for as many inputs.

        Args:
            batch_size: rows.
            max_length: tokens to remember; the mixer's max_length at most, and None = all of it.

        Raises:
            NotImplementedError: with causal=False there is none.
        """
        if not self.causal:
            raise NotImplementedError(_NO_STATE)
        lags = self._lags(max_length)

        def memory(made_by):
            v = jnp.zeros((batch_size, lags - 1, self.d_model), state_dtype(self.dtype))
            conv = LongConvState(v, jnp.zeros((batch_size,), jnp.int32))
            return Memory(conv, made_by(lags)[0])

        residual = None if self.residual_filter is None else memory(self.residual_filter)
        return MonarchMixerState(self.conv.init_state(batch_size), memory(self.filter), residual)

    def _lags(self, max_length: int | None) -> int:
        return self.max_length if max_length is None else max(1, min(max_length, self.max_length))

    def step(self, x_t: jax.Array, state: MonarchMixerState) -> tuple[jax.Array, MonarchMixerState]:
        """One token `[b d]`: returns `[b d]` and the state after it; not with causal=False."""
        if not self.causal:
            raise NotImplementedError(_NO_STATE)
        y, state = self._mix(x_t[:, None], None, state, anew=False)
        return y[:, 0], state

    def prepared(self) -> "MonarchMixer":
        """This mixer with its kernels computed, for many calls with the same parameters."""
        ready = copy.copy(self)
        ready.filter = self.filter.prepared()
        if self.residual_filter is not None:
            ready.residual_filter = self.residual_filter.prepared()
        return ready

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: what convolutions have read; with kernels (which rows share) and
        ids. Not with causal=False."""
        if not self.causal:
            raise NotImplementedError(_NO_STATE)
        lags, convolutions = self._lags(context_length), 1 + (self.residual_filter is not None)
        each = state_dtype(self.dtype).itemsize
        short = each * (self.d_conv - 1) * 3 * self.d_model
        long = each * convolutions * (lags - 1) * self.d_model
        kernels = 4 * convolutions * lags * self.d_model  # as wide as parameters
        ids = 4 * (1 + convolutions)
        return {"recurrent": short + long, "total": short + long + kernels + ids}
