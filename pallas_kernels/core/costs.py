"""What a computation costs: operations, bytes, exponentials; and the least time it can take.

Two sources: each operator states its own minimum (`op.cost(...)`), and `count_flops` walks the
jaxpr of any function. XLA's own estimates are not used: they count a loop's body once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cost(NamedTuple):
    """Work of one call.

    Attributes:
        flops: floating-point operations, exponentials among them counted once.
        bytes: what has to move between memory and chip.
        transcendentals: exponentials, logarithms, ... (some devices are bound by them).
    """

    flops: float = 0.0
    bytes: float = 0.0
    transcendentals: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Cost":
        return Cost(*(a * factor for a in self))


class Device(NamedTuple):
    """What a device can do at best, dense.

    Attributes:
        flops: operations per second in bfloat16 on the matrix units.
        flops_f32: in float32 (TF32 on NVIDIA's).
        bandwidth: bytes per second to its memory.
        vector: operations per second in float32 outside the matrix units; None = not published.
        transcendentals: exponentials per second; None = not published.
    """

    flops: float
    flops_f32: float
    bandwidth: float
    vector: float | None = None
    transcendentals: float | None = None


# Vendors' data sheets, by jax's device_kind. NVIDIA's exponentials: 16 per clock and multiprocessor
# (132 at 1.755 GHz; the A100 108 at 1.41). A CPU is not here: bench.this_machine measures it.
DEVICES = {
    "NVIDIA H100 80GB HBM3": Device(989e12, 494e12, 3.35e12, 67e12, 3.7e12),
    "NVIDIA H200": Device(989e12, 494e12, 4.8e12, 67e12, 3.7e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 156e12, 2.04e12, 19.5e12, 2.4e12),
    "TPU v4": Device(275e12, 69e12, 1.23e12),
    "TPU v5 lite": Device(197e12, 49e12, 0.82e12),
    "TPU v5": Device(459e12, 115e12, 2.77e12),
    "TPU v6 lite": Device(918e12, 229e12, 1.64e12),
    "TPU7x": Device(2307e12, 577e12, 7.37e12),
}


def device(kind: str) -> Device | None:
    """The data sheet of a device kind; None for one that is not in the table (a CPU)."""
    return DEVICES.get(kind)


def roofline(
    cost: Cost, on: Device, *, dtype: str = "bfloat16", matrix_units: bool = True
) -> float:
    """Seconds that a device needs at least: the longest of what binds it.

    Args:
        cost: of the call.
        on: the device.
        dtype: of matrix products.
        matrix_units: whether the operations are matrix products; else (a scan, say) they are
            elementwise, and only the published rates count.
    """
    rate = on.flops if dtype == "bfloat16" else on.flops_f32
    rates = (
        (cost.bytes, on.bandwidth),
        (cost.flops, rate if matrix_units else on.vector),
        (cost.transcendentals, on.transcendentals),
    )
    return max(work / rate for work, rate in rates if rate is not None)


_TRANSCENDENTAL = {
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf"),
    *("erf_inv", "rsqrt", "sqrt", "cbrt", "pow", "atan2", "lgamma", "digamma"),
}
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "neg", "abs", "integer_pow", "square"),
    *("add_any", "rem", "sign", "floor", "ceil", "round", "select_n", "clamp"),
}
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"),
    *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
}


def count_flops(function: Callable, *arguments: Any, **keywords: Any) -> Cost:
    """Counts the operations of a function by walking its jaxpr; nothing is computed.

    Matrix products count 2 per multiply-add, Fourier transforms 5 n log2 n (real ones half of it),
    elementwise floating-point operations and reductions 1 per element; a loop's body as often as it
    runs, of branches the dearest. Bytes are those of the arguments and results.

    Args:
        function: any traceable function.
        *arguments: arrays or ShapeDtypeStructs, as for jax.eval_shape.
    """
    closed = jax.make_jaxpr(function)(*arguments, **keywords)
    moved = sum(_bytes(v.aval) for v in (*closed.jaxpr.invars, *closed.jaxpr.outvars))
    return _of_jaxpr(closed.jaxpr) + Cost(bytes=moved)


def _of_jaxpr(jaxpr: Any) -> Cost:
    total = Cost()
    for equation in jaxpr.eqns:
        total = total + _of_equation(equation)
    return total


def _of_equation(equation: Any) -> Cost:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (lhs_contract, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[i] for i in lhs_contract)
        return Cost(flops=2.0 * inner * _size(equation.outvars[0].aval))
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        per_output = kernel.size / out_features
        return Cost(flops=2.0 * per_output * _size(equation.outvars[0].aval))
    if name == "fft":  # 5 n log2 n for complex numbers, half of it where one side is real
        n = math.prod(params["fft_lengths"])
        sides = [v.aval for v in (*equation.invars, *equation.outvars)]
        real = [x for x in sides if not jnp.issubdtype(x.dtype, jnp.complexfloating)]
        one = (2.5 if real else 5.0) * n * math.log2(n)
        return Cost(flops=one * _size((real or sides)[0]) / n)
    if name == "scan":
        return _of_jaxpr(params["jaxpr"].jaxpr).times(params["length"])
    if name == "while":  # how often it runs is not known: once
        return _of_jaxpr(params["body_jaxpr"].jaxpr)
    if name == "cond":
        return max((_of_jaxpr(b.jaxpr) for b in params["branches"]), key=lambda c: c.flops)
    if name == "reduce":  # several sums at once
        return Cost(flops=sum(_size(v.aval) for v in equation.invars))
    inside = [_open(value) for value in _subjaxprs(name, params)]
    if inside:
        total = Cost()
        for jaxpr in inside:
            total = total + _of_jaxpr(jaxpr)
        return total.times(_times(name, params))
    if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars):
        return Cost()
    if name in _TRANSCENDENTAL:
        size = _size(equation.outvars[0].aval)
        return Cost(flops=size, transcendentals=size)
    if name in _ELEMENTWISE:
        return Cost(flops=_size(equation.outvars[0].aval))
    if name in _REDUCTIONS:
        return Cost(flops=_size(equation.invars[0].aval))
    return Cost()


def _subjaxprs(name: str, params: dict[str, Any]) -> list:
    """The jaxprs that an equation runs once (jit, custom_vjp, shard_map, checkpoint, ...)."""
    if name in ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call"):
        return [params.get("call_jaxpr") or params["fun_jaxpr"]]
    return [value for key, value in params.items() if key in ("jaxpr", "call_jaxpr")]


def _times(name: str, params: dict[str, Any]) -> float:
    """How often a jaxpr inside runs: shard_map's on every device, a kernel's in every program."""
    if name == "shard_map":
        return params["mesh"].size
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(aval: Any) -> float:
    return float(math.prod(aval.shape))


def _bytes(aval: Any) -> float:
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return _size(aval) * itemsize if hasattr(aval, "shape") else 0.0
