"""The findings as a page: what was right, how fast, beside what, and which figures were reached."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pallas_kernels.core.on_gpu import bars, result
from pallas_kernels.core.on_gpu.result import Result

KERNEL = "pallas_gpu"
BOTH = "forward + backward"
Rates = Mapping[tuple[str, str], float]


class Floor(NamedTuple):
    """The least time that a call can take here, and what binds it."""

    seconds: float
    binds: str


def rates(rows: Iterable[Result]) -> dict[tuple[str, str], float]:
    """What the device does at best, by what was measured and dtype."""
    return {(r.operator, r.dtype): r.rate for r in rows if r.phase == "rates" and r.rate}


def floor(row: Result, known: Rates) -> Floor | None:
    """Bytes over the copy's rate, operations over the matrix product's, or exponentials."""
    dtype = row.dtype if row.dtype == "float32" else "bfloat16"
    pairs = (
        (row.bytes, known.get(("copy", "float32")), "bytes"),
        (row.flops if row.matrix else None, known.get(("matrix product", dtype)), "operations"),
        (row.transcendentals, known.get(("exponentials", "float32")), "exponentials"),
    )
    found = [Floor(work / rate, binds) for work, rate, binds in pairs if work and rate]
    return max(found) if found else None


def write(folder: pathlib.Path, name: str, rows: list[Result], head: str) -> None:
    """Writes NAME.md, NAME.csv and the plots, as far as the findings go."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / f"{name}.csv", rows)
    plots = _plots(folder, name, rows)
    (folder / f"{name}.md").write_text(markdown(rows, head, plots))


def markdown(rows: list[Result], head: str, plots: Iterable[str] = ()) -> str:
    """The whole page."""
    parts = [head, ""]
    parts += [f"![{one}]({one})" for one in plots]
    parts += ["", "## Figures to reach", "", *goals(rows), ""]
    parts += ["## Numerics on the device", "", *_numerics(rows), ""]
    parts += ["## Times", "", *_rates(rows), "", *_times(rows), ""]
    parts += ["## Beside flash-linear-attention and cuDNN's attention", "", *_peers(rows), ""]
    if any(r.phase == "models" for r in rows):
        parts += ["## Whole models", "", *_models(rows), ""]
    return "\n".join(parts)


def goals(rows: list[Result]) -> list[str]:
    """The figures of the issue, each with what was measured."""
    known = rates(rows)
    told = ["| figure | measured | |", "|---|---|---|"]

    def add(text: str, value: float | None, least: float, form: str = "{:.2f}x") -> None:
        said = "not measured" if value is None else form.format(value)
        good = "" if value is None else ("reached" if value >= least else "**missed**")
        told.append(f"| {text} | {said} | {good} |")

    checks = [r for r in rows if r.phase == "numerics" and not r.status.startswith("refused")]
    right = [r for r in checks if r.status == "ok"]
    told.append(
        f"| every kernel right on the device | {len(right)} of {len(checks)} | "
        f"{'reached' if checks and len(right) == len(checks) else '**missed**'} |"
    )
    times = [r for r in rows if r.phase in ("times", "ours")]
    by = {(r.operator, r.call, r.dtype, r.part, r.what): r for r in times if r.seconds}
    for key, row in by.items():
        operator, call, dtype, part, what = key
        if what != KERNEL:
            continue
        least = floor(row, known)
        share = least.seconds / row.seconds if least and row.seconds else None
        other = lambda w, k=key: by.get((*k[:4], w))
        name = f"{operator} {call} {dtype} {part}"
        if operator == "selective_scan" and part == "forward":
            add(f"{name}: at most 1.6x its floor", share, 1 / 1.6, "{:.0%} of it")
        elif operator in ("gated_delta_rule", "taylor_attention", "neural_memory", "long_conv"):
            add(f"{name}: 40 % of its roof", share, 0.4, "{:.0%}")
        scan, xla = other("associative_scan"), other("xla")
        if scan and call == "b8_l2048_d2048_n16":
            add(f"{name}: 10x associative_scan", scan.seconds / row.seconds, 10)  # type: ignore
        if xla and part == BOTH and (row.tokens or 0) >= 4096 and operator != "monarch_matmul":
            add(f"{name}: 1.5x xla", xla.seconds / row.seconds, 1.5)  # type: ignore[operator]
    for row in rows:
        mine = by.get((row.operator, row.call, row.dtype, row.part, KERNEL))
        asked = row.operator in ("gated_delta_rule", "gla", "taylor_attention")
        tokens = any(t in row.call for t in ("T2048", "T8192"))
        if row.phase == "peers" and row.part == BOTH and asked and tokens:
            value = row.seconds / mine.seconds if mine and mine.seconds and row.seconds else None
            add(f"{row.operator} {row.call} {row.part}: 1.0x {row.what}", value, 1)
    return told


