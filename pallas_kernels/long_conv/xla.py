"""long_conv for any device that XLA compiles for; README.md has the maths."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.core.segments import boundaries
from pallas_kernels.long_conv import direct, dyadic, fft
from pallas_kernels.long_conv.convolution import Way, convolve
from pallas_kernels.long_conv.monarch import Monarch

FEW = 16  # outputs or lags: no transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the convolution is computed.

    Attributes:
        form: "fft"; "monarch": the transforms as matrix products; "direct": products with Toeplitz
            matrices, where a later token moves no earlier output by a bit; "auto": direct for few
            outputs or lags, else fft.
        stages: of the Monarch form: matrix products each way; None = 2, for long sequences 3.
        operands: of the Monarch form: "bfloat16" multiplies rounded numbers, as matrix units like
            it (sums stay float32; outputs are off by about 4e-3); None = full precision.
    """

    form: str = "auto"
    stages: int | None = None
    operands: str | None = None

    def __post_init__(self):
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {allowed}")
        if self.form != "monarch" and (self.stages or self.operands):
            raise ValueError(
                f"stages and operands belong to form='monarch'; form is '{self.form}': leave them "
                "out or choose that form"
            )

    def way(self, s: int, count: int, t: int) -> Way:
        """For so many inputs, lags and outputs."""
        if self.form == "direct" or (self.form == "auto" and min(t, count) <= FEW):
            return direct
        return Monarch(self.stages, self.operands) if self.form == "monarch" else fft


_ALLOWED = {
    "form": ("auto", "direct", "fft", "monarch"),
    "stages": (None, 1, 2, 3, 4),
    "operands": (None, "bfloat16"),
}


class Inputs(NamedTuple):
    """What a call is given, as `long_conv` names it; before `[b l-1 e]` or None."""

    u: jax.Array
    kernel: jax.Array
    skip: jax.Array | None
    reverse_kernel: jax.Array | None
    bias: jax.Array | None
    pre_gate: jax.Array | None
    post_gate: jax.Array | None
    before: jax.Array | None


class Plan(NamedTuple):
    """Where the documents lie; None = one document.

    Attributes:
        valid: where there is a token, `[b t]`.
        document: int32 `[b t]`, 0 = the one that the state is of, then 1, 2, ...; padding bears the
            number of the document before it.
        leading: int32 `[b]`, place of the first token, t if there is none.
    """

    valid: jax.Array
    document: jax.Array
    leading: jax.Array


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(
    u,
    kernel,
    skip,
    reverse_kernel,
    bias,
    pre_gate,
    post_gate,
    before,
    last_id,
    segment_ids,
    *,
    config,
):
    """See `long_conv`; before `[b l-1 e]` in the dtype to compute in, or None; gives y, before,
    last_id."""
    inputs = Inputs(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate, before)
    plan = None
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
        t = u.shape[1]
        leading = jnp.min(jnp.where(valid, jnp.arange(t, dtype=jnp.int32), t), axis=1)
        plan = Plan(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), leading)
    y = _whole(XlaConfig.of(config, {}), inputs, plan)
    if reverse_kernel is not None:
        return y, None, None
    return y, _last_inputs(inputs, plan), last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(config, inputs: Inputs, plan: Plan | None):
    """y; keeps nothing but what it was given, and does everything else again backward."""
    return _output(config, inputs, plan)


def _whole_forward(config, inputs, plan):
    return _output(config, inputs, plan), (inputs, plan)


def _whole_backward(config, residuals, dy):
    inputs, plan = residuals
    _, pull = jax.vjp(lambda inputs: _output(config, inputs, plan), inputs)
    return *pull(dy), None


_whole.defvjp(_whole_forward, _whole_backward)


def _output(config, inputs, plan):
    dtype = state_dtype(*inputs)
    v = _gated(inputs, plan)
    z = _convolution(config, v, inputs, plan)
    if inputs.skip is not None:
        z = z + inputs.skip.astype(dtype) * v
    if inputs.bias is not None:
        z = z + inputs.bias.astype(dtype)
    if inputs.post_gate is not None:
        z = z * _tokens(inputs.post_gate, plan).astype(dtype)
    return _tokens(z, plan).astype(inputs.u.dtype)


def _tokens(x, plan):
    """0 where there is no token, whatever stands there."""
    return x if plan is None else jnp.where(plan.valid[..., None], x, 0)


def _gated(inputs, plan):
    dtype = state_dtype(*inputs)
    v = _tokens(inputs.u, plan).astype(dtype)
    if inputs.pre_gate is None:
        return v
    return v * _tokens(inputs.pre_gate, plan).astype(dtype)


def _convolution(config, v, inputs, plan):
    t, before = v.shape[1], inputs.before
    kernel = inputs.kernel.astype(v.dtype).T  # [l e]
    reach = kernel.shape[0] - 1
    reverse = inputs.reverse_kernel
    reverse = None if reverse is None else reverse.astype(v.dtype).T[: t - 1]
    if plan is not None:
        z = dyadic.packed(config.way, v, kernel[:t], reverse, plan.document)
        return z if before is None or reach == 0 else z + _from_state(config, kernel, before, plan)
    if before is not None:
        v = jnp.concatenate([before, v], axis=1)
        return convolve(config.way(t + reach, reach + 1, t), v, kernel, -reach, t)
    lags, ahead = kernel[:t], 0
    if reverse is not None:
        lags, ahead = jnp.concatenate([jnp.flip(reverse, axis=0), lags]), reverse.shape[0]
    return convolve(config.way(t, lags.shape[0], t), v, lags, -ahead, t)


def _from_state(config, kernel, before, plan):
    """What the inputs before this call give to its first document, wherever that begins."""
    t, reach = plan.valid.shape[1], before.shape[1]
    reached = min(t, reach)
    way = config.way(reach, reach, reached)
    z = convolve(way, before, kernel[1:], 1 - reach, reached)
    z = jnp.pad(z, ((0, 0), (t, t - reached), (0, 0)))
    z = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, t, 0))(z, t - plan.leading)
    return jnp.where((plan.document == 0)[..., None], z, 0)


def _last_inputs(inputs, plan):
    """The last l-1 gated inputs of the last document, zeros before its start."""
    v, before = _gated(inputs, plan), inputs.before
    (b, t, e), keep = v.shape, inputs.kernel.shape[1] - 1
    if before is None:
        before = jnp.zeros((b, keep, e), v.dtype)
    if plan is None:
        return jnp.concatenate([before, v], axis=1)[:, t:]
    # The inputs before this call go right before the first token: padding takes no place.
    padded = jnp.pad(v, ((0, 0), (keep, 0), (0, 0)))
    padded = jax.vmap(lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0))(
        padded, before, plan.leading
    )
    places = jnp.arange(t, dtype=jnp.int32)
    end = jnp.max(jnp.where(plan.valid, places, -1), axis=1)
    end = jnp.where(end < 0, t - 1, end)  # nothing but padding: the state as it was
    after = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, keep, 0))(
        padded, end + 1
    )
    # Of earlier documents there is nothing: they end where the number changes.
    same = plan.document == plan.document[:, -1:]
    start = jnp.where(plan.document[:, -1] == 0, -keep - 1, jnp.argmax(same, axis=1))
    reached = end[:, None] + 1 - keep + jnp.arange(keep) >= start[:, None]
    return jnp.where(reached[..., None], after, 0)
