"""Runs a plan of tiles (gpu_plan.py) in the body of a Mosaic GPU kernel.

A tile in shared memory is a sum of bfloat16 parts, as products read it: two of them hold 17 bits,
three a float32 number as it is. A product adds up the products of parts, small ones first.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_phi import erf_of, erf_p
from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.tpu_trace import Node, bound

_TRANSPOSED = {
    ((1,), (0,)): (False, False),
    ((1,), (1,)): (False, True),
    ((0,), (0,)): (True, False),
}
_LAYOUT = plgpu.Layout.WGMMA
# jax 0.10 wants an index, 0.11 warns of one.
_REQUIRED = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
_WHOLE: dict[str, Any] = {"idx": ()} if _REQUIRED else {}


def tile_type(*lead: int) -> Any:
    """Of one part of a tile in shared memory."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*lead, SIZE, SIZE), jnp.bfloat16, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Registers:
    """How arrays come into registers and leave them, compiled or interpreted."""

    interpret: bool
    fresh: Callable[[], Any] = lambda: 0  # reads a 0 that the compiler does not know

    def cast(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """To the layout that products have; a vector is a row (axis 1) or a column (axis 0)."""
        if self.interpret:
            return x
        return plgpu.layout_cast(x, _LAYOUT if x.ndim == 2 else _LAYOUT.reduce(1 - axis))

    def read(self, ref: Any, axis: int = 0) -> jax.Array:
        """From device memory, in float32."""
        x = ref[...] if self.interpret else plgpu.load(ref, **_WHOLE, optimized=False)
        return self.cast(x, axis).astype(jnp.float32)

    def indices(self, dimension: int) -> jax.Array:
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), dimension)
        found = plgpu.broadcasted_iota(jnp.int32, (SIZE, SIZE), dimension, layout=_LAYOUT)
        # Else every mask would be computed before the loop, and take 32 registers in it.
        return found + self.fresh()

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What bfloat16 holds of it, and what is left."""
        if self.interpret:  # XLA would take a pair of casts for nothing
            high = jax.lax.reduce_precision(x, 8, 7)
            return high.astype(jnp.bfloat16), x - high
        high = x.astype(jnp.bfloat16)
        return high, x - high.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile in shared memory, as the sum of its parts; `find` says where they lie, anew each
    time."""

    find: Callable[[], tuple]
    registers: Registers

    @property
    def parts(self) -> tuple:
        return self.find()

    def load(self) -> jax.Array:
        *most, x = [self.registers.cast(p[...]).astype(jnp.float32) for p in self.parts]
        for part in reversed(most):
            x = part + x
        return x

    def store(self, x: jax.Array) -> None:
        parts, found = self.parts, []
        for _ in parts:  # all before any is written, which is a barrier: they take less room
            high, x = self.registers.split(x)
            found.append(high)
        for part, high in zip(parts, found, strict=True):
            part[...] = high.astype(part.dtype)


@dataclasses.dataclass(frozen=True)
class Vector:
    """Numbers in shared memory: a row (axis 1) or a column; `find` says where they lie."""

    find: Callable[[], Any]
    registers: Registers
    axis: int = 1

    @property
    def ref(self) -> Any:
        return self.find()

    def along(self, axis: int) -> "Vector":
        return dataclasses.replace(self, axis=axis)

    def load(self) -> jax.Array:
        return self.registers.cast(self.ref[...], self.axis).astype(jnp.float32)

    def store(self, x: jax.Array) -> None:
        self.ref[...] = x.astype(self.ref.dtype)


@dataclasses.dataclass(frozen=True)
class Far:
    """A tile or a row in device memory, in float32 or bfloat16; if `when`, it is written. `find`
    says where it lies, anew each time."""

    find: Callable[[], Any]
    registers: Registers
    when: Any = None

    def load(self) -> jax.Array:
        return self.registers.read(self.find(), 1)

    def store(self, x: jax.Array) -> None:
        def write():
            ref = self.find()
            ref[...] = x.astype(ref.dtype)

        write() if self.when is None else pl.when(self.when)(write)


class Places(NamedTuple):
    """Where a plan's values lie.

    Attributes:
        tiles: Tiles in shared memory.
        far: of tile i in device memory, by a function.
        vectors: shared memory of vector i, by a function.
        turn: where vectors change their layout.
    """

    tiles: Sequence[Tile]
    far: Callable[[int], Far]
    vectors: Callable[[int], Vector]
    turn: Vector


def run(
    plan: Plan,
    registers: Registers,
    inputs: Sequence[Any],
    outputs: Sequence[Callable],
    places: Places,
    across: Callable | None = None,
) -> None:
    """Runs a plan.

    Args:
        plan: of gpu_plan.plan.
        registers: how.
        inputs: a Tile, Vector or Far for each.
        outputs: what to do with each result.
        places: for what it holds between.
        across: sums over the blocks of a cluster; it is told whether it gets a row.
    """
    _Run(plan, registers, inputs, outputs, places, across).run()


