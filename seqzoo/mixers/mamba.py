"""Mamba: the selective state space mixer ("S6")."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.selective_scan import SelectiveScanState, selective_scan
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded


class MambaState(NamedTuple):
    """What a Mamba layer keeps of everything it has read; its size does not grow.

    Attributes:
        conv: the last `d_conv - 1` inputs of the convolution, `[b w-1 e]` float32.
        scan: the recurrence `[b e n]` float32; both parts carry the id of the last document.
    """

    conv: ShortConvState
    scan: SelectiveScanState


class Mamba(nnx.Module):
    """Selective state space: a diagonal recurrence whose step size, input and output depend on x.

        xs, z       = split(x W_in)
        u           = silu(conv(xs) + b_conv)              causal, depthwise, d_conv taps
        r, B, C     = split(u W_x)
        delta       = softplus(r W_dt + b_dt)              seconds > 0, in float32
        h_t         = exp(delta_t A) h_{t-1} + delta_t B_t u_t,     A = -exp(A_log) < 0
        out         = ((C_t . h_t + D u_t) silu(z)) W_out

    Args:
        d_model: width of the input and output.
        d_state: states per channel (n).
        d_conv: taps of the convolution (w).
        expand: inner width over d_model: e = expand * d_model.
        dt_rank: rank of the step-size projection; "auto" = ceil(d_model / 16).
        dt_min, dt_max: step sizes at the start are log-uniform between them.
        dt_init_floor: no step size starts below it.
        dt_scale: W_dt starts uniform within +- dt_scale / sqrt(dt_rank).
        use_bias: bias on the input and output projections.
        use_conv_bias: bias on the convolution.
        n_residuals: residual additions of the whole network; W_out starts divided by its root.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state and the recurrence are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (arXiv 2312.00752), algorithm 2 and section 3.6.

    Differs from source: documents can be packed and streamed; the state keeps d_conv - 1 inputs
    (the source keeps d_conv), always in float32; the gradient of the last state is propagated.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_scale: float = 1.0,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(
            1,
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            n_residuals=n_residuals,
        )
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"dt_rank is {dt_rank!r}; it must be 'auto' or a number of at least 1")
        if not isinstance(dt_rank, str) and dt_rank < 1:
            raise ValueError(f"dt_rank is {dt_rank}; it must be 'auto' or a number of at least 1")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min is {dt_min} and dt_max {dt_max}; 0 < dt_min <= dt_max")

        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = e = expand * d_model
        self.dt_rank = r = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        self.in_proj = linear(
            d_model,
            2 * e,
            axes=("embed", "inner"),
            use_bias=use_bias,
            kernel_init=_uniform(d_model**-0.5),
            **common,
        )
        self.conv = ShortConv(
            e,
            d_conv,
            use_bias=use_conv_bias,
            activation="silu",
            implementation=implementation,
            **common,
        )
        self.x_proj = linear(
            e, r + 2 * d_state, axes=("inner", None), kernel_init=_uniform(e**-0.5), **common
        )
        self.dt_proj = linear(
            r, e, axes=(None, "inner"), kernel_init=_uniform(dt_scale * r**-0.5), **common
        )
        self.dt_bias = param(
            _dt_bias(rngs.params(), e, dt_min, dt_max, dt_init_floor), axes=("inner",), decay=False
        )
        decay_rates = jnp.tile(jnp.arange(1, d_state + 1, dtype=jnp.float32), (e, 1))
        self.A_log = param(jnp.log(decay_rates), axes=("inner", "state"), decay=False)
        self.D = param(jnp.ones(e, jnp.float32), axes=("inner",), decay=False)
        self.out_proj = linear(
            e,
            d_model,
            axes=("inner", "embed"),
            use_bias=use_bias,
            kernel_init=_uniform((e * n_residuals) ** -0.5),
            **common,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MambaState | None = None,
    ) -> tuple[jax.Array, MambaState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, MambaState)
        if state is None:
            state = self.init_state(x.shape[0])
        xs, z = jnp.split(self.in_proj(x), 2, axis=-1)  # [b t e] each
        u, conv_state = self.conv(xs, segment_ids=segment_ids, state=state.conv)
        delta_low, B, C = jnp.split(
            self.x_proj(u), [self.dt_rank, self.dt_rank + self.d_state], axis=-1
        )
        y, scan_state = sharded(
            selective_scan,
            u,
            self.dt_proj(delta_low),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            z,
            self.dt_bias[...],
            delta_softplus=True,
            initial_state=state.scan,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        out = self.out_proj(y)
        if segment_ids is not None:  # a bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, MambaState(conv_state, scan_state)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MambaState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        h = jnp.zeros((batch_size, self.d_inner, self.d_state), state_dtype(self.dtype))
        last_id = jnp.zeros((batch_size,), jnp.int32)
        return MambaState(self.conv.init_state(batch_size), SelectiveScanState(h, last_id))

    def step(self, x_t: jax.Array, state: MambaState) -> tuple[jax.Array, MambaState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the recurrence alone, and with the conv inputs and the ids."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        recurrent = each * self.d_inner * self.d_state
        return {
            "recurrent": recurrent,
            "total": recurrent + each * self.d_inner * (self.d_conv - 1) + 8,
        }


def _uniform(bound: float):
    """Uniform within +- bound: torch's default for a Linear layer, where the source starts from."""

    def init(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _dt_bias(key, width: int, dt_min: float, dt_max: float, floor: float) -> jax.Array:
    """Biases whose softplus is log-uniform between dt_min and dt_max, at least `floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = jnp.exp(jax.random.uniform(key, (width,), minval=low, maxval=high))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))
