"""The machine code of a compiled Mosaic GPU kernel: registers, spills, shared memory.

ptxas says so in MOSAIC_GPU_DUMP_TO/NAME_i.ptxas, Mosaic's own log beside it what shared memory a
block is started with. Mosaic compiles the same kernel once per process, so what was told of a
kernel is kept, by the hash that stands in the program.
"""

import contextlib
import pathlib
import re
from typing import NamedTuple


class Code(NamedTuple):
    """A kernel's machine code; None = ptxas said nothing.

    Attributes:
        name: the kernel's.
        registers: per thread.
        spills: bytes stored and loaded for want of registers, where they stand in the program.
        shared: bytes of shared memory per block.
        serial: 1 where ptxas had to wait for each wgmma (its warning C7510).
    """

    name: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    serial: int | None = None


_told: dict[tuple[str, str], Code] = {}  # by name and hash


def parse(text: str) -> tuple[int, int, int, int]:
    """Registers, bytes of spills, static shared memory and `serial` from what ptxas -v prints.

    Raises:
        ValueError: it says nothing of registers.
    """
    registers = re.findall(r"Used (\d+) registers", text)
    if not registers:
        raise ValueError(f"ptxas says nothing of registers: {' '.join(text.split())[:200]}")
    # A warning that there are spills says the same numbers again.
    spills = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    static = re.findall(r"(\d+) bytes smem", text)
    return (
        max(map(int, registers)),
        sum(int(stores) + int(loads) for stores, loads in spills),
        max(map(int, static), default=0),
        int("C7510" in text),
    )


def dynamic_shared(log: pathlib.Path) -> int:
    """The shared memory that Mosaic's log of its passes starts the kernel with; 0 = none told."""
    if not log.exists():
        return 0
    with log.open(errors="replace") as lines:  # megabytes; the launch stands near the beginning
        for line in lines:
            size = re.search(r"dynamic_shared_memory_size %c(\d+)(?:_\w+)?\b", line)
            if size:
                return int(size[1])
    return 0


def calls(text: str) -> list[tuple[str, str]]:
    """Name and hash of every Mosaic GPU call of a compiled program, in its order."""
    found = []
    for line in text.splitlines():
        if 'custom_call_target="mosaic_gpu' not in line:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        parts = [p for p in name[1].split("/") if p] if name else []
        if parts and parts[-1] in ("mpmd_map", "core_map", "pallas_call"):
            parts.pop()
        told = re.search(r'kernel_hash = "((?:[^"\\]|\\.)*)"', line)
        found.append((parts[-1] if parts else "kernel", told[1] if told else ""))
    return found


def without_bodies(text: str) -> str:
    """A program's text without the code of its kernels, which is most of it."""
    return re.sub(r'module = "(?:[^"\\]|\\.)*"', 'module = ""', text)


def read(dumps: pathlib.Path | None, found: list[tuple[str, str]]) -> tuple[Code, ...]:
    """What is known of each call of a program, from the dumps and from earlier programs.

    Args:
        dumps: where Mosaic wrote; None = it did not.
        found: as `calls` gives them.
    """
    if dumps is None:
        return tuple(Code(name) for name, _ in found)
    texts: dict[str, list[pathlib.Path]] = {}
    for path in sorted(dumps.glob("*.ptxas"), key=lambda p: int(p.stem.rpartition("_")[2])):
        texts.setdefault(path.stem.rpartition("_")[0], []).append(path)
    for key in dict.fromkeys(found):
        name = key[0]
        if key in _told or not texts.get(name):
            continue
        path = texts[name].pop(0)
        registers, spills, static, serial = parse(path.read_text(errors="replace"))
        # A body's shared memory is one symbol whose size is given when it is started.
        shared = max(static, dynamic_shared(path.with_name(f"{path.stem}.mlir-passes.log")))
        _told[key] = Code(name, registers, spills, shared, serial)
    return tuple(_told.get(key, Code(key[0])) for key in found)


def clear(dumps: pathlib.Path | None) -> None:
    """Empties the folder."""
    for path in dumps.glob("*") if dumps is not None else ():
        with contextlib.suppress(OSError):
            path.unlink()
