"""The table of kernels as people read it: docs/kernels.md, and lines while it is measured."""

import pathlib
from collections.abc import Iterable
from typing import Any

from pallas_kernels.core.kernel_table import COMPILED, FORWARD_ONLY, Row, compiles

BEGIN, END = "<!-- begin: written by check_tpu -->", "<!-- end -->"
MOST_BYTES, MOST_VMEM = 1.3, 0.75
# Which operators the peak of memory is asked of, at 8,192 tokens.
LONG_CALLS = ("selective_scan", "neural_memory", "taylor_attention")


def ratio(row: Any) -> float | None:
    """Bytes moved by the least that the pass moves; backward that counts what the form saved."""
    return row.bytes / row.minimum if row.bytes and row.minimum else None


def share(row: Row) -> float | None:
    """Vector memory by the limit."""
    return row.vmem / row.limit if row.vmem is not None and row.limit else None


def part_of(row: Any) -> str:
    """The pass, and what of it is no kernel's."""
    return row.part + (row.status.removeprefix(COMPILED) if row.status == FORWARD_ONLY else "")


def beside_the_goals(rows: Iterable[Row]) -> list[str]:
    """What compiles and yet misses a figure of the issue; it breaks nothing."""
    told = []
    for row in rows:
        moved, vmem = ratio(row), share(row)
        if row.status.startswith("refused") and not row.part.startswith("documents"):
            told.append(f"{row.name}: {row.status}")
        if row.status == FORWARD_ONLY:
            told.append(f"{row.name}: {row.status}")
        if moved is not None and moved > MOST_BYTES:
            told.append(f"{row.name}: {moved:.2f}x the least bytes (at most {MOST_BYTES})")
        if vmem is not None and vmem > MOST_VMEM:
            told.append(f"{row.name}: {vmem:.0%} of the vector memory (at most {MOST_VMEM:.0%})")
        if row.inner:
            told.append(f"{row.name}: {row.inner} spills in inner loops")
    return told


def line(row: Row) -> str:
    """One row for a terminal."""
    if not compiles(row):
        return f"{row.name:<58}{row.status}"
    parts = [f"{row.name:<58}", f"VMEM {mib(row.vmem)} ({percent(share(row))})"]
    if row.minimum:
        parts.append(f"bytes x{times(ratio(row))}")
    parts += [f"spills {number(row.spills)}+{number(row.fills)}", f"temp {mib(row.temp)}"]
    if row.xla_peak and row.peak:
        parts.append(f"peak {mib(row.peak)}, xla {mib(row.xla_peak)}")
    parts += [row.status] if row.status == FORWARD_ONLY else []
    return "  ".join([*parts, f"{row.seconds} s"])


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Puts the tables of TPU kernels into the page."""
    put(path, BEGIN, END, markdown(rows))


def put(path: pathlib.Path, begin: str, end: str, middle: str) -> None:
    """Puts text between the marks of a Markdown file; prose around them stays.

    Raises:
        ValueError: the file has no such marks.
    """
    text = path.read_text()
    if begin not in text or end not in text.split(begin)[1]:
        raise ValueError(f"{path} lacks the lines '{begin}' and '{end}' to write between")
    before, rest = text.split(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n\n{middle}\n{end}{after}")


_HEAD = (
    "| call | pass | device | VMEM | of limit | bytes by least | HBM bytes | saved | "
    "temp HBM | peak | xla peak | bundles | spills | in loops |"
)


_SUMMARY = (
    "| operator | bytes by least, largest | of the vector memory, largest | spills in loops, "
    "one document: bfloat16, float32 | peak by xla's, largest |"
)


def summary(rows: Iterable[Row]) -> str:
    """What was aimed at: the worst that each operator has anywhere in the tables."""
    rows = list(rows)
    parts = [_SUMMARY, "|---|---:|---:|---:|---:|"]
    for name in sorted({row.operator for row in rows}):
        mine = [row for row in rows if row.operator == name and compiles(row)]
        spills = [
            [row.inner for row in mine if row.minimum and (row.dtype == "float32") == wide]
            for wide in (False, True)
        ]
        peaks = [row.peak / row.xla_peak for row in mine if row.peak and row.xla_peak]
        cells = (
            times(largest(map(ratio, mine))),
            percent(largest(map(share, mine))),
            ", ".join(number(largest(found)) or "-" for found in spills),
            times(max(peaks, default=None)) if name in LONG_CALLS else "",
        )
        parts.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(parts)


def largest(values: Iterable[Any]) -> Any:
    """Of those that are known; None if none is."""
    return max((x for x in values if x is not None), default=None)


def markdown(rows: Iterable[Row]) -> str:
    """What was aimed at, then one table per stack."""
    rows = sorted(rows, key=lambda row: row.key)
    aims = (
        f"Aimed at: bytes at most {MOST_BYTES} times the least, {MOST_VMEM:.0%} of the vector"
        " memory, no spills in the inner loops of each first call, and at 8,192 tokens a third of"
        f" the peak memory of xla's form ({', '.join(LONG_CALLS)}). The worst anywhere below:"
    )
    parts = [aims, "", summary(rows), ""]
    for stack in sorted({row.stack for row in rows}):
        parts += [f"### {stack}", "", _HEAD, "|---|---|---|" + "---:|" * 11]
        before: tuple[str, str] | None = None
        for row in (row for row in rows if row.stack == stack):
            call = (row.operator, row.call)
            parts.append(_cells(row, f"{row.operator} {row.call}" if call != before else ""))
            before = call
        parts.append("")
    return "\n".join(parts)


def _cells(row: Row, call: str) -> str:
    head = f"| {call} | {part_of(row)} | {row.device} |"
    if not compiles(row):
        return f"{head} {row.status.replace('|', '/')} |" + " |" * 10
    cells = (
        mib(row.vmem) + (" (raised)" if row.raised else ""),
        percent(share(row)),
        times(ratio(row)),
        mib(row.bytes),
        mib(row.saved),
        mib(row.temp),
        mib(row.peak),
        mib(row.xla_peak),
        number(row.bundles),
        number(None if row.spills is None or row.fills is None else row.spills + row.fills),
        number(row.inner),
    )
    return f"{head} {' | '.join(cells)} |"


def mib(count: int | None) -> str:
    """For people: nothing where it is not known."""
    if count is None:
        return ""
    return f"{count / 2**20:.2f} MiB" if count < 10 * 2**20 else f"{count / 2**20:.0f} MiB"


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def number(x: int | None) -> str:
    return "" if x is None else f"{x:,}"
