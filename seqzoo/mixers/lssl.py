"""LSSL: a dense linear state space per feature, in HiPPO's coordinates."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import einsum, state_dtype
from seqzoo.nn import hippo, inits, krylov
from seqzoo.nn.activations import activate, check_activation
from seqzoo.nn.carried import Carried
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.param import Prepared, param
from seqzoo.nn.report import report, skip_update
from seqzoo.nn.state_space import by_documents, stream, with_kernel
from seqzoo.nn.step_sizes import check_step_sizes, log_step_sizes


class LSSLState(NamedTuple):
    """What an LSSL layer keeps of everything it has read; its size does not grow.

    Attributes:
        x: `[b e n]` float32, after the last token (the source keeps Abar x).
        last_id: int32 `[b]`, id of the last document.
    """

    x: jax.Array
    last_id: jax.Array


class LSSL(nnx.Module):
    """A linear state space of n numbers per feature, discretised with a step size per feature.

        x_t = Abar x_{t-1} + Bbar u_t,    y_t = C x_t + D u_t (+ E)
        out = activation(y) W + b          the m outputs of all features together

    Whole sequences are convolved with C Abar^i Bbar (seqzoo/nn/krylov.py); the state is that of the
    recurrence. Every number is real.

    Args:
        d_model: width of the input and output; features (e).
        d_state: states per feature (n).
        measure: A and B at the start: "legs", "legt" (not halved) or "lagt" (seqzoo/nn/hippo.py).
        learn: 0 = A and B stay, 1 = the features of the layer share trained ones, 2 = each has its
            own; trained ones are seven vectors (hippo.Transition).
        n_outputs: outputs per feature (m).
        dt_min, dt_max: step sizes at the start lie between them,
        dt_init: "random" = log-uniform, "uniform" = at equal distances of their logarithms.
        dt_learn: whether step sizes are trained; None = where A is.
        bias: whether there is an E; it starts at 0.
        activation: "gelu" (the exact one), "relu", "silu" or "identity".
        transition_lr: peak learning rate of A and B, in place of the optimizer's.
        dt_lr: the same of step sizes; neither decays.
        resample: step sizes are multiplied by it: 2 reads a signal at half the rate it was trained
            at.
        resample_legacy: Bbar keeps the step sizes that were trained, as in the source.
        conv: how whole sequences are convolved: "long" = pallas_kernels.long_conv; "chunk" = chunks
            of about n tokens by matrix products with the state in between, for small n.
        implementation: which implementation of long_conv ("xla", ...); None = the best.
        dtype: what to compute in; parameters, kernel and state are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear
    State-Space Layers" (arXiv 2110.13985); `lssl.py` and `transition.py` of state-spaces/s4.

    Differs from source: dropout stands on what the layer gives (model.dropout), not between
    activation and W; b starts at 0; `resample` is any number and applies to Bbar too; documents can
    be packed and streamed. A trained A is not kept stable: `rho` in the log is a bound of its
    spectral radius, and an update whose kernel is not finite is skipped.
    """

    causality = "fft"

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        measure: str = "legs",
        learn: int = 1,
        n_outputs: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_learn: bool | None = None,
        bias: bool = False,
        activation: str = "gelu",
        transition_lr: float = 1e-4,
        dt_lr: float = 1e-3,
        resample: float = 1.0,
        resample_legacy: bool = False,
        conv: str = "long",
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, d_model=d_model, d_state=d_state, n_outputs=n_outputs)
        at_least(0, transition_lr=transition_lr, dt_lr=dt_lr)
        check_step_sizes(dt_min, dt_max, dt_init)
        check_activation(activation)
        if measure not in hippo.MEASURES:
            raise ValueError(f"measure is {measure!r}; allowed: {', '.join(hippo.MEASURES)}")
        if learn not in (0, 1, 2):
            raise ValueError(f"learn is {learn}; allowed: 0 (fixed), 1 (shared), 2 (per feature)")
        if conv not in ("long", "chunk"):
            raise ValueError(f"conv is {conv!r}; allowed: long, chunk")
        if not resample > 0:
            raise ValueError(f"resample is {resample}; it must be above 0")
        self.d_model, self.d_state, self.n_outputs = d_model, d_state, n_outputs
        self.measure, self.learn, self.activation = measure, learn, activation
        self.dt_learn = learn > 0 if dt_learn is None else dt_learn
        self.resample, self.resample_legacy = float(resample), resample_legacy
        self.conv, self.implementation, self.dtype = conv, implementation, str(jnp.dtype(dtype))

        e, m, n = d_model, n_outputs, d_state
        steps = log_step_sizes(rngs.params(), e, dt_min, dt_max, dt_init)
        dt_lr = dt_lr if self.dt_learn else 0.0
        self.log_dt = param(steps, axes=("inner",), decay=False, lr=dt_lr)
        draw = lambda *shape: jax.random.normal(rngs.params(), shape)
        self.C = param(draw(e, m, n), axes=("inner", None, "state"))
        self.D = param(draw(e, m), axes=("inner", None), decay=False)
        if bias:
            self.E = param(jnp.zeros((e, m)), axes=("inner", None), decay=False)
        self.has_bias = bias
        if learn:
            each = (e,) * (learn == 2)
            vectors = hippo.transition(measure, n, draw(*each, n))
            vectors = [jnp.broadcast_to(v, (*each, v.shape[-1])) for v in vectors]
            axes = ("inner", None)[-vectors[0].ndim :]
            self.transition = nnx.Dict(
                {
                    name: param(v, axes=axes, decay=False, lr=transition_lr)
                    for name, v in zip(hippo.Transition._fields, vectors, strict=True)
                }
            )
        self.out_proj = linear(
            e * m,
            d_model,
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
        state: LSSLState | None = None,
    ) -> tuple[jax.Array, LSSLState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding (never inside a
                document); None = one document (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, LSSLState)
        if not x.size:  # nothing to read
            state = self.init_state(x.shape[0]) if state is None else state
            return x.astype(self.dtype), state
        C, t = self._wide(self.C), x.shape[1]
        respond = functools.partial(krylov.respond, length=t)
        y, after, last_id = stream(
            x.astype(self.dtype),
            functools.partial(self._convolve, segment_ids=segment_ids),
            respond=lambda before: self._per_feature(respond, C, before),
            absorb=lambda u, count, before: self._per_feature(
                lambda step, u, before: krylov.absorb(step, u, count, before), u, before
            ),
            state=state,
            segment_ids=segment_ids,
        )
        out = self._project(y)
        if segment_ids is not None:  # its bias would show at padding
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        return out, LSSLState(after, last_id)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LSSLState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        x = jnp.zeros((batch_size, self.d_model, self.d_state), self._sums)
        return LSSLState(x, jnp.zeros((batch_size,), jnp.int32))

    def step(self, x_t: jax.Array, state: LSSLState) -> tuple[jax.Array, LSSLState]:
        """One token `[b d]`: returns `[b d]` and the state after it.

        Discretising costs far more than the rest: `prepared()` does it once for many steps.
        """
        check_call(x_t[:, None], None, state, LSSLState)
        if hasattr(self, "discrete"):
            A, B = (part[...] for part in self.discrete)
        else:
            A, B = self._per_feature(lambda step: step)
        u = x_t.astype(self.dtype).astype(self._sums)
        x = einsum("enk,bek->ben", A, state.x) + B * u[..., None]
        y = einsum("emn,ben->bem", self._wide(self.C), x) + self._wide(self.D) * u[..., None]
        if self.has_bias:
            y += self._wide(self.E)
        y = jax.lax.collapse(y, 1).astype(self.dtype)
        return self._project(y), LSSLState(x, state.last_id)

    def prepared(self) -> "LSSL":
        """This mixer with Abar and Bbar computed, for many steps with the same parameters."""
        ready = copy.copy(self)
        ready.discrete = nnx.List([Prepared(part) for part in self._per_feature(lambda step: step)])
        return ready

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

    def _project(self, y: jax.Array) -> jax.Array:
        return self.out_proj(activate(self.activation, y))

    def _convolve(self, u: jax.Array, place: Carried, segment_ids) -> jax.Array:
        """See `stream`; whether the powers of Abar are sound is reported."""
        skip, bias = self._wide(self.D), self._wide(self.E) if self.has_bias else None
        by_kernel = functools.partial(with_kernel, implementation=self.implementation)
        if self.conv == "chunk":

            def way(u, skip, bias, segment_ids):
                if segment_ids is None:
                    return self._scan(u, skip, bias)
                kernel, *told = self._kernel(u.shape[1])
                return by_kernel(u, kernel, skip, bias, segment_ids), *told

            y, growth, finite = by_documents(way, place, segment_ids, u, skip, bias)
        else:
            kernel, growth, finite = self._kernel(u.shape[1])
            y = by_documents(by_kernel, place, segment_ids, u, kernel, skip, bias)
        report(self, "rho", growth)
        skip_update(self, "kernel_not_finite", ~finite)
        return y

    def _kernel(self, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[e m length]`; a bound of the spectral radius, and whether all is finite."""
        make = functools.partial(krylov.kernel, length=length)
        kernel, growth = self._per_feature(make, self._wide(self.C))
        return kernel, jnp.max(growth), jnp.all(jnp.isfinite(kernel))

    def _scan(self, u, skip, bias) -> tuple[jax.Array, jax.Array, jax.Array]:
        """y of one document per row `[b t e*m]`, and the same."""
        b, t, _ = u.shape
        wide = u.astype(self._sums)
        inputs = jnp.transpose(wide, (2, 0, 1))
        y, growth = self._per_feature(krylov.scan, self._wide(self.C), inputs)  # [e b t m]
        y = jnp.transpose(y, (1, 2, 0, 3)) + skip * wide[..., None]
        y = y if bias is None else y + bias
        return y.reshape(b, t, -1).astype(u.dtype), jnp.max(growth), jnp.all(jnp.isfinite(growth))

    def _per_feature(self, function: Callable, *arrays: jax.Array) -> Any:
        """function(step, *arrays) for all features, block by block; arrays are `[e ...]`."""
        log_dt = self._wide(self.log_dt)
        dt = jnp.exp(log_dt if self.dt_learn else jax.lax.stop_gradient(log_dt))
        if self.learn:
            fields = hippo.Transition._fields
            vectors = hippo.Transition(*(self._wide(self.transition[name]) for name in fields))
            shared = hippo.matrices(vectors) if self.learn == 1 else None
            own = vectors if self.learn == 2 else None
        else:
            made = hippo.MEASURES[self.measure](self.d_state)
            shared, own = tuple(jnp.asarray(a, self._sums) for a in made), None

        def block(dt, own, *arrays):
            A, B = shared if own is None else hippo.matrices(own)
            step = krylov.bilinear(A, B, dt * self.resample)
            if self.resample_legacy and self.resample != 1:
                step = step._replace(B=krylov.bilinear(A, B, dt).B)
            return function(step, *arrays)

        return krylov.in_blocks(block, (dt, own, *arrays), self.d_state)
