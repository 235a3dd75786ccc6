"""Bytes that a program moves between memory and chip, counted from its traced jaxpr.

TPU kernels are counted by their BlockSpecs (core/blocks.py), GPU kernels by the copies in their
bodies (core/copies.py), what XLA does around them by a model of its fusion (core/passes.py).

Loop bodies count as often as they run, of branches the dearest, or the one of the platform that is
asked for; inside a shard_map, what one device moves. What nobody uses is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import blocks, copies
from pallas_kernels.core.blocks import Kernel
from pallas_kernels.core.passes import Node, Value, passes_bytes, used

_FREE = {
    *("reshape", "squeeze", "stop_gradient", "optimization_barrier", "sharding_constraint"),
    *("copy_p", "pvary", "reshard", "mesh_cast"),
}
_ALONE = {
    *("dot_general", "conv_general_dilated", "fft", "sort", "top_k", "triangular_solve"),
    *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "reduce_window_sum"),
    *("gather", "scatter", "scatter-add", "scatter_add", "dynamic_update_slice", "custom_call"),
    *("psum", "psum_invariant", "all_gather", "all_to_all", "ppermute", "reduce_scatter"),
}
_PARTS = {"slice", "dynamic_slice", "gather"}  # they read of their input what they give
_MOST_KNOWN = 2**20  # numbers of an integer array that is computed rather than traced


class Traffic(NamedTuple):
    """What a program moves.

    Attributes:
        kernels: its Pallas calls in order.
        around: bytes that XLA's own passes read and write.
    """

    kernels: tuple[Kernel, ...]
    around: float

    @property
    def by_kernels(self) -> float:
        return sum(one.bytes for one in self.kernels)

    @property
    def bytes(self) -> float:
        return self.by_kernels + self.around


def traffic(function: Callable, *arguments: Any, platform: str = "tpu") -> Traffic:
    """Counts a function.

    Args:
        function: traced, never run.
        *arguments: ShapeDtypeStructs, or arrays: of integer ones the numbers are taken (index maps
            may depend on them).
        platform: whose branch of jax.lax.platform_dependent counts.

    Raises:
        UnknownIndex: an index map reads numbers that the arguments do not give.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*arguments), *arguments, platform=platform)


def of_jaxpr(closed: Any, *arguments: Any, platform: str = "tpu") -> Traffic:
    """As `traffic`, of a jaxpr with the arguments that it was traced with, or none."""
    given = jax.tree.leaves(arguments) if arguments else [None] * len(closed.jaxpr.invars)
    values = [Value(v.aval, _numbers(x)) for v, x in zip(closed.jaxpr.invars, given, strict=True)]
    return _Scope(platform).count(closed, values)


def made_by_kernels(closed: Any, *, platform: str = "tpu") -> list[tuple[Any, bool]]:
    """For each result of a jaxpr what it is, by identity, and whether a kernel had a hand in it."""
    scope = _Scope(platform)
    results = scope.flatten(
        closed.jaxpr, closed.consts, [Value(v.aval) for v in closed.jaxpr.invars]
    )
    made: set[int] = set()
    for node in scope.nodes:
        if node.kernels or any(id(v) in made for v in node.inputs):
            made |= {id(v) for v in node.outputs}
    return [(v, id(v) in made) for v in results]


