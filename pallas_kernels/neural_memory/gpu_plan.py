"""A traced function of tiles as a list of steps (gpu_planner.py says which)."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.neural_memory.gpu_planner import Plan, Planner, Room
from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.tpu_trace import Node, Trace

__all__ = ["Plan", "Room", "plan"]


def plan(function: Callable, ready: Any, overwrites: Any, room: Room, *arguments: Any) -> Plan:
    """Plans a function of trees of float32 tiles and vectors.

    Args:
        function: what it gives is a tree of such.
        ready: per leaf of the arguments, whether it lies in memory as products want it.
        overwrites: per leaf of what the function gives, the number of the input whose place it
            takes (after that was read last), or None.
        room: there is.
        *arguments: trees of ShapeDtypeStructs.
    """
    leaves, tree = jax.tree.flatten(arguments)
    closed = jax.make_jaxpr(lambda *x: function(*jax.tree.unflatten(tree, x)))(*leaves)
    trace = _Trace()
    inputs = [trace.new(x) for x in closed.jaxpr.invars]
    trace.inputs = len(inputs)
    outputs = tuple(trace.walk(closed.jaxpr, closed.consts, inputs))
    nodes = trace.used(outputs)
    free: dict[int, Node] = {}
    constant: set[int] = set()
    for node in nodes:
        if all(isinstance(x, list) or x in constant for x in node.inputs):
            constant.add(node.output)
        # Truth values have no place in memory, a vector along the other axis is one instruction.
        if node.output in constant or node.name == "spread" or _is_bool(node, trace.shapes):
            free[node.output] = node
    nodes = [n for n in nodes if n.output not in free]
    nodes, outputs = _again(trace, nodes, free, outputs, room.near)
    return Planner(trace.shapes, free, nodes, outputs, ready, overwrites, room).run()


class _Trace(Trace):
    inputs = 0

    def again(self, x: int) -> int:
        """A number for one more copy of a value."""
        number = len(self.shapes)
        self.shapes[number] = self.shapes[x]
        return number


def _is_bool(node: Node, shapes: dict) -> bool:
    return shapes[node.output][2] == "bool"


def _again(trace: _Trace, nodes: list[Node], free: dict[int, Node], outputs: tuple, near: int):
    """The nodes with element-wise tiles computed where they are wanted, again and again, unless
    they take the place of what nobody else wants."""
    shapes = trace.shapes
    is_tile = lambda x: shapes[x][:2] == (SIZE, SIZE)

    def needs(node):
        for x in node.inputs:
            if not isinstance(x, list):
                yield from needs(free[x]) if x in free else (x,)

    uses: dict[int, int] = {}
    for node in nodes:
        for x in set(needs(node)):
            uses[x] = uses.get(x, 0) + 1
    for x in outputs:
        uses[x] = uses.get(x, 0) + 1
    lazy: dict[int, Node] = {}
    for node in nodes:
        alone = any(
            is_tile(x) and uses[x] == 1 and x not in lazy and x >= trace.inputs for x in needs(node)
        )
        whole = node.name in ("dot_general", "reduce_sum", "across")
        if not whole and is_tile(node.output) and not alone:
            lazy[node.output] = node
    found: list[Node] = []
    now = 0
    made: dict[int, tuple[int, int]] = {}  # the copy of a lazy value, and when it was made

    def copy(x):
        if isinstance(x, list):
            return x
        if x in free:
            inputs = tuple(map(copy, free[x].inputs))
            if inputs == free[x].inputs:
                return x
            new = trace.again(x)
            free[new] = free[x]._replace(inputs=inputs, output=new)
            return new
        if x not in lazy:
            return x
        if x in made and now - made[x][1] <= near:
            return made[x][0]
        inputs = tuple(map(copy, lazy[x].inputs))
        new = trace.again(x) if x in made else x
        found.append(lazy[x]._replace(inputs=inputs, output=new))
        made[x] = (new, now)
        return new

    for node in nodes:
        if node.output in lazy:
            continue
        inputs = tuple(map(copy, node.inputs))
        found.append(node._replace(inputs=inputs))
        now += 1
    return found, tuple(map(copy, outputs))
