"""The committed table of GPU kernels, docs/kernels_gpu.csv, and how people read it."""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from pallas_kernels.core import kernel_report
from pallas_kernels.core.kernel_report import (
    MOST_BYTES,
    largest,
    mib,
    number,
    part_of,
    percent,
    ratio,
    times,
)
from pallas_kernels.core.kernel_table import FORWARD_ONLY, compiles

PATH = "docs/kernels_gpu.csv"  # in a checkout
BEGIN, END = "<!-- begin: written by check_gpu -->", "<!-- end of check_gpu -->"
PASSES = ("forward", "backward")
SHARED_MEMORY = 232_448  # bytes that a block may have on Hopper
# Those that must have a kernel; the others may leave their calls to xla.
SEVEN = (
    *("dilated_conv", "gated_delta_rule", "long_conv", "monarch_matmul", "neural_memory"),
    *("selective_scan", "taylor_attention"),
)


class GpuRow(NamedTuple):
    """One pass of one call on one device, or one kernel of it. None = not known.

    Attributes:
        stack: versions of jax and of ptxas's wheel.
        operator: its name.
        call: of arg_specs.py.
        dtype: of the arguments along time.
        device: "h100", "h200".
        part: "forward", "backward", "documents, state" or "documents".
        kernel: its name; "" = the pass: the most registers and shared memory of its kernels, and
            the sums.
        status: COMPILED, FORWARD_ONLY, "refused: ..." (dispatch takes xla), or what stood against
            it (core/kernel_table.py).
        calls: how often the program calls the kernel.
        registers: per thread.
        spilled: bytes stored and loaded for want of registers, loops counted once.
        shared: bytes of shared memory per block.
        serial: kernels in which ptxas makes every wgmma wait for the one before.
        blocks: of threads.
        bytes: that blocks ask for, by the copies in the body; of a pass with XLA's own around.
        around: of which by XLA's passes.
        minimum: that the pass moves at least.
        saved: of what the forward pass keeps for the backward one.
        temp: memory for temporaries of the compiled program.
        peak: memory for arguments, results and temporaries.
        xla_temp: of the portable form.
        xla_peak: of the portable form.
        hbm: of bytes what goes through device memory (core/second_cache.py).
        seconds: to compile (not compared, not stored).
    """

    stack: str
    operator: str
    call: str
    dtype: str
    device: str
    part: str
    kernel: str = ""
    status: str = ""
    calls: int | None = None
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    serial: int | None = None
    blocks: int | None = None
    bytes: int | None = None
    around: int | None = None
    minimum: int | None = None
    saved: int | None = None
    temp: int | None = None
    peak: int | None = None
    xla_temp: int | None = None
    xla_peak: int | None = None
    hbm: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return (self.stack, self.operator, self.call, self.device, self.part, self.kernel)

    @property
    def name(self) -> str:
        if self.call == "-":
            return self.operator
        part = f"{self.part}, {self.kernel}" if self.kernel else self.part
        return f"{self.operator} {self.call} {part} on {self.device}"


def wrong(rows: Iterable[GpuRow]) -> list[str]:
    """What may not be, whatever the table says: spills, too much shared memory, and not knowing.

    With documents and a state a spill is beside the goal, as long as the table knows it.
    """
    told = []
    for row in rows:
        if row.kernel and compiles(row) and row.registers is None:
            told.append(f"{row.name}: ptxas told nothing of registers, spills and shared memory")
        if row.kernel and row.spilled and not row.part.startswith("documents"):
            told.append(f"{row.name}: {row.spilled:,} bytes of registers are spilled")
        if row.kernel and (row.shared or 0) > SHARED_MEMORY:
            told.append(f"{row.name}: {row.shared:,} bytes of shared memory")
    return told


def through(row: GpuRow) -> float | None:
    """Bytes through device memory by the least that the pass moves; asked for where not known."""
    return row.hbm / row.minimum if row.hbm and row.minimum else ratio(row)


def beside_the_goals(rows: Iterable[GpuRow]) -> list[str]:
    """What compiles and yet misses a figure of the issue; it breaks nothing."""
    told = []
    for row in rows:
        moved = through(row) if not row.kernel else None
        if row.status.startswith("refused") and not row.part.startswith("documents"):
            told.append(f"{row.name}: {row.status}")
        if row.status == FORWARD_ONLY:
            told.append(f"{row.name}: {row.status}")
        if moved is not None and moved > MOST_BYTES:
            told.append(f"{row.name}: {moved:.2f}x the least bytes (at most {MOST_BYTES})")
        if row.kernel and row.spilled and row.part.startswith("documents"):
            told.append(f"{row.name}: {row.spilled:,} bytes of registers are spilled")
        if row.kernel and row.serial:
            told.append(f"{row.name}: ptxas makes its wgmma wait for one another (C7510)")
    return told


