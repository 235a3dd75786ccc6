"""Mamba-2: state space duality, one decay per head and large states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState
from pallas_kernels.simple_gla import SimpleGLAState, simple_gla
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.decay import SoftplusDecay
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer keeps of everything it has read; its size does not grow.

    Attributes:
        conv: the last `d_conv - 1` inputs of the convolution of x, `[b w-1 e]` float32.
        bc_conv: the same of B and C, `[b w-1 2gn]`.
        ssm: the recurrence `[b h n p]` float32; all parts carry the id of the last document.
    """

    conv: ShortConvState
    bc_conv: ShortConvState
    ssm: SimpleGLAState


class Mamba2(nnx.Module):
    """A state space whose heads share one decay for all their channels and states.

        z, xs, B, C, a = x W_in                       gate, input, two state vectors, step size
        u, B, C     = silu(conv(xs, B, C) + b_conv)   causal, depthwise, d_conv taps
        delta       = softplus(a + dt_bias)           per head, seconds > 0, in float32
        S_t         = exp(delta_t A) S_{t-1} + B_t (delta_t u_t)^T,     A = -exp(A_log) < 0
        y_t         = S_t^T C_t + D u_t
        out         = norm(y * silu(z)) W_out         gate first, then norm

    Args:
        d_model: width of the input and output.
        d_state: states per channel (n).
        d_conv: taps of the convolution (w).
        expand: inner width over d_model: e = expand * d_model.
        head_dim: channels per head (p); h = e / head_dim heads.
        n_groups: how many B and C there are (g); a divisor of h, whose h / g heads share one. The
            norm is over e / g channels.
        a_min, a_max: rates exp(A_log) start uniform between them.
        dt_min, dt_max: step sizes at the start are log-uniform between them.
        dt_init_floor: no step size starts below it.
        use_bias: bias on the input and output projections.
        use_conv_bias: bias on the convolution.
        norm_eps: added under the root of the norm.
        n_residuals: residual additions of the whole network; W_out starts divided by its root.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, decays and norm are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
    Structured State Space Duality" (arXiv 2405.21060), sections 6 and 7; `Mamba2` of
    state-spaces/mamba.

    Differs from source: W_in is kept as three matrices (z and x; B and C; a) and the convolution as
    two, so that heads can be spread over devices while B and C stay whole; documents can be packed
    and streamed; the state keeps d_conv - 1 inputs, always in float32; the gradient of the last
    state is propagated.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        a_min: float = 1.0,
        a_max: float = 16.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        norm_eps: float = 1e-5,
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
            head_dim=head_dim,
            n_groups=n_groups,
            n_residuals=n_residuals,
        )
        self.d_inner = e = expand * d_model
        if e % head_dim:
            raise ValueError(
                f"head_dim is {head_dim}; it must divide expand * d_model = {e} into heads"
            )
        self.n_heads = h = e // head_dim
        if h % n_groups:
            raise ValueError(
                f"n_groups is {n_groups}; it must divide the number of heads, "
                f"expand * d_model / head_dim = {h}"
            )
        self.d_state, self.d_conv, self.n_groups = d_state, d_conv, n_groups
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(dtype=self.dtype, rngs=rngs)
        project = lambda width, axis: linear(
            d_model,
            width,
            axes=("embed", axis),
            use_bias=use_bias,
            kernel_init=inits.uniform(),
            **common,
        )
        convolve = lambda width: ShortConv(
            width, d_conv, use_bias=use_conv_bias, implementation=implementation, **common
        )
        self.in_proj = project(2 * e, "inner")
        self.bc_proj = project(2 * n_groups * d_state, None)
        self.dt_proj = project(h, "heads")
        self.conv, self.bc_conv = convolve(e), convolve(2 * n_groups * d_state)
        self.decay = SoftplusDecay(
            h,
            a_min=a_min,
            a_max=a_max,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            rngs=rngs,
        )
        self.D = param(jnp.ones(h, jnp.float32), axes=("heads",), decay=False)
        self.norm = GatedRMSNorm(e, n_groups=n_groups, eps=norm_eps, **common)
        self.out_proj = linear(
            e,
            d_model,
            axes=("inner", "embed"),
            use_bias=use_bias,
            kernel_init=inits.uniform(n_residuals),
            **common,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: Mamba2State | None = None,
    ) -> tuple[jax.Array, Mamba2State]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, Mamba2State)
        b, t, _ = x.shape
        if state is None:
            state = self.init_state(b)
        z, xs = jnp.split(self.in_proj(x), 2, axis=-1)  # [b t e] each
        u, conv_state = self.conv(xs, segment_ids=segment_ids, state=state.conv)
        bc, bc_state = self.bc_conv(self.bc_proj(x), segment_ids=segment_ids, state=state.bc_conv)
        B, C = (y.reshape(b, t, self.n_groups, self.d_state) for y in jnp.split(bc, 2, axis=-1))
        delta = self.decay.step_sizes(self.dt_proj(x))  # [b t h] float32
        u = u.reshape(b, t, self.n_heads, self.d_inner // self.n_heads)
        y, ssm_state = sharded(
            simple_gla,
            C,
            B,
            (u * delta[..., None]).astype(self.dtype),
            -self.decay.rates() * delta,
            scale=1.0,
            initial_state=state.ssm,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = (y + self.D[...][:, None] * u).reshape(b, t, self.d_inner)  # float32
        out = self.out_proj(self.norm(y * jax.nn.silu(z.astype(y.dtype))))
        if segment_ids is not None:  # a bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, Mamba2State(conv_state, bc_state, ssm_state)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Mamba2State:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        shape = (batch_size, self.n_heads, self.d_state, self.d_inner // self.n_heads)
        s = jnp.zeros(shape, state_dtype(self.dtype))
        ssm = SimpleGLAState(s, jnp.zeros((batch_size,), jnp.int32))
        convs = (conv.init_state(batch_size) for conv in (self.conv, self.bc_conv))
        return Mamba2State(*convs, ssm)

    def step(self, x_t: jax.Array, state: Mamba2State) -> tuple[jax.Array, Mamba2State]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the recurrence alone, and with the conv inputs and the ids."""
        del context_length
        each = state_dtype(self.dtype).itemsize
        recurrent = each * self.d_inner * self.d_state
        channels = self.d_inner + 2 * self.n_groups * self.d_state
        return {
            "recurrent": recurrent,
            "total": recurrent + each * channels * (self.d_conv - 1) + 3 * 4,
        }
