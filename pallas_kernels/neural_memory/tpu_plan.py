"""A traced function of matrices as stages, and where in memory lies what one wants of another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.neural_memory.tpu_trace import Key, Node, Trace

_WHOLE = ("dot_general", "roll", "slice", "concatenate")


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


def plan(function: Callable, *arguments: Any) -> Plan:
    """Cuts a function of trees of float32 matrices into stages.

    Args:
        function: what it gives is a tree of matrices.
        *arguments: trees of ShapeDtypeStructs or arrays of two axes.
    """
    structs = [jax.ShapeDtypeStruct(x.shape[-2:], x.dtype) for x in jax.tree.leaves(arguments)]
    tree = jax.tree.structure(arguments)
    closed = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*structs)
    trace = Trace()
    inputs = [trace.new(x) for x in closed.jaxpr.invars]
    outputs = tuple(trace.walk(closed.jaxpr, closed.consts, inputs))
    nodes = trace.used(outputs)
    free: dict[int, Node] = {}
    for node in nodes:
        if _is_free(node, free, trace.shapes):
            free[node.output] = node
    stages = _stages([n for n in nodes if n.output not in free], free, trace.shapes, len(inputs))
    return _placed(trace.shapes, stages, free, outputs)


def _is_free(node: Node, free: dict[int, Node], shapes: dict[int, Key]) -> bool:
    """Made of indices and constants alone, or truth values, which have no place in memory."""
    made = all(isinstance(x, list) or x in free for x in node.inputs)
    return made or shapes[node.output][2] == "bool"


def by_rows(node: Node, shapes: dict[int, Key]) -> bool:
    """Whether rows of the result need no other rows."""
    if node.name in _WHOLE or (node.name.startswith("reduce") and 0 in node.params["axes"]):
        return False
    return shapes[node.output][0] > 1


def _stages(nodes: list[Node], free: dict[int, Node], shapes: dict[int, Key], inputs: int):
    def needs(node: Node) -> set[int]:
        found: set[int] = set()
        for x in node.inputs:
            if not isinstance(x, list):
                found |= needs(free[x]) if x in free else {x}
        return found

    wants = {node.output: needs(node) for node in nodes}
    done, stages = set(range(inputs)), []
    while nodes:
        stage: list[Node] = []
        alone = next((n for n in nodes if not by_rows(n, shapes) and wants[n.output] <= done), None)
        if alone is not None:
            stage = _sum_with(alone, nodes, wants, done)
        else:
            have, rows = set(done), 0
            for node in nodes:
                fits = by_rows(node, shapes) and wants[node.output] <= have
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
        others = [by_output[x] for x in new if not isinstance(x, list) and x in by_output]
        ready = all(n.name == "dot_general" and wants[n.output] <= done for n in others)
        if ready and len(others) == len(new):
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
