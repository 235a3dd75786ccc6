"""A traced function of matrices as a list of operations, for tpu_plan.py to cut into stages."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_SAME = ("copy", "copy_p", "optimization_barrier", "stop_gradient", "pvary")

Key = tuple[int, int, str]  # rows, columns, dtype


class Node(NamedTuple):
    """One operation; inputs are numbers of values, or constants in a list of one."""

    primitive: Any
    params: dict
    inputs: tuple
    output: int

    @property
    def name(self) -> str:
        return self.primitive if isinstance(self.primitive, str) else self.primitive.name


class Trace:
    """The operations of a jaxpr, those of inner ones among them, each once."""

    def __init__(self):
        self.shapes: dict[int, Key] = {}
        self.nodes: list[Node] = []
        self.known: dict[Any, int] = {}

    def new(self, of: Any, shape: tuple[int, ...] | None = None) -> int:
        number = len(self.shapes)
        shape = tuple(of.aval.shape) if shape is None else shape
        assert len(shape) == 2, f"{shape} is no matrix"
        self.shapes[number] = (*shape, str(of.aval.dtype))
        return number

    def walk(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

        def value(v):
            return [v.val] if hasattr(v, "val") else values[v]

        for equation in jaxpr.eqns:
            given = [value(v) for v in equation.invars]
            inner = next((equation.params[x] for x in _CALLS if x in equation.params), None)
            if inner is not None:
                found = self.walk(inner.jaxpr, inner.consts, given)
            elif equation.primitive.name in _SAME:
                found = given
            else:
                found = [self.one(equation, given)]
            values.update(zip(equation.outvars, found, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def one(self, equation: Any, given: list) -> Any:
        name, params, (out,) = equation.primitive.name, equation.params, equation.outvars
        shape = tuple(out.aval.shape)
        if given and not shape and all(isinstance(x, list) for x in given):
            with jax.ensure_compile_time_eval():
                x = equation.primitive.bind(*(x[0] for x in given), **bound(equation))
            return [np.asarray(x)[()]]
        if name in ("reduce_sum", "reduce_max"):  # axes stay, of length 1
            before = self.shapes[given[0]][:2]
            rank = len(equation.invars[0].aval.shape)
            axes = params["axes"] if rank == 2 else tuple(i for i in (0, 1) if before[i] > 1)
            shape = tuple(1 if i in axes else n for i, n in enumerate(before))
            if shape == before:
                return given[0]
            return self.node(name, dict(axes=axes), given, out, shape)
        if name in ("broadcast_in_dim", "reshape", "squeeze"):
            if len(shape) < 2 and not isinstance(given[0], list):
                shape = self.shapes[given[0]][:2]
            if not isinstance(given[0], list) and self.shapes[given[0]][:2] == shape:
                return given[0]
            if len(shape) < 2:
                return given[0]
            return self.node("spread", {}, given, out, shape)
        if len(shape) < 2:  # a sum of all, or over one axis
            kinds = [self.shapes[x][:2] for x in given if not isinstance(x, list)]
            shape = max(kinds, default=(1, 1), key=math.prod)
        return self.node(equation.primitive, params, given, out, shape)

    def node(self, primitive: Any, params: dict, given: list, out: Any, shape: tuple) -> int:
        key = (
            str(primitive),
            repr(sorted((k, str(v)) for k, v in params.items())),
            tuple(f"{x[0]!r}" if isinstance(x, list) else x for x in given),
            shape,
            str(out.aval.dtype),
        )
        if key not in self.known:
            self.known[key] = self.new(out, shape)
            self.nodes.append(Node(primitive, params, tuple(given), self.known[key]))
        return self.known[key]

    def used(self, outputs: tuple) -> list[Node]:
        wanted = {x for x in outputs if not isinstance(x, list)}
        kept = []
        for node in reversed(self.nodes):
            if node.output in wanted:
                kept.append(node)
                wanted.update(x for x in node.inputs if not isinstance(x, list))
        return kept[::-1]


def bound(of: Any) -> dict:
    """The parameters of an equation or a node, as its primitive is called with."""
    return of.primitive.get_bind_params(of.params)
