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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES
from pallas_kernels.neural_memory.tpu_plan import Plan, by_rows
from pallas_kernels.neural_memory.tpu_trace import Key, Node, bound

_REGISTERS = 40  # of 64 for what is alive in a stage


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


def scratch(*plans: Plan) -> dict[Key, Any]:
    """Scratch memory that each of the plans can run in."""
    counts: dict[Key, int] = {}
    for plan in plans:
        for key, count in plan.counts.items():
            counts[key] = max(counts.get(key, 0), count)
    one = lambda key: pltpu.VMEM(key[:2], jnp.dtype(key[2]))
    return {key: [one(key)] * count for key, count in sorted(counts.items())}


def run(plan: Plan, inputs: Any, places: dict[Key, Any], outputs: Any) -> None:
    """Runs it in a body: from inputs to outputs, trees of views, which may lie where inputs do."""
    held = dict(enumerate(jax.tree.leaves(inputs)))
    for value, (key, number) in plan.places.items():
        held[value] = View(places[key][number])
    for nodes, wanted in plan.stages:
        if not all(by_rows(node, plan.shapes) for node in nodes):
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
        turn(None)
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
    """Runs a stage on `height` rows from the first one; first None = on all there are."""
    found: dict[int, jax.Array] = {}
    rows = slice(None) if first is None else pl.ds(pl.multiple_of(first, height), height)

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
        shape = (count if first is None or count == 1 else height, columns)
        if node.name == "iota":
            x = jax.lax.broadcasted_iota(dtype, shape, node.params["dimension"])
            return x + first if first is not None and node.params["dimension"] == 0 else x
        operands = [value(x) for x in node.inputs]
        if node.name == "spread":
            if isinstance(node.inputs[0], list):
                return jnp.full(shape, operands[0], dtype)
            return jnp.broadcast_to(operands[0], shape)
        if node.name in ("reduce_sum", "reduce_max"):
            reduce = jnp.sum if node.name == "reduce_sum" else jnp.max
            return reduce(operands[0], axis=node.params["axes"], keepdims=True)
        return node.primitive.bind(*operands, **bound(node))

    for node in nodes:
        found[node.output] = compute(node)
    for x in wanted:
        held[x].store(found[x], rows)
    return found
