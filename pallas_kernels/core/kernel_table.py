"""The committed table of what kernels cost, and what counts as a regression of it."""

import csv
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

PATH = "docs/kernels.csv"  # in a checkout
COMPILED = "compiled"
FORWARD_ONLY = "compiled; backward is xla's"  # of a program with both passes


class Row(NamedTuple):
    """One pass of one call on one device. Bytes throughout; None = not known.

    Attributes:
        stack: versions of jax and libtpu.
        operator: its name.
        call: of arg_specs.py.
        dtype: of the arguments along time.
        device: generation.
        part: "forward", "backward" (memory of both together), "documents, state" or "documents".
        status: COMPILED, FORWARD_ONLY, "refused: ..." (dispatch takes xla), or what stood against
            it.
        kernels: names of the Pallas calls.
        vmem: vector memory of the largest kernel.
        limit: what it may take.
        raised: 1 where the kernel asks for more than the generation's default.
        bytes: through HBM, XLA's own passes among them.
        around: of which by XLA's passes.
        minimum: that the pass moves at least.
        saved: of what the forward pass keeps for the backward one.
        temp: HBM for temporaries of the compiled program.
        peak: HBM at most.
        xla_temp: of the portable form.
        xla_peak: of the portable form.
        bundles: instruction words of the kernels.
        fills: loads of spilled registers.
        spills: stores of them.
        inner: both, within innermost loops.
        seconds: to compile (not compared, not stored).
    """

    stack: str
    operator: str
    call: str
    dtype: str
    device: str
    part: str
    status: str = ""
    kernels: str = ""
    vmem: int | None = None
    limit: int | None = None
    raised: int | None = None
    bytes: int | None = None
    around: int | None = None
    minimum: int | None = None
    saved: int | None = None
    temp: int | None = None
    peak: int | None = None
    xla_temp: int | None = None
    xla_peak: int | None = None
    bundles: int | None = None
    fills: int | None = None
    spills: int | None = None
    inner: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return (self.stack, self.operator, self.call, self.device, self.part)

    @property
    def name(self) -> str:
        return f"{self.operator} {self.call} {self.part} on {self.device}"


# How far above the table a figure may lie: by a factor, and by so much.
_ALLOWED = {
    "vmem": (1.03, 65_536),
    "bytes": (1.02, 0),
    "hbm": (1.02, 0),
    "temp": (1.05, 1_048_576),
    "fills": (1.05, 8),
    "spills": (1.05, 8),
    "inner": (1.0, 0),
    "bundles": (1.25, 64),
    "registers": (1.0, 24),
    "spilled": (1.0, 0),
    "shared": (1.03, 1024),
}


def read(path: pathlib.Path, of: Any = Row) -> list:
    """The rows of a table; none where there is no file.

    Args:
        path: of the file.
        of: the NamedTuple of a row; fields that are no `str` hold whole numbers or nothing.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_row(one, of) for one in csv.DictReader(file)]


def _row(told: Mapping[str, str], of: Any) -> Any:
    values: dict[str, Any] = {}
    for field, text in told.items():
        is_text = of.__annotations__[field] is str
        values[field] = text if is_text else (int(text) if text else None)
    return of(**values)


def write(path: pathlib.Path, rows: Iterable, of: Any = Row) -> None:
    """Writes a table, sorted."""
    stored = [field for field in of._fields if field != "seconds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(stored)
        for row in sorted(rows, key=lambda row: row.key):
            values = row._asdict()
            writer.writerow(["" if values[f] is None else values[f] for f in stored])


def merged(old: Iterable, new: Iterable, whole: bool) -> list:
    """New rows in place of the old ones.

    Args:
        old: of the table.
        new: as measured.
        whole: whether everything of these stacks and operators was measured: then what is in the
            table beside it is of calls that are no more.
    """
    new = list(new)
    keys = {row.key for row in new}
    done = {(row.stack, row.operator) for row in new} if whole else set()
    kept = [r for r in old if r.key not in keys and (r.stack, r.operator) not in done]
    return [*kept, *new]


def compiles(row: Any) -> bool:
    """Whether there is a compiled kernel, and so figures of it."""
    return row.status in (COMPILED, FORWARD_ONLY)


def failed(row: Any) -> bool:
    """Whether a call neither compiles nor is refused."""
    return not compiles(row) and not row.status.startswith("refused")


def regressions(table: Iterable, found: Iterable) -> list[str]:
    """What got worse than the table says, one line each; a call without a row is one too.

    A figure that the table has and nobody tells now got worse: or a compiler that falls silent
    would pass. Rows are compared within a stack. One that the table knows nothing of is compared
    with none (`unknown_stack`): then only what does not compile is told.
    """
    known = {row.key: row for row in table}
    stacks = {row.stack for row in known.values()}
    wrong = []
    for row in found:
        before = known.get(row.key)
        if before is None:
            if failed(row):
                wrong.append(f"{row.name}: {row.status}")
            elif row.stack in stacks:
                wrong.append(f"{row.name}: the table has no row of it")
            continue
        if failed(row) or _passes(row) < _passes(before):
            wrong.append(f"{row.name}: {before.status} before, now {row.status}")
        if row.status != before.status or not compiles(row):  # figures of other kernels, or none
            continue
        for name in sorted(_names(before) - _names(row)):
            wrong.append(f"{row.name}: {name} is called no more")
        for field, (factor, more) in _ALLOWED.items():
            now, was = getattr(row, field, None), getattr(before, field, None)
            if was is not None and (now is None or now > factor * was + more):
                told = "not told" if now is None else f"{now:,}"
                wrong.append(f"{row.name}: {field} {was:,} -> {told}")
    return wrong


def vanished(table: Iterable, found: Iterable, asked: Callable[[Any], bool]) -> list[str]:
    """What the table has and nobody measured, one line each.

    Or a call whose tag is lost, a pass that is xla's now, or an operator whose kernel is gone,
    would pass: `regressions` goes by what was found.

    Args:
        table: the committed rows.
        found: as measured.
        asked: whether a row of the table is of what was to be measured.
    """
    found = list(found)
    keys, stacks = {row.key for row in found}, {row.stack for row in found if row.stack}
    broke = {row.operator for row in found if not row.stack}  # told already
    return [
        f"{row.name}: the table has a row of it and nothing was measured"
        for row in table
        if row.key not in keys
        and (row.stack in stacks or not stacks)
        and row.operator not in broke
        and asked(row)
    ]


def _passes(row: Any) -> int:
    """How many of both passes kernels serve."""
    return {COMPILED: 2, FORWARD_ONLY: 1}.get(row.status, 0)


def _names(row: Any) -> set[str]:
    """The kernels of a pass, where they have no rows of their own."""
    return set(getattr(row, "kernels", "").split())


def compared(table: Iterable, found: Iterable) -> int:
    """How many rows the table has something to say of."""
    known = {row.key for row in table}
    return sum(row.key in known for row in found)


def unknown_stack(table: Iterable, found: Iterable) -> str | None:
    """What is wrong where nothing can be compared: the stack that the table has no row of.

    A stack counts as a whole: of one that is known, a call without a row is told by `regressions`.
    """
    here = {row.stack for row in found if row.stack}  # none, where a process broke
    if not here or here & {row.stack for row in table}:
        return None
    return f"the table has no rows of stack {' or '.join(sorted(here))}; nothing was compared"
