"""Runs a function of matrices in a kernel from memory to memory, a few rows at a time.

A body that computes with whole matrices keeps dozens of them alive at once, of which a register
file holds three: the compiler then writes and reads what it has no registers for, at places of its
own. Here the traced function is cut into stages: a matrix product, a sum over rows, or all
element-wise operations between such, which go over the rows a few at a time. What a later stage
needs has a place in scratch memory until it was read last.

Only for functions of two-dimensional arrays, of which each axis is summed as a whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES

_REGISTERS = 40  # of 64 for what is alive in a stage
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_WHOLE = ("dot_general", "roll", "slice", "concatenate")
_SAME = ("copy", "copy_p", "optimization_barrier", "stop_gradient", "pvary")

Key = tuple[int, int, str]  # of a place: rows, columns, dtype


@dataclasses.dataclass(frozen=True)
class View:
    """A matrix in memory: `ref[at]` of a reference, or of it a row if `at` chooses it."""

    ref: Any
    at: tuple = ()

    def load(self, rows: Any = slice(None)) -> jax.Array:
        return self.ref[self._place(rows)]

    def store(self, x: jax.Array, rows: Any = slice(None)) -> None:
        self.ref[self._place(rows)] = x.astype(self.ref.dtype)

    def _place(self, rows: Any) -> tuple:
        chosen = len(self.at) == len(self.ref.shape) - 1
        return (*self.at, slice(None)) if chosen else (*self.at, rows, slice(None))


class Node(NamedTuple):
    """One operation; inputs are numbers of values, or constants in a list of one."""

    primitive: Any
    params: dict
    inputs: tuple
    output: int

    @property
    def name(self) -> str:
        return self.primitive if isinstance(self.primitive, str) else self.primitive.name


class Plan(NamedTuple):
    """Stages in order, and where values lie.

    Attributes:
        shapes: `(rows, columns, dtype)` of each value; the first ones are the inputs.
        stages: per stage its nodes and the values that others want of it.
        free: nodes by value that are computed wherever they are wanted.
        places: key and number of the place of each value that has one.
        outputs: values, or constants in a list of one.
    """

    shapes: dict[int, Key]
    stages: tuple[tuple[tuple[Node, ...], tuple[int, ...]], ...]
    free: dict[int, Node]
    places: dict[int, tuple[Key, int]]
    outputs: tuple

    @property
    def counts(self) -> dict[Key, int]:
        """How many places of each kind there must be."""
        found: dict[Key, int] = {}
        for key, number in self.places.values():
            found[key] = max(found.get(key, 0), number + 1)
        return found


def scratch(*plans: Plan) -> dict[Key, Any]:
    """Scratch memory that each of the plans can run in."""
    counts: dict[Key, int] = {}
    for plan in plans:
        for key, count in plan.counts.items():
            counts[key] = max(counts.get(key, 0), count)
    return {key: pltpu.VMEM((count, *key[:2]), key[2]) for key, count in sorted(counts.items())}


def scratch_bytes(*plans: Plan) -> int:
    """What that takes, registers being padded."""
    return sum(
        ref.shape[0] * -(-ref.shape[1] // 16) * 16 * -(-ref.shape[2] // 128) * 128
        * jnp.dtype(ref.dtype).itemsize
        for ref in scratch(*plans).values()
    )  # fmt: skip


def run(plan: Plan, inputs: Any, places: dict[Key, Any], outputs: Any) -> None:
    """Runs it in a body: from inputs to outputs, trees of views, which may lie where inputs do."""
    held = dict(enumerate(jax.tree.leaves(inputs)))
    for value, (key, number) in plan.places.items():
        held[value] = View(places[key], (number,))
    for nodes, wanted in plan.stages:
        if not all(_by_rows(node, plan.shapes) for node in nodes):
            _turn(plan, held, nodes, wanted, None, None)
            continue
        rows = plan.shapes[nodes[0].output][0]
        height = _height(plan, nodes, rows)
        _over_rows(functools.partial(_turn, plan, held, nodes, wanted, height), height, rows)
    for view, value in zip(jax.tree.leaves(outputs), plan.outputs, strict=True):
        if isinstance(value, list):
            view.store(jnp.full(view.load().shape, value[0], view.ref.dtype))
        elif value in plan.free:
            view.store(_turn(plan, held, (plan.free[value],), (), None, None)[value])
        else:
            view.store(held[value].load())


def _over_rows(turn: Callable, height: int, rows: int) -> None:
    if rows == height:
        turn(0)
        return

    def step(i, _):
        turn(i * height)
        return 0

    jax.lax.fori_loop(0, rows // height, step, 0)


def _height(plan: Plan, nodes: Sequence[Node], rows: int) -> int:
    """As many rows at a time as registers hold of what is alive at once."""
    last: dict[int, int] = {}
    for number, node in enumerate(nodes):
        last.update({x: number for x in node.inputs if not isinstance(x, list)})
    width = lambda x: -(-plan.shapes[x][1] // LANES) * (plan.shapes[x][0] > 1)
    alive, most = set(), 1
    for number, node in enumerate(nodes):
        alive |= {node.output, *(x for x in node.inputs if not isinstance(x, list))}
        most = max(most, sum(map(width, alive)))
        alive = {x for x in alive if last.get(x, -1) > number}
    fit = [n for n in (64, 32) if rows % n == 0 and n // 8 * most <= _REGISTERS]
    return rows if rows % 8 else max(fit, default=16 if rows % 16 == 0 else 8)


def _turn(plan: Plan, held, nodes, wanted, height, first):
    """Runs a stage on some rows; height None = on all there are."""
    found: dict[int, jax.Array] = {}
    rows = slice(None)
    if height is not None:
        rows = pl.ds(first if isinstance(first, int) else pl.multiple_of(first, height), height)

    def value(x):
        if isinstance(x, list):
            return x[0]
        if x not in found:
            if x in plan.free:
                found[x] = compute(plan.free[x])
            else:
                one = plan.shapes[x][0] == 1
                found[x] = held[x].load(slice(None) if one else rows)
        return found[x]

    def compute(node: Node):
        count, columns, dtype = plan.shapes[node.output]
        shape = (count if height is None or count == 1 else height, columns)
        if node.name == "iota":
            x = jax.lax.broadcasted_iota(dtype, shape, node.params["dimension"])
            return x + first if height is not None and node.params["dimension"] == 0 else x
        operands = [value(x) for x in node.inputs]
        if node.name == "spread":
            if isinstance(node.inputs[0], list):
                return jnp.full(shape, operands[0], dtype)
            return jnp.broadcast_to(operands[0], shape)
        if node.name in ("reduce_sum", "reduce_max"):
            reduce = jnp.sum if node.name == "reduce_sum" else jnp.max
            return reduce(operands[0], axis=node.params["axes"], keepdims=True)
        return node.primitive.bind(*operands, **_bound(node))

    for node in nodes:
        found[node.output] = compute(node)
    for x in wanted:
        held[x].store(found[x], rows)
    return found


def _bound(of: Any) -> dict:
    return of.primitive.get_bind_params(of.params)


# --- Planning -----------------------------------------------------------------------------------


def plan(function: Callable, *arguments: Any) -> Plan:
    """Cuts a function of trees of float32 matrices into stages.

    Args:
        function: what it gives is a tree of matrices.
        *arguments: trees of ShapeDtypeStructs or arrays of two axes.
    """
    structs = [jax.ShapeDtypeStruct(x.shape[-2:], x.dtype) for x in jax.tree.leaves(arguments)]
    tree = jax.tree.structure(arguments)
    closed = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*structs)
    trace = _Trace()
    inputs = [trace.new(x) for x in closed.jaxpr.invars]
    outputs = tuple(trace.walk(closed.jaxpr, closed.consts, inputs))
    nodes = trace.used(outputs)
    free: dict[int, Node] = {}
    for node in nodes:
        if _is_free(node, free, trace.shapes):
            free[node.output] = node
    stages = _stages([n for n in nodes if n.output not in free], free, trace.shapes, len(inputs))
    return _placed(trace.shapes, stages, free, outputs)


class _Trace:
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
                x = equation.primitive.bind(*(x[0] for x in given), **_bound(equation))
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


def _is_free(node: Node, free: dict[int, Node], shapes: dict[int, Key]) -> bool:
    """Made of indices and constants alone, or truth values, which have no place in memory."""
    made = all(isinstance(x, list) or x in free for x in node.inputs)
    return made or shapes[node.output][2] == "bool"


def _by_rows(node: Node, shapes: dict[int, Key]) -> bool:
    """Whether rows of the result need no other rows."""
    if node.name in _WHOLE or (node.name.startswith("reduce") and 0 in node.params["axes"]):
        return False
    return shapes[node.output][0] > 1


def _stages(nodes: list[Node], free: dict[int, Node], shapes: dict[int, Key], inputs: int):
    def needs(node: Node) -> set[int]:
        found = set()
        for x in node.inputs:
            if not isinstance(x, list):
                found |= needs(free[x]) if x in free else {x}
        return found

    wants = {node.output: needs(node) for node in nodes}
    done, stages = set(range(inputs)), []
    while nodes:
        stage: list[Node] = []
        alone = next(
            (n for n in nodes if not _by_rows(n, shapes) and wants[n.output] <= done), None
        )
        if alone is not None:
            stage = _sum_with(alone, nodes, wants, done)
        else:
            have, rows = set(done), 0
            for node in nodes:
                fits = _by_rows(node, shapes) and wants[node.output] <= have
                if fits and rows in (0, shapes[node.output][0]):
                    rows = shapes[node.output][0]
                    stage.append(node)
                    have.add(node.output)
        assert stage, [n.name for n in nodes]
        taken = {n.output for n in stage}
        nodes = [n for n in nodes if n.output not in taken]
        done |= taken
        stages.append((stage, set().union(*(wants[x] for x in taken)) - taken))
    return stages


def _sum_with(alone: Node, nodes: list[Node], wants: dict[int, set[int]], done: set) -> list[Node]:
    """A product and those that are added to it."""
    stage, by_output = [alone], {n.output: n for n in nodes}
    if alone.name != "dot_general":
        return stage
    have = {alone.output}
    for node in nodes:
        if node.name not in ("add", "add_any") or all(
            isinstance(x, list) or x not in have for x in node.inputs
        ):
            continue
        new = [x for x in node.inputs if isinstance(x, list) or x not in have]
        others = [None if isinstance(x, list) else by_output.get(x) for x in new]
        if all(n and n.name == "dot_general" and wants[n.output] <= done for n in others):
            stage += [*others, node]
            have |= {n.output for n in (*others, node)}
    return stage


def _placed(shapes, stages, free, outputs) -> Plan:
    last: dict[int, int] = {}
    for number, (_, needed) in enumerate(stages):
        last.update(dict.fromkeys(needed, number))

    def leaves(x):
        if x in free:
            for y in free[x].inputs:
                if not isinstance(y, list):
                    yield from leaves(y)
        else:
            yield x

    for x in outputs:
        if not isinstance(x, list):
            last.update(dict.fromkeys(leaves(x), len(stages)))
    places: dict[int, tuple[Key, int]] = {}
    empty: dict[Key, list[int]] = {}
    counts: dict[Key, int] = {}
    found = []
    for number, (stage, needed) in enumerate(stages):
        # What is read last here may be written over by rows, but not by a stage on whole matrices.
        wanted = tuple(n.output for n in stage if n.output in last)
        for x in wanted:
            key = shapes[x]
            if empty.get(key):
                places[x] = (key, empty[key].pop())
            else:
                places[x] = (key, counts.get(key, 0))
                counts[key] = places[x][1] + 1
        for x in needed:
            if last.get(x) == number and x in places:
                key, at = places[x]
                empty.setdefault(key, []).append(at)
        found.append((tuple(stage), wanted))
    return Plan(shapes, tuple(found), free, places, outputs)
