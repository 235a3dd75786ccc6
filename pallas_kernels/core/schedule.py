"""The schedule of a compiled kernel, as libtpu dumps it: instruction words and register spills."""

import contextlib
import pathlib
import re
from typing import NamedTuple


class Code(NamedTuple):
    """A kernel's machine code, counted where it stands: trip counts of loops are not in it.

    Attributes:
        name: the kernel's.
        vmem: bytes of vector memory.
        limit: bytes that it may take; None = the generation's default.
        bundles: instruction words; None = no dump.
        fills: loads of spilled registers (the column VLOAD:FILL).
        spills: stores of registers for want of them (VSTORE:SPILL).
        inner: fills and spills within the innermost loops; one that has no loop but that over the
            grid is innermost itself.
    """

    name: str
    vmem: int
    limit: int | None = None
    bundles: int | None = None
    fills: int | None = None
    spills: int | None = None
    inner: int | None = None


def read(dumps: pathlib.Path | None, instruction: str, vmem: int, limit: int | None = None) -> Code:
    """Reads the dump of one custom call.

    Args:
        dumps: where libtpu wrote; None = it did not.
        instruction: its name in the compiled text, "toy_forward.1".
        vmem: its vector memory.
        limit: what it may take, where it asks for more.
    """
    name = instruction.partition(".")[0]  # behind it XLA puts numbers, and words of its own
    if dumps is None:
        return Code(name, vmem, limit)
    table = _file(dumps, instruction, "final_hlo-static-per-bundle-utilization")
    listing = _file(dumps, instruction, "final_bundles")
    if table is None or listing is None:
        return Code(name, vmem, limit)
    bundles, fills, spills = utilization(table)
    return Code(name, vmem, limit, bundles, fills, spills, inner_spills(listing))


def clear(dumps: pathlib.Path | None) -> None:
    """Empties the folder."""
    for path in dumps.glob("*") if dumps is not None else ():
        with contextlib.suppress(OSError):
            path.unlink()


def utilization(text: str) -> tuple[int, int, int]:
    """Bundles, fills and spills of a table of use per bundle."""
    head, rows = text.split("== UTILIZATION:")
    columns = [name.strip() for name in head.strip().splitlines()[1].split(",")]
    fill, spill = columns.index("VLOAD:FILL"), columns.index("VSTORE:SPILL")
    numbers = [line.split() for line in rows.strip().splitlines()]
    numbers = [row for row in numbers if len(row) == len(columns)]
    return (
        len(numbers),
        sum(int(row[fill]) for row in numbers),
        sum(int(row[spill]) for row in numbers),
    )


# "0x1a LB: > > { ... }": a bundle; as many ">" as loops around it.
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:((?:\s*>)*)\s*\{(.*)$")
_SPILLED = re.compile(r"vmem:\[#allocation\d+_spill\]")


def inner_spills(text: str) -> int:
    """Loads and stores of spilled registers in bundles of the deepest loops."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle:
            depth = bundle[1].count(">")
            found[depth] = found.get(depth, 0) + len(_SPILLED.findall(bundle[2]))
    return found[max(found)] if found else 0


def _file(dumps: pathlib.Path, instruction: str, what: str) -> str | None:
    ending = re.compile(rf"\d+-{re.escape(instruction)}-\d+-{what}\.txt")
    for path in sorted(dumps.glob("*.txt"), reverse=True):  # the newest first
        if ending.fullmatch(path.name):
            return path.read_text(errors="replace")
    return None
