"""The parts of a report: one HTML page that opens without a network, and CSV files."""

import base64
import csv
import html
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any


def write_rows(
    rows: Iterable[Mapping[str, Any]], file: pathlib.Path, columns: Sequence[str] | None = None
) -> None:
    """Writes rows as CSV."""
    rows = list(rows)
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_page(file: pathlib.Path, title: str, body: Iterable[str]) -> pathlib.Path:
    """Writes a page that opens without a network; returns its path."""
    made = datetime.now().astimezone().isoformat(timespec="minutes")
    page = _PAGE.format(title=html.escape(title), body="\n".join(filter(None, body)), made=made)
    file.write_text(page, encoding="utf-8")
    return file


def table(rows: Sequence[Mapping[str, Any]], *, across: bool = True) -> str:
    """A table of rows with equal keys; across=False turns it by its diagonal."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if across:
        lines = ["".join(f"<th>{html.escape(c)}</th>" for c in columns)]
        lines += ["".join(cell(row.get(c)) for c in columns) for row in rows]
    else:
        lines = [
            f"<th class=left>{html.escape(c)}</th>" + "".join(cell(row.get(c)) for row in rows)
            for c in columns
        ]
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=wide><table>{inside}</table></div>"


def cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
    return f"<td class=number>{text}</td>"


def flat_rows(tree: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """A nested mapping as rows of key and value."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += flat_rows(value, f"{prefix}{key}.")
        else:
            rows.append({"key": f"{prefix}{key}", "value": "null" if value is None else str(value)})
    return rows


def details(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table behind a title that unfolds."""
    return f"<details><summary>{html.escape(title)}</summary>{table(rows)}</details>"


def note(text: str) -> str:
    """A remark."""
    return f"<p class=note>{html.escape(text)}</p>"


def image(file: pathlib.Path) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }}
h1 {{ font-size: 1.35rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.05rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; margin: .6rem 0; }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: left;
  white-space: nowrap; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
th.left {{ font-weight: 500; color: #555; }}
.note {{ border-left: 3px solid #d55e00; padding-left: .7rem; margin: .4rem 0; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }} footer {{ color: #777; }}
</style></head><body>
<h1>{title}</h1>
{body}
<footer>seqzoo report, {made}</footer>
</body></html>
"""