class _Run:
    def __init__(self, plan, registers, inputs, outputs, places, across):
        self.plan, self.registers, self.inputs, self.outputs = plan, registers, inputs, outputs
        self.places, self.across = places, across
        self.held: dict[int, jax.Array] = {}
        self.tiles: dict[int, Tile] = {}  # of each value that lies in one
        self.loose = True  # whether shared memory was written since products were told

    def run(self) -> None:
        for step in self.plan.steps:
            x = step.value
            if step.what == "node":
                assert step.node is not None
                self.held[x] = self.compute(step.node)
            elif step.what == "drop":
                del self.held[x]
            elif step.what == "give":
                self.outputs[step.place](self.held[x])
                self.loose = True
            elif step.what in ("input", "load", "pull", "read"):
                if self.plan.is_tile(x) and not self.registers.interpret:
                    # The compiler would load a few tiles ahead, for which there are no registers.
                    plgpu.commit_smem()
                    self.loose = False
                self.held[x] = self.place(step).load()
            else:
                self.place(step).store(self.held[x])
                if step.what == "store":
                    self.tiles[x] = self.places.tiles[step.place]
                self.loose = True

    def place(self, step):
        if step.what == "input":
            return self.inputs[step.place]
        if step.what in ("load", "store"):
            return self.places.tiles[step.place]
        if step.what in ("pull", "push"):
            return self.places.far(step.place)
        return self.places.vectors(step.place).along(self.axis(step.value))

    def axis(self, x: int) -> int:
        return int(self.plan.shapes[x][0] == 1)

    def parts(self, x: int) -> tuple:
        home = self.inputs[x] if x < len(self.inputs) else None
        return (home if isinstance(home, Tile) else self.tiles[x]).parts

    def compute(self, node: Node) -> jax.Array:
        if node.name == "dot_general":
            return self.product(node)
        found: dict[int, jax.Array] = {}

        def value(x):
            if isinstance(x, list):
                return x[0]
            if x in self.plan.free:
                if x not in found:
                    found[x] = one(self.plan.free[x])
                return found[x]
            return self.held[x]

        def wide(x, found):
            """A vector along the other axis."""
            if jnp.ndim(found) != 1:
                return found
            return jax.lax.broadcast_in_dim(found, (SIZE, SIZE), (self.axis(x),))

        def one(node: Node):
            dtype = self.plan.shapes[node.output][2]
            tile = self.plan.is_tile(node.output)
            shape = (SIZE, SIZE) if tile else (SIZE,)
            if node.name == "iota":
                return self.registers.indices(node.params["dimension"])
            operands = [value(x) for x in node.inputs]
            if node.name == "spread":
                if isinstance(node.inputs[0], list):
                    return jnp.full(shape, operands[0], dtype)
                return wide(node.inputs[0], operands[0]) if tile else operands[0]
            if node.name == "reduce_sum":
                return jnp.sum(operands[0], axis=node.params["axes"][0])
            if node.name == "turn":
                return self.turned(operands[0], node)
            if node.name == "across":
                assert self.across is not None
                return self.across(operands[0], self.axis(node.output))
            if tile:
                operands = [wide(x, y) for x, y in zip(node.inputs, operands, strict=True)]
            if node.name == "select_n":
                operands = [
                    jnp.full(shape, x, dtype) if i and jnp.ndim(x) == 0 else x
                    for i, x in enumerate(operands)
                ]
            if node.name == erf_p.name:
                return erf_of(operands[0])
            if node.name == "add_any":
                return operands[0] + operands[1]
            return node.primitive.bind(*operands, **bound(node))

        return one(node)

    def turned(self, x: jax.Array, node: Node) -> jax.Array:
        """A row as a column or the other way: written as the one, read as the other."""
        if self.registers.interpret:
            return x
        self.places.turn.store(x)
        return self.places.turn.along(self.axis(node.output)).load()

    def product(self, node: Node) -> jax.Array:
        (left, right), _ = node.params["dimension_numbers"]
        turned = _TRANSPOSED[tuple(left), tuple(right)]
        a, b = (self.parts(x) for x in node.inputs)
        last = max(len(a), len(b)) - 1
        terms = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j <= last]
        terms.sort(key=lambda ij: -sum(ij))
        if self.registers.interpret:
            read = lambda ref, turn: (ref[...].T if turn else ref[...]).astype(jnp.float32)
            dot = lambda x, y: jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)
            found: Any = sum(dot(read(a[i], turned[0]), read(b[j], turned[1])) for i, j in terms)
            return found
        if self.loose:
            plgpu.commit_smem()
            self.loose = False
        turn = lambda ref, yes: plgpu.transpose_ref(ref, (1, 0)) if yes else ref

        def add_up(sums):
            for i, j in terms:
                plgpu.wgmma(sums, turn(a[i], turned[0]), turn(b[j], turned[1]))
            return sums[...]

        return self.registers.cast(pl.run_scoped(add_up, plgpu.ACC((SIZE, SIZE), jnp.float32)))
