"""MEGA's exponential moving average along time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.long_conv import LongConvState, long_conv
from pallas_kernels.long_conv.xla import XlaConfig
from seqzoo.nn.checks import at_least
from seqzoo.nn.ema_scan import EMAState, Rates, kernel, moving_average
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded

FORMS = ("chunk", "fft", "monarch")
# A decay of 0 has no logarithm; this one forgets within a token.
_LEAST_DECAY = 2.0**-23


class EMA(nnx.Module):
    """Every channel as n damped moving averages:

        p = sigmoid(delta),   q = 1 - p sigmoid(alpha)                    decays in (0, 1)
        h_t = q h_{t-1} + p beta x_t                                      [d n]
        m_t = silu(sum_n gamma_n h_t,n / sqrt(n) + omega x_t)

    Looking both ways there are two sets of averages, one over the past and one over what follows;
    both hold the token itself.

    Args:
        d_model: width of the input and output (d).
        d_state: averages per channel (n).
        causal: looks back only.
        truncation: lags after which an average is cut off; None = never.
        form: of whole sequences: "chunk" (recurrence over small chunks, exact in who sees whom),
            "fft", or "monarch" (the transform by matrix products). Streams take the first, a
            truncated average the convolution always ("chunk": "fft" in place of it).
        chunk: tokens per chunk of the form "chunk".
        implementation: which implementation of the convolution ("xla", ...); None = the best.
        dtype: of the output; parameters, sums and the state are float32.
        rngs: source of the initial values: delta, alpha normal with 0.2; beta +1, -1, +1, .. plus
            normal with 0.02; gamma, omega normal with 1.

    Raises:
        ValueError: a setting is out of range.

    Source: Ma et al., "Mega" (arXiv 2209.10655), section 3.1; `MultiHeadEMA` of
    facebookresearch/mega.

    Differs from source: the state of a truncated average is its last inputs, so that a stream gives
    what the whole gives (the source streams the average that is not cut off); the form by chunks;
    documents can be packed. Weight decay spares delta, alpha and omega; the source's optimizer
    decays every parameter.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        causal: bool = True,
        truncation: int | None = None,
        form: str = "chunk",
        chunk: int = 32,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, d_state=d_state, chunk=chunk)
        if truncation is not None:
            at_least(1, truncation=truncation)
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
        self.d_model, self.d_state, self.causal = d_model, d_state, causal
        self.truncation, self.form, self.chunk = truncation, form, chunk
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))
        exact = form == "chunk" and truncation is None
        self.causality = "none" if not causal else "exact" if exact else "fft"

        sets = 1 if causal else 2
        shape, axes = (sets, d_model, d_state), (None, "inner", "state")
        normal = lambda std, shape=shape: std * jax.random.normal(rngs.params(), shape)
        signs = jnp.where(jnp.arange(d_state) % 2, -1.0, 1.0)
        self.delta = param(normal(0.2), axes=axes, decay=False)
        self.alpha = param(normal(0.2), axes=axes, decay=False)
        self.beta = param(signs + normal(0.02), axes=axes)
        self.gamma = param(normal(1.0), axes=axes)
        self.omega = param(normal(1.0, (d_model,)), axes=("inner",), decay=False)

    def rates(self, which: int = 0) -> Rates:
        """What the averages over the past do (0), or those over what follows (1)."""
        # As wide as the sums: a decay goes into powers of many lengths, which must agree.
        wide = state_dtype(self.dtype)
        delta, alpha, beta, gamma = (
            x[...][which].astype(wide) for x in (self.delta, self.alpha, self.beta, self.gamma)
        )
        p = jax.nn.sigmoid(delta)
        forgets = jnp.minimum(p * jax.nn.sigmoid(alpha), 1 - _LEAST_DECAY)
        return Rates(jnp.log1p(-forgets), p * beta, gamma * self.d_state**-0.5)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, Any]:
        """Maps `[b t d]` to `[b t d]` in `dtype`, and gives the state after the last token.

        Args:
            x: `[b t d]`, any float type; 0 at padding.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Raises:
            NotImplementedError: a state for what looks both ways.
        """
        if state is not None:
            self._refuse_streams("a state")
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not x.size:  # nothing to read
            fresh = self.causal and state is None
            return x.astype(self.dtype), self.init_state(x.shape[0]) if fresh else state
        if not self.causal:
            y, state = self._both_ways(x, segment_ids), None
        elif self.truncation is not None:
            y, state = self._convolve(x, segment_ids, None, state)
        else:
            y, state = self._average(x, segment_ids, state)
        return jax.nn.silu(y + self.omega[...] * x).astype(self.dtype), state

    def step(self, x_t: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        self._refuse_streams("step")
        if self.truncation is not None:
            y, state = self(x_t[:, None], state=state)
            return y[:, 0], state
        x_t, rates = x_t.astype(jnp.promote_types(x_t.dtype, jnp.float32)), self.rates()
        h = jnp.exp(rates.log_q) * state.h + rates.into * x_t[..., None]
        y = jnp.sum(rates.out * h, axis=-1) + self.omega[...] * x_t
        return jax.nn.silu(y).astype(self.dtype), state._replace(h=h)

    def init_state(self, batch_size: int) -> EMAState | LongConvState:
        """The state before the first token: zeros."""
        self._refuse_streams("init_state")
        last_id, dtype = jnp.zeros((batch_size,), jnp.int32), state_dtype(self.dtype)
        if self.truncation is not None:
            inputs = jnp.zeros((batch_size, self.truncation - 1, self.d_model), dtype)
            return LongConvState(inputs, last_id)
        return EMAState(jnp.zeros((batch_size, self.d_model, self.d_state), dtype), last_id)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the averages (truncated: the inputs), and with the id."""
        del context_length
        self._refuse_streams("state_bytes")
        each = self.d_state if self.truncation is None else self.truncation - 1
        recurrent = state_dtype(self.dtype).itemsize * self.d_model * each
        return {"recurrent": recurrent, "total": recurrent + 4}

    def _average(self, x, segment_ids, state):
        """What never forgets altogether, causal: `[b t d]` and its state."""
        # Of a fresh row, "fft" and "monarch" take the state alone from here; unused, it is not
        # computed.
        y, after = self._scan(x, self.rates(), state, segment_ids)
        if state is None and self.form != "chunk":
            y, _ = self._convolve(x, segment_ids, None, None)
        return y, after

    def _both_ways(self, x, segment_ids):
        t, past, future = x.shape[1], self.rates(0), self.rates(1)
        if self.form == "chunk" and self.truncation is None:
            turn = lambda x: None if x is None else jnp.flip(x, axis=1)
            ids = turn(segment_ids)
            if ids is not None:  # numbered upward in this direction too
                ids = jnp.where(ids > 0, 1 + jnp.max(ids, axis=1, keepdims=True) - ids, 0)
            forward, _ = self._scan(x, past, None, segment_ids)
            backward, _ = self._scan(turn(x), future, None, ids)
            return forward + turn(backward)
        # A reverse kernel begins at the next token: the token itself falls to the skip.
        reverse = kernel(future, self._lags(t))
        ahead = jnp.pad(reverse[:, 1:], ((0, 0), (0, 1)))
        y, _ = self._convolve(x, segment_ids, (reverse[:, 0], ahead), None)
        return y

    def _lags(self, t: int) -> int:
        return t if self.truncation is None else min(t, self.truncation)

    def _scan(self, x, rates, state, segment_ids):
        return sharded(
            moving_average,
            x,
            *rates,
            chunk=self.chunk,
            initial_state=state,
            segment_ids=segment_ids,
        )

    def _convolve(self, x, segment_ids, future, state):
        skip, ahead = (None, None) if future is None else future
        # A causal truncated kernel has its whole length, for the state is as long.
        whole = self.causal and self.truncation is not None
        lags = self.truncation if whole else self._lags(x.shape[1])
        served = self.implementation in (None, "xla")
        form = "monarch" if self.form == "monarch" else "fft"
        return sharded(
            long_conv,
            x,
            kernel(self.rates(0), lags),
            skip,
            ahead,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
            config=XlaConfig(form=form) if served else None,
        )

    def _refuse_streams(self, what: str) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{what}: this average looks both ways (causal=false), so a token's output depends "
                "on tokens that a stream has not read yet"
            )