def line(row: GpuRow) -> str:
    """One row for a terminal."""
    if not compiles(row):
        return f"{row.name:<72}{row.status}"
    if row.kernel:
        text = f"    {row.kernel:<44} {number(row.registers):>4} registers"
        text += f"  spilled {number(row.spilled)}  shared {number(row.shared):>7}"
        text += f"  blocks {number(row.blocks)}" if row.blocks else ""
        text += f"  bytes {mib(row.bytes)}" if row.bytes else ""
        return text + (f"  hbm {mib(row.hbm)}" if row.hbm else "")
    parts = [f"{row.name:<72}"]
    if row.minimum:
        parts.append(f"bytes x{times(ratio(row))} (around {mib(row.around)})")
    if row.minimum and row.hbm:
        parts.append(f"hbm x{times(through(row))}")
    parts.append(f"temp {mib(row.temp)}")
    if row.xla_peak and row.peak:
        parts.append(f"peak {mib(row.peak)}, xla {mib(row.xla_peak)}")
    parts += [row.status] if row.status == FORWARD_ONLY else []
    return "  ".join([*parts, f"{row.seconds} s"])


def write(path: pathlib.Path, rows: Iterable[GpuRow]) -> None:
    """Puts the tables of GPU kernels into the page."""
    kernel_report.put(path, BEGIN, END, markdown(rows))


_HEAD = (
    "| call | pass | kernel | registers | spilled | shared | blocks | hbm by least | hbm | "
    "bytes by least | bytes | saved | temp | peak | xla peak |"
)


def summary(rows: Iterable[GpuRow]) -> str:
    """The worst figures of each operator, over every call and stack."""
    head = "| operator | hbm by least: forward, backward | bytes by least: forward, backward | "
    parts = [
        f"{head}spilled: one document, documents | of the shared memory | refused |",
        "|---|---:|---:|---:|---:|---|",
    ]
    rows = [row for row in rows if row.part != "-"]
    for name in sorted({row.operator for row in rows}):
        own = [row for row in rows if row.operator == name]
        passes = [row for row in own if not row.kernel and compiles(row)]
        documents = [row for row in passes if row.part.startswith("documents")]
        worst = lambda of, part, passes=passes: largest(of(r) for r in passes if r.part == part)
        both = lambda of, worst=worst: ", ".join(times(worst(of, x)) for x in PASSES)
        single = (row.spilled for row in passes if row.part in PASSES)
        spilled = [number(largest(x)) for x in (single, (row.spilled for row in documents))]
        shared = largest(row.shared for row in passes)
        refused = sorted({r.call for r in own if r.status.startswith("refused")})
        cells = (
            *(both(through), both(ratio), ", ".join(x or "-" for x in spilled)),
            percent(shared and shared / SHARED_MEMORY),
            ", ".join(refused),
        )
        parts.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(parts)


def markdown(rows: Iterable[GpuRow]) -> str:
    """What was aimed at, then one table per stack and device."""
    rows = sorted(rows, key=lambda row: row.key)
    aims = (
        f"Aimed at: no spills, and at most {MOST_BYTES} times the least bytes through device "
        "memory. The worst anywhere below, over calls and stacks; *refused*: calls of which a pass "
        "(or the one with documents) is left to xla on some stack:"
    )
    parts = [aims, "", summary(rows), ""]
    for stack, device in sorted({(row.stack, row.device) for row in rows if row.part != "-"}):
        parts += [f"### {device}, {stack}", "", _HEAD, "|---|---|---|" + "---:|" * 12]
        before: tuple[str, str] | None = None
        for row in (row for row in rows if (row.stack, row.device) == (stack, device)):
            call = (row.operator, row.call)
            parts.append(_cells(row, f"{row.operator} {row.call}" if call != before else ""))
            before = call
        parts.append("")
    return "\n".join(parts)


def _cells(row: GpuRow, call: str) -> str:
    head = f"| {call} | {'' if row.kernel else part_of(row)} | {row.kernel} |"
    if not compiles(row):
        return f"{head} {row.status.replace('|', '/')} |" + " |" * 11
    whole = not row.kernel
    cells = (
        *(number(row.registers), number(row.spilled), number(row.shared), number(row.blocks)),
        times(through(row)) if whole and row.hbm else "",
        mib(row.hbm),
        times(ratio(row)) if whole else "",
        *(mib(row.bytes), mib(row.saved), mib(row.temp), mib(row.peak), mib(row.xla_peak)),
    )
    return f"{head} {' | '.join(cells)} |"
