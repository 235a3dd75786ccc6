"""One finding of the report. Imports nothing but Python's own: the peers' process has no jax."""

import csv
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One row of the report; None = not measured.

    Attributes:
        phase: "numerics", "rates", "times", "attention", "peers", "ours".
        operator: its name, or what was measured.
        call: of arg_specs.py, or a shape.
        dtype: of the arguments along time.
        part: "forward", "forward + backward", "gradients, states", ...
        what: "pallas_gpu", "xla", "associative_scan", "cuDNN", "fla chunk_gla", ...
        status: "ok", or "WRONG: ...", "CRASHED: ...", "TOO LONG: ...", "missing: ...",
            "refused: ...", "NOT WRITTEN: ...", "skipped: ...".
        error: the largest relative root mean square error of an array.
        allowed: what it may be.
        seconds: of a call, the median of the rounds.
        fastest: of the rounds.
        slowest: of the rounds.
        flops: that the call needs at least.
        bytes: that it moves at least.
        transcendentals: exponentials that it needs at least.
        matrix: 1 where its operations are matrix products.
        tokens: in a sequence.
        rate: of the device, in units per second (bytes, operations, exponentials).
        detail: more words.
    """

    phase: str
    operator: str
    call: str = ""
    dtype: str = ""
    part: str = ""
    what: str = ""
    status: str = "ok"
    error: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    flops: float | None = None
    bytes: float | None = None
    transcendentals: float | None = None
    matrix: int | None = None
    tokens: int | None = None
    rate: float | None = None
    detail: str = ""

    @property
    def name(self) -> str:
        return " ".join(x for x in (self.operator, self.call, self.dtype, self.part) if x)

    @property
    def bad(self) -> bool:
        """Whether it is a red cell."""
        return self.status != "ok" and not self.status.startswith("refused")


def write(path: pathlib.Path, rows: Iterable[Result]) -> None:
    """Writes the table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        for row in rows:
            writer.writerow(["" if x is None else _short(x) for x in row])


def read(path: pathlib.Path) -> list[Result]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return [_row(one) for one in csv.DictReader(file)]


def _row(told: dict[str, str]) -> Result:
    values: dict[str, Any] = {}
    for field, text in told.items():
        kind = Result.__annotations__[field]
        if kind is str:
            values[field] = text
        else:
            values[field] = (int(text) if kind == int | None else float(text)) if text else None
    return Result(**values)


def _short(x: Any) -> Any:
    return f"{x:.6g}" if isinstance(x, float) and math.isfinite(x) else x


def line(row: Result) -> str:
    """One row for a terminal."""
    head = f"{row.phase:<9} {row.name:<62} {row.what:<20}"
    if row.status != "ok":
        return f"{head} {row.status}"
    told = []
    if row.error is not None:
        told.append(f"error {row.error:.1e} (allowed {row.allowed or 0:.1e})")
    if row.seconds is not None:
        told.append(f"{1e6 * row.seconds:,.1f} us")
    if row.rate is not None and row.rate > 1e9:
        told.append(f"{row.rate / 1e12:.2f} T/s")
    return " ".join([head, *told, row.detail]).rstrip()