def _numerics(rows: list[Result]) -> list[str]:
    told = ["| call | dtype | what | largest error | allowed | |", "|---|---|---|---:|---:|---|"]
    for row in (r for r in rows if r.phase == "numerics"):
        error = "" if row.error is None else f"{row.error:.1e}"
        allowed = "" if row.allowed is None else f"{row.allowed:.1e}"
        call = f"{row.operator} {row.call}"
        told.append(f"| {call} | {row.dtype} | {row.part} | {error} | {allowed} | {_status(row)} |")
    return told


def _rates(rows: list[Result]) -> list[str]:
    told = ["| the device at best | dtype | per second |", "|---|---|---:|"]
    for row in (r for r in rows if r.phase == "rates"):
        rate = _status(row) if row.rate is None else f"{row.rate / 1e12:,.2f} T"
        rate = _us(row.seconds) + " each" if row.rate and "nothing" in row.operator else rate
        told.append(f"| {row.operator} | {row.dtype} | {rate} |")
    return told


def _times(rows: list[Result]) -> list[str]:
    known = rates(rows)
    told = [
        "| call | dtype | pass | kernel | floor | of it | xla | by xla | associative_scan |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str, str], dict[str, Result]] = {}
    for row in (r for r in rows if r.phase == "times"):
        key = (f"{row.operator} {row.call}".strip(), row.dtype, row.part)
        groups.setdefault(key, {})[row.what] = row
    for key, found in groups.items():
        mine, xla, scan = found.get(KERNEL), found.get("xla"), found.get("associative_scan")
        least = floor(mine, known) if mine else None
        share = least.seconds / mine.seconds if least and mine and mine.seconds else None
        cells = (
            _cell(mine),
            f"{_us(least.seconds)} ({least.binds})" if least else "",
            "" if share is None else f"{share:.0%}",
            *(_cell(xla), _over(xla, mine), _cell(scan, blank=True)),
        )
        told.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return told


def _peers(rows: list[Result]) -> list[str]:
    agree = [r for r in rows if r.phase == "peers" and r.call == "agreement"]
    told = ["| agreement at one shape | peer | error | |", "|---|---|---:|---|"]
    for row in agree:
        error = "" if row.error is None else f"{row.error:.1e}"
        told.append(f"| {row.operator} {row.detail} | {row.what} | {error} | {_status(row)} |")
    told += ["", "| shape | pass | what | time | by our kernel |", "|---|---|---|---:|---:|"]
    timed = [r for r in rows if r.phase in ("peers", "ours", "attention") and r not in agree]
    order = {name: i for i, name in enumerate(dict.fromkeys(r.call for r in timed))}
    timed.sort(key=lambda r: (order[r.call], r.part, r.operator))
    mine = {(r.operator, r.call, r.part): r for r in timed if r.what == KERNEL}
    for row in timed:
        what = f"{row.operator}: {row.what}" if row.operator != "attention" else row.what
        over = _over(row, mine.get((row.operator, row.call, row.part)))
        told.append(f"| {row.call} | {row.part} | {what} | {_cell(row)} | {over} |")
    return told


def _models(rows: list[Result]) -> list[str]:
    known = rates(rows)
    best = known.get(("matrix product", "bfloat16"))
    told = [
        "| model | rows x tokens | by | tokens/s | of the matrix products' rate | an update | |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in (r for r in rows if r.phase == "models"):
        seconds, speed, share = row.seconds, "", ""
        if seconds:
            speed = f"{(row.tokens or 0) / seconds:,.0f}"
            share = f"{(row.flops or 0) / seconds / best:.1%}" if best else ""
        cells = (row.operator, row.call, row.what, speed, share, _cell(row), row.detail)
        told.append(f"| {' | '.join(cells)} |")
    return told


def _plots(folder: pathlib.Path, name: str, rows: list[Result]) -> list[str]:
    known = rates(rows)
    times = [r for r in rows if r.phase == "times" and r.seconds]
    by = {(r.name, r.what): r for r in times}
    faster, shares = [], []
    for (call, what), row in by.items():
        xla, least = by.get((call, "xla")), floor(row, known)
        if what != KERNEL or not row.seconds:
            continue
        if xla and xla.seconds:
            faster.append((call, xla.seconds / row.seconds))
        if least:
            shares.append((call, least.seconds / row.seconds))
    files = []
    for file, title, values, mark in (
        (f"{name}-by-xla.svg", "times faster than the portable form (xla)", faster, 1.0),
        (f"{name}-of-floor.svg", "the floor by the kernel's time", shares, 1.0),
    ):
        if values:
            (folder / file).write_text(bars.svg(title, values, mark))
            files.append(file)
    return files


def _status(row: Result) -> str:
    text = row.status.replace("|", "/")
    return f"**{text}**" if row.bad else text


def _cell(row: Result | None, *, blank: bool = False) -> str:
    """A time, or why there is none; never nothing where something was to be measured."""
    if row is None:
        return "" if blank else "**not measured**"
    return _us(row.seconds) if row.seconds is not None else _status(row)


def _over(row: Result | None, mine: Result | None) -> str:
    if row is None or mine is None or row is mine or not row.seconds or not mine.seconds:
        return ""
    return f"{row.seconds / mine.seconds:.2f}x"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.1f} us"
