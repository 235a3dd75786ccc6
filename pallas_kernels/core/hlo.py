"""Reading the text of a compiled TPU program: kernels, XLA's own passes, collectives."""

import math
import re

_ITEMSIZE = {"pred": 1, "c64": 8, "c128": 16}  # others say their bits: f32, bf16, s8, u4
# They move nothing: names of values, or work that is counted elsewhere.
_FREE = {
    *("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "iota"),
    *("custom-call", "copy-start", "slice-start", "partition-id", "replica-id", "opt-barrier"),
    *("conditional", "call"),
}
_PARTS = {"slice", "dynamic-slice", "copy-done", "slice-done", "gather"}  # as much in as out
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")


def custom_calls(text: str) -> list[tuple[str, str]]:
    """The Pallas calls of a program: the instruction's name, and its line."""
    found = []
    for line in _lines(text):
        if 'custom_call_target="tpu_custom_call"' in line:
            instruction = _INSTRUCTION.match(line)
            assert instruction is not None, line[:200]
            found.append((instruction[1], line))
    return found


def vmem_bytes(line: str) -> int:
    """Vector memory of a custom call, by the line that calls it."""
    return _vmem(line, "used_scoped_memory_configs")


def vmem_limit(line: str) -> int | None:
    """The limit on vector memory that a custom call asks for; None = the default."""
    return _vmem(line, "scoped_memory_configs") or None


def _vmem(line: str, name: str) -> int:
    told = re.search(rf'"{name}":\[([^\]]*)\]', line)
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', told[1] if told else "")
    return sum(map(int, sizes))


def passes_bytes(text: str) -> float:
    """Bytes that XLA's own passes read and write around the kernels: fusions, copies, pads, sums.

    Every instruction of the entry computation reads its operands and writes its result once, in the
    sizes of the arrays (not of their tiles); loops as often as the text says. Transposes that
    became a choice of layout are bitcasts, and free.
    """
    computations = _computations(text)
    return _moved(computations["ENTRY"], computations) if "ENTRY" in computations else 0.0


def _lines(text: str) -> list[str]:
    """One line per instruction: what a kernel says of itself may stand on lines of its own."""
    return re.sub(r'\n(?="|}})', " ", text).splitlines()


def _moved(lines: list[str], computations: dict[str, list[str]]) -> float:
    sizes: dict[str, float] = {}
    moved = 0.0
    for line in lines:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        name, rest = instruction.groups()
        shape, operation, arguments = _parts(rest)
        sizes[name] = _bytes(shape)
        if operation == "while":
            body = re.search(r"body=%([\w.\-]+)", rest)
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
            inner = computations.get(body[1], []) if body else []
            moved += _moved(inner, computations) * (int(times[1]) if times else 1)
        elif operation in _PARTS:
            moved += 2 * sizes[name]
        elif operation not in _FREE:
            operands = {x for x in re.findall(r"%([\w.\-]+)", arguments)}
            moved += sizes[name] + sum(sizes.get(x, 0.0) for x in operands)
    return moved


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the entry's is "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in _lines(text):
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found["ENTRY" if head[1] else head[2]] = []
        else:
            lines.append(line)
    return found


def _parts(rest: str) -> tuple[str, str, str]:
    """Shape, operation and arguments of "f32[8]{0} add(%a, %b), ..."."""
    # A tuple's shape has brackets and blanks of its own.
    at = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, more = rest[: at + 1], rest[at + 1 :].lstrip()
    operation, _, arguments = more.partition("(")
    return shape, operation.strip(), arguments.split(")")[0]


def _closing(text: str) -> int:
    """Where the bracket closes that the text begins with."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at
    return len(text) - 1


def _bytes(shape: str) -> float:
    total = 0.0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = re.fullmatch(r"[a-z]+?(\d+)(?:[a-z]\w*)?", dtype)
        itemsize = _ITEMSIZE.get(dtype) or (int(bits[1]) / 8 if bits else 0)
        total += itemsize * math.prod(int(x) for x in sizes.split(",") if x)
    return total


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind a program has; a loop's body counts once."""
    found = {}
    for name in _COLLECTIVES:
        count = len(re.findall(rf" {name}(?:-start)?\(", text))
        if count:
            found[name] = count
    return found