class _Scope:
    """The flat list of equations of a program, or of the body of a loop."""

    def __init__(self, platform: str):
        self.platform = platform
        self.nodes: list[Node] = []

    def count(self, closed: Any, arguments: Sequence[Value]) -> Traffic:
        results = self.flatten(closed.jaxpr, closed.consts, arguments)
        nodes = used(self.nodes, results)
        kernels = tuple(k for node in nodes for k in node.kernels)
        around = sum(node.around for node in nodes) + passes_bytes(nodes, results)
        return Traffic(kernels, around)

    def flatten(self, jaxpr: Any, consts: Sequence, arguments: Sequence[Value]) -> list[Value]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for v, x in zip(jaxpr.constvars, consts, strict=True):
            values[v] = Value(v.aval, _numbers(x))

        def value(v: Any) -> Value:
            if hasattr(v, "val"):
                return _literal(v.aval, np.asarray(v.val))
            return values[v]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [value(v) for v in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            count = params["grid_mapping"].num_index_operands
            kernel = blocks.of_call(equation, [v.known for v in inputs[:count]])
            return self._add(equation, "inner", inputs, kernels=(kernel,))
        if name == "mpmd_map":  # plgpu.kernel
            kernel = copies.of_call(equation)
            return self._add(equation, "inner", inputs, kernels=(kernel,))
        if name in ("scan", "while", "cond", "shard_map"):
            inner, times = self._inside(name, params, inputs)
            kernels = tuple(k._replace(times=k.times * times) for k in inner.kernels)
            around = times * inner.around
            return self._add(equation, "inner", inputs, kernels=kernels, around=around)
        # "call" is custom_vmap's.
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
            if key in params and not name.startswith("reduce"):
                inner = params[key]
                consts = getattr(inner, "consts", ())
                return self.flatten(getattr(inner, "jaxpr", inner), consts, inputs)
        if name == "platform_index":
            return [_literal(equation.outvars[0].aval)]
        if _is_free(equation) and all(v.known is None for v in inputs):  # else numbers change shape
            return inputs[: len(equation.outvars)]
        kind = "sum" if name.startswith(("reduce_", "arg")) else "fused"
        kind = "alone" if name in _ALONE else kind
        return self._add(equation, kind, inputs, part=name in _PARTS)

    def _add(self, equation: Any, kind: str, inputs: list[Value], **more: Any) -> list[Value]:
        known = _computed(equation, inputs) if kind != "inner" else None
        outputs = [Value(v.aval) for v in equation.outvars]
        for v, x in zip(outputs, known or (), strict=False):
            v.known = x
        self.nodes.append(Node(kind, tuple(inputs), tuple(outputs), **more))
        return outputs

    def _inside(self, name: str, params: dict, inputs: list[Value]) -> tuple[Traffic, int]:
        """What runs within an equation, counted once, and how often it runs."""
        if name == "cond":
            which = params.get("branches_platforms")
            branches, operands = params["branches"], inputs[1:]
            if which:
                mine = [i for i, p in enumerate(which) if p is None or self.platform in p]
                branches = [branches[mine[0]]]
            found = [self._apart(branch, operands) for branch in branches]
            return max(found, key=lambda one: one.bytes), 1
        if name == "while":  # how often it runs is not known: once
            skip = params["cond_nconsts"]
            return self._apart(params["body_jaxpr"], inputs[skip:]), 1
        if name == "scan":
            if "num_consts" in params:
                same = params["num_consts"]
            else:  # jax 0.11
                same = len(params["ft_in"].unpack()[0])
            return self._apart(params["jaxpr"], inputs[:same]), params["length"]
        return self._apart(params["jaxpr"], inputs), 1

    def _apart(self, inner: Any, known: Sequence[Value]) -> Traffic:
        """Counts a jaxpr for itself; arguments beyond `known` change from turn to turn."""
        jaxpr = getattr(inner, "jaxpr", inner)
        numbers = [v.known for v in known] + [None] * (len(jaxpr.invars) - len(known))
        values = []
        for v, x in zip(jaxpr.invars, numbers, strict=True):
            values.append(Value(v.aval, x if x is not None and x.shape == v.aval.shape else None))
        closed = inner if hasattr(inner, "consts") else _Closed(inner, ())
        return _Scope(self.platform).count(closed, values)


class _Closed(NamedTuple):
    jaxpr: Any
    consts: tuple


def _literal(aval: Any, x: np.ndarray | None = None) -> Value:
    """A constant of the program's text, which is read from nowhere."""
    value = Value(aval, _numbers(x))
    value.bytes = 0.0
    return value


def _is_free(equation: Any) -> bool:
    name, params = equation.primitive.name, equation.params
    if name in _FREE:
        return True
    if not equation.invars or not hasattr(equation.outvars[0].aval, "shape"):
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    if name == "broadcast_in_dim":
        return math.prod(before.shape) == math.prod(after.shape)
    if name == "convert_element_type":
        return before.dtype == after.dtype
    if name == "transpose":
        moved = [i for i in params["permutation"] if before.shape[i] != 1]
        return moved == sorted(moved)
    return False


def _computed(equation: Any, inputs: list[Value]) -> list[np.ndarray] | None:
    """The results of integer arithmetic on numbers that are known."""
    small = all(
        getattr(v.aval, "size", _MOST_KNOWN + 1) <= _MOST_KNOWN and _is_whole(v.aval.dtype)
        for v in equation.outvars
    )
    if not small or any(v.known is None for v in inputs):
        return None
    params = equation.primitive.get_bind_params(equation.params)
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*[v.known for v in inputs], **params)
    found = found if equation.primitive.multiple_results else [found]
    return [np.asarray(x) for x in found]


def _numbers(x: Any) -> np.ndarray | None:
    if isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer):
        return np.asarray(x) if _is_whole(x.dtype) and x.size <= _MOST_KNOWN else None
    return None


def _is_whole(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
