"""long_conv for any device that XLA compiles for; README.md has the maths."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.config import Config
from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.long_conv import direct, documents, dyadic, fft
from pallas_kernels.long_conv.convolution import Way, convolve
from pallas_kernels.long_conv.documents import Plan, last_inputs, tokens
from pallas_kernels.long_conv.monarch import Monarch

FEW = 16  # outputs: a product with the history is less work than its transform
SHORT = 64  # a transform of this length is one product with a matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the convolution is computed.

    Attributes:
        form: "fft"; "monarch": the transforms as matrix products; "direct": products with Toeplitz
            matrices, where a later token moves no earlier output by a bit; "auto": direct for few
            outputs, monarch for what is short altogether, else fft.
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
        if self.form == "monarch":
            return Monarch(self.stages, self.operands)
        if self.form == "auto":
            if t > 1 and s + count <= SHORT:
                return Monarch(stages=1)
            return direct if t <= FEW else fft
        return direct if self.form == "direct" else fft


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
        plan, last_id = documents.plan(segment_ids, last_id)
    y, after = _whole(XlaConfig.of(config, {}), inputs, plan)
    return y, after, None if after is None else last_id


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(config, inputs: Inputs, plan: Plan | None):
    """y and the last inputs; keeps what it was given, and does everything else again backward."""
    return _results(config, inputs, plan)


def _whole_forward(config, inputs, plan):
    return _results(config, inputs, plan), (inputs, plan)


def _whole_backward(config, residuals, cotangents):
    inputs, plan = residuals
    _, pull = jax.vjp(lambda inputs: _results(config, inputs, plan), inputs)
    return *pull(cotangents), None


_whole.defvjp(_whole_forward, _whole_backward)


def _results(config, inputs, plan):
    dtype = state_dtype(*inputs)
    v = tokens(inputs.u, plan).astype(dtype)
    if inputs.pre_gate is not None:
        v = v * tokens(inputs.pre_gate, plan).astype(dtype)
    z = _convolution(config, v, inputs, plan)
    if inputs.skip is not None:
        z = z + inputs.skip.astype(dtype) * v
    if inputs.bias is not None:
        z = z + inputs.bias.astype(dtype)
    if inputs.post_gate is not None:
        z = z * tokens(inputs.post_gate, plan).astype(dtype)
    y = tokens(z, plan).astype(inputs.u.dtype)
    if inputs.reverse_kernel is not None:
        return y, None
    return y, last_inputs(v, inputs.before, plan, inputs.kernel.shape[1] - 1)


def _convolution(config, v, inputs, plan):
    t, before = v.shape[1], inputs.before
    kernel = inputs.kernel.astype(v.dtype).T  # [l e]
    reach = kernel.shape[0] - 1
    reverse = inputs.reverse_kernel
    reverse = None if reverse is None else reverse.astype(v.dtype).T[: t - 1]
    if plan is not None:
        # Where no row holds two documents, padding is all there is: nothing needs a mask.
        several = jnp.any(plan.document > 0)
        packed = functools.partial(dyadic.packed, config.way, document=plan.document)
        alone = functools.partial(_one_document, config)
        z = jax.lax.cond(several, packed, alone, v, kernel[:t], reverse)
        return z if before is None or reach == 0 else z + _from_state(config, kernel, before, plan)
    if before is not None:
        v = jnp.concatenate([before, v], axis=1)
        return convolve(config.way(t + reach, reach + 1, t), v, kernel, -reach, t)
    return _one_document(config, v, kernel[:t], reverse)


def _one_document(config, v, kernel, reverse):
    t, lags, ahead = v.shape[1], kernel, 0
    if reverse is not None:
        lags, ahead = jnp.concatenate([jnp.flip(reverse, axis=0), kernel]), reverse.shape[0]
    return convolve(config.way(t, lags.shape[0], t), v, lags, -ahead, t)


def _from_state(config, kernel, before, plan):
    """What the inputs before this call give to its first document, wherever that begins."""
    t, reach = plan.valid.shape[1], before.shape[1]
    reached = min(t, reach)
    way = config.way(reach, reach, reached)
    return documents.first(convolve(way, before, kernel[1:], 1 - reach, reached), plan)
