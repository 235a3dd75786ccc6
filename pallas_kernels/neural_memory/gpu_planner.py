"""What of a traced function lies in registers and what in memory, step by step.

A tile (64 x 64) takes 32 registers of each thread, so few are held at once. Products read their
operands from shared memory, where a tile lies as a sum of bfloat16 parts; so do tiles for which
there are no registers left. Vectors have places of their own.
"""

from typing import NamedTuple

from pallas_kernels.neural_memory.gpu_phi import erf_p
from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.tpu_trace import Node

_NEVER = 1 << 30
# Tiles that a node takes in registers beside its operands and its result.
_WITHIN = {erf_p.name: 2, "across": 1}


class Step(NamedTuple):
    """One thing to do.

    "node" computes; "input" reads an input; "load" and "store", "pull" and "push", "read" and
    "write" are from and to a place in shared memory, device memory, and among vectors; "drop"
    forgets a value in registers; "give" hands a result over.
    """

    what: str
    value: int
    node: Node | None = None
    place: int = -1


class Room(NamedTuple):
    """What a plan may take.

    Attributes:
        tiles: in shared memory.
        registers: tiles in registers.
        near: for how many products and sums an element-wise result is kept; who wants it later
            computes it again.
    """

    tiles: int
    registers: int = 3
    near: int = 3


class Plan(NamedTuple):
    """What a body runs.

    Attributes:
        shapes: `(rows, columns, dtype)` of each value; the first ones are the inputs.
        free: nodes by value that are computed wherever they are wanted.
        steps: in order.
        tiles, far, vectors: places that there must be, of tiles in shared and in device memory.
        outputs: values.
    """

    shapes: dict
    free: dict[int, Node]
    steps: tuple[Step, ...]
    tiles: int
    far: int
    vectors: int
    outputs: tuple

    def is_tile(self, value: int) -> bool:
        return self.shapes[value][:2] == (SIZE, SIZE)


