"""S4D: a diagonal linear state space per feature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from seqzoo.nn import diagonal, hippo, inits
from seqzoo.nn.activations import activate, check_activation
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.param import param
from seqzoo.nn.state_space import convolution, stream
from seqzoo.nn.step_sizes import check_step_sizes, log_step_sizes


class S4DState(NamedTuple):
    """What an S4D layer keeps of everything it has read; its size does not grow.

    Attributes:
        h: `[b e n]` float32: the real parts of n/2 modes, then their imaginary parts.
        last_id: int32 `[b]`, id of the last document.
    """

    h: jax.Array
    last_id: jax.Array


class S4D(nnx.Module):
    """n/2 complex modes per feature, of which the real part is given out.

        h_t = Abar h_{t-1} + Bbar u_t,    y_t = 2 Re(C h_t) + D u_t,    Re(A) = -exp(log_A_real)
        out = a * sigmoid(g),             a, g = split(activation(y) W + b)

    Whole sequences are convolved with 2 Re(C Abar^i Bbar) (seqzoo/nn/diagonal.py); the state is the
    recurrence. Parameters are real: a complex number is two of them.

    Args:
        d_model: width of the input and output; features (e).
        d_state: states per feature (n), even: each mode and its conjugate count.
        init: A at the start, its real parts -1/2: "lin" = -1/2 + i pi k, "inv" = the inverse law,
            "legs" = the normal part of HiPPO-LegS.
        discretization: "zoh" (inputs held) or "bilinear".
        dt_min, dt_max: step sizes at the start are log-uniform between them.
        activation: "gelu" (the exact one), "relu", "silu" or "identity".
        glu: whether the output is gated; without, out = activation(y) W + b.
        ssm_lr: peak learning rate of A and of step sizes, in place of the optimizer's; they do not
            decay.
        implementation: which implementation of the convolution ("xla", ...); None = the best.
        dtype: what to compute in; parameters, kernel and state are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models"
    (arXiv 2206.11893); `models/s4/s4d.py` of state-spaces/s4.

    Differs from source: dropout stands on what the layer gives (model.dropout), not between
    activation and W; b starts at 0; documents can be packed and streamed.
    """

    causality = "fft"

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        activation: str = "gelu",
        glu: bool = True,
        ssm_lr: float = 1e-3,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model)
        at_least(0, ssm_lr=ssm_lr)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state is {d_state}; it must be even and at least 2")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; allowed: {', '.join(INITS)}")
        if discretization not in diagonal.DISCRETIZATIONS:
            allowed = ", ".join(diagonal.DISCRETIZATIONS)
            raise ValueError(f"discretization is {discretization!r}; allowed: {allowed}")
        check_step_sizes(dt_min, dt_max)
        check_activation(activation)
        self.d_model, self.d_state, self.discretization = d_model, d_state, discretization
        self.activation, self.glu = activation, glu
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        shape = (d_model, d_state // 2)
        A = np.broadcast_to(INITS[init](d_state), shape)
        own = dict(decay=False, lr=ssm_lr)
        matrix = lambda value, **rates: param(value, axes=("inner", "state"), **rates)
        self.log_dt = param(
            log_step_sizes(rngs.params(), d_model, dt_min, dt_max), axes=("inner",), **own
        )
        self.log_A_real = matrix(jnp.log(jnp.asarray(-A.real)), **own)
        self.A_imag = matrix(jnp.asarray(A.imag), **own)
        # A complex normal number of variance 1.
        draw = lambda: jax.random.normal(rngs.params(), shape) * 0.5**0.5
        self.C_real, self.C_imag = matrix(draw()), matrix(draw())
        self.D = param(jax.random.normal(rngs.params(), (d_model,)), axes=("inner",), decay=False)
        self.out_proj = linear(
            d_model,
            2 * d_model if glu else d_model,
            axes=("inner", "embed"),
            use_bias=True,
            kernel_init=inits.uniform(),
            dtype=self.dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: S4DState | None = None,
    ) -> tuple[jax.Array, S4DState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (never inside a
                document); None = one document (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, S4DState)
        if not x.size:  # nothing to read
            state = self.init_state(x.shape[0]) if state is None else state
            return x.astype(self.dtype), state
        (step, C), t = self._modes(), x.shape[1]
        kernel, skip = diagonal.kernel(step, C, t)[:, None], self._wide(self.D)[:, None]
        y, h, last_id = stream(
            x.astype(self.dtype),
            convolution(kernel, skip, None, segment_ids, implementation=self.implementation),
            respond=lambda h: diagonal.respond(step, C, h, t)[:, :, None],
            absorb=lambda u, count, h: diagonal.absorb(step, u, count, h),
            state=state,
            segment_ids=segment_ids,
        )
        out = self._project(y)
        if segment_ids is not None:  # its bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, S4DState(h, last_id)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> S4DState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        h = jnp.zeros((batch_size, self.d_model, self.d_state), self._sums)
        return S4DState(h, jnp.zeros((batch_size,), jnp.int32))

    def step(self, x_t: jax.Array, state: S4DState) -> tuple[jax.Array, S4DState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        check_call(x_t[:, None], None, state, S4DState)
        step, C = self._modes()
        u = x_t.astype(self.dtype).astype(self._sums)
        y, h = diagonal.advance(step, C, u, state.h)
        y = (y + self._wide(self.D) * u).astype(self.dtype)
        return self._project(y), S4DState(h, state.last_id)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the recurrence alone, and with the id."""
        del context_length
        recurrent = self._sums.itemsize * self.d_model * self.d_state
        return {"recurrent": recurrent, "total": recurrent + 4}

    @property
    def _sums(self) -> jnp.dtype:
        return state_dtype(self.dtype)

    def _wide(self, parameter: nnx.Param) -> jax.Array:
        return parameter[...].astype(self._sums)

    def _modes(self) -> tuple[diagonal.Modes, jax.Array]:
        """The recurrence's modes, and C, complex `[e n/2]`."""
        A = jax.lax.complex(-jnp.exp(self._wide(self.log_A_real)), self._wide(self.A_imag))
        step = diagonal.DISCRETIZATIONS[self.discretization](A, jnp.exp(self._wide(self.log_dt)))
        return step, jax.lax.complex(self._wide(self.C_real), self._wide(self.C_imag))

    def _project(self, y: jax.Array) -> jax.Array:
        out = self.out_proj(activate(self.activation, y))
        if not self.glu:
            return out
        a, gate = jnp.split(out, 2, axis=-1)
        return a * jax.nn.sigmoid(gate)


def _lin(n: int) -> np.ndarray:
    return -0.5 + 1j * np.pi * np.arange(n // 2)


def _inv(n: int) -> np.ndarray:
    return -0.5 + 1j * n / np.pi * (n / (2 * np.arange(n // 2) + 1) - 1)


# Of d_state, complex `[n/2]`: section 4 of the paper.
INITS = {"lin": _lin, "inv": _inv, "legs": hippo.normal_legs}