class Planner:
    """Goes through the nodes once. What is wanted last is the first to leave: registers for shared
    memory, shared memory for device memory."""

    def __init__(self, shapes, free, nodes, outputs, ready, overwrites, room):
        self.shapes, self.free, self.nodes, self.room = shapes, free, nodes, room
        self.ready, self.outputs = list(ready), outputs
        self.inputs = len(self.ready)
        self.uses: dict[int, list[tuple[int, bool]]] = {}  # of each value: when, and in a product
        for number, node in enumerate(nodes):
            for x in self.needs(node):
                self.uses.setdefault(x, []).append((number, node.name == "dot_general"))
        self.waiting = list(enumerate(overwrites))
        self.steps: list[Step] = []
        self.registers: list[int] = []
        self.at_work: list[int] = []  # operands of a product that is about to be
        self.tiles, self.far, self.vectors = _Places(), _Places(), _Places()
        self.now = -1

    def needs(self, node: Node) -> list[int]:
        found: list[int] = []
        for x in node.inputs:
            if isinstance(x, list):
                continue
            for y in self.needs(self.free[x]) if x in self.free else [x]:
                if y not in found:
                    found.append(y)
        return found

    def run(self) -> Plan:
        self.hand_over()
        for number, node in enumerate(self.nodes):
            self.now = number
            needs = self.needs(node)
            if node.name == "dot_general":
                self.at_work = needs
                for x in needs:
                    self.to_tile(x)
                self.make_room(1, ())
                self.at_work = []
            else:
                missing = [x for x in needs if x not in self.registers]
                within = _WITHIN.get(node.name, 0)
                self.make_room(1 + within + sum(map(self.is_tile, missing)), needs)
                for x in missing:
                    self.load(x)
            self.steps.append(Step("node", node.output, node))
            self.registers.append(node.output)
            for x in needs:
                self.forget(x)
            self.keep(node.output)
            self.hand_over()
        counts = self.tiles.count, self.far.count, self.vectors.count
        return Plan(self.shapes, self.free, tuple(self.steps), *counts, self.outputs)

    # --- What is wanted when

    def is_tile(self, x: int) -> bool:
        return self.shapes[x][:2] == (SIZE, SIZE)

    def next_use(self, x: int, product: bool | None = None) -> int:
        for number, in_product in self.uses.get(x, ()):
            if number > self.now and product in (None, in_product):
                return number
        return _NEVER

    def is_awaited(self, x: int) -> bool:
        return any(self.outputs[at] == x for at, _ in self.waiting)

    def is_wanted(self, x: int) -> bool:
        return self.next_use(x) < _NEVER or self.is_awaited(x)

    # --- Places

    def is_input(self, x: int, ready: bool | None = None) -> bool:
        return x < self.inputs and ready in (None, bool(self.ready[x]))

    def is_elsewhere(self, x: int) -> bool:
        """Whether it may leave registers without being written."""
        return any(x in places.of for places in (self.tiles, self.far, self.vectors)) or (
            x < self.inputs
        )

    def store(self, x: int, places: "_Places", what: str) -> None:
        self.steps.append(Step(what, x, place=places.take(x)))

    def load(self, x: int) -> None:
        what, place = "input", x
        if x >= self.inputs:
            what, places = next(
                (what, places)
                for what, places in (
                    ("load", self.tiles),
                    ("pull", self.far),
                    ("read", self.vectors),
                )
                if x in places.of
            )
            place = places.of[x]
        self.steps.append(Step(what, x, place=place))
        self.registers.append(x)

    def to_tile(self, x: int) -> None:
        """To where products read it."""
        if x in self.tiles.of or self.is_input(x, ready=True):
            return
        if x not in self.registers:
            self.make_room(1, ())
            self.load(x)
        if self.tiles.is_full(self.room.tiles):
            others = [y for y in self.tiles.of if y not in self.at_work]
            self.leave_tile(max(others, key=self.next_use), keep=x)
        self.store(x, self.tiles, "store")

    def leave_tile(self, x: int, keep: int) -> None:
        """Makes a place free; what lies there goes to device memory unless it lies elsewhere."""
        if not self.is_input(x) and x not in self.far.of and self.is_wanted(x):
            had = x in self.registers
            if not had:
                self.make_room(1, (keep,))
                self.load(x)
            self.store(x, self.far, "push")
            if not had:
                self.drop(x)
        self.tiles.free(x)

    def leave_registers(self, x: int) -> None:
        if not self.is_elsewhere(x):
            if self.tiles.is_full(self.room.tiles):
                # One that lies elsewhere as well leaves without being written.
                light = [y for y in self.tiles.of if self.is_input(y) or y in self.far.of]
                later = lambda y: self.next_use(y) > self.next_use(x)
                light = [y for y in light if y not in self.at_work and later(y)]
                if light:
                    self.tiles.free(max(light, key=self.next_use))
                    self.store(x, self.tiles, "store")
                else:
                    self.store(x, self.far, "push")
            else:
                self.store(x, self.tiles, "store")
        self.drop(x)

    def keep(self, x: int) -> None:
        """What was just computed: to memory if a product wants it soon, or if it is a vector."""
        if self.is_tile(x):
            if self.next_use(x, product=True) <= self.now + 2:
                self.to_tile(x)
        elif self.next_use(x) > self.now + 1 and self.next_use(x) < _NEVER:
            self.store(x, self.vectors, "write")
        self.forget(x)

    def forget(self, x: int) -> None:
        """Lets go of what nobody wants any more, in memory and in registers."""
        if self.is_awaited(x):
            return
        if self.next_use(x) == _NEVER:
            for places in (self.tiles, self.far, self.vectors):
                if x in places.of:
                    places.free(x)
            if x in self.registers:
                self.drop(x)
            return
        vector = not self.is_tile(x)
        if vector and x in self.registers and not self.is_elsewhere(x):
            if self.next_use(x) <= self.now + 1:
                return
            self.store(x, self.vectors, "write")  # a row takes half of what a tile does
        done = self.next_use(x, product=False) == _NEVER and x in self.tiles.of
        if x in self.registers and (vector or done):
            self.drop(x)

    def drop(self, x: int) -> None:
        self.registers.remove(x)
        self.steps.append(Step("drop", x))

    def make_room(self, count: int, needed) -> None:
        """Of registers for so many tiles; what is wanted last goes first."""
        tiles = [x for x in self.registers if self.is_tile(x)]
        others = [x for x in tiles if x not in needed]
        others.sort(key=lambda x: self.next_use(x, product=False))
        while others and len(tiles) + count > self.room.registers:
            x = others.pop()
            tiles.remove(x)
            self.leave_registers(x)

    # --- Results

    def hand_over(self) -> None:
        """Results that are there, once what they take the place of was read last."""
        for at, over in tuple(self.waiting):
            x = self.outputs[at]
            there = x in self.registers or self.is_elsewhere(x)
            if not there or (over is not None and self.next_use(over) < _NEVER):
                continue
            if x not in self.registers:
                self.make_room(1, ())
                self.load(x)
            self.steps.append(Step("give", x, place=at))
            self.waiting.remove((at, over))
            self.forget(x)


class _Places:
    def __init__(self):
        self.of: dict[int, int] = {}
        self.empty: list[int] = []
        self.count = 0

    def is_full(self, most: int) -> bool:
        return not self.empty and self.count >= most

    def take(self, x: int) -> int:
        if not self.empty:
            self.empty.append(self.count)
            self.count += 1
        self.of[x] = self.empty.pop(0)
        return self.of[x]

    def free(self, x: int) -> None:
        self.empty.append(self.of.pop(x))
