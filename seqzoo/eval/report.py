"""Plots and tables of runs: PNG, CSV, and one HTML page that opens without a network."""

import functools
import html
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seqzoo.config.trust import load_untrusted
from seqzoo.eval import describe, page, plots
from seqzoo.eval.compare import Comparison, Row, Size, check_same_data, compare, learned
from seqzoo.eval.records import Record, read, read_all, series


def write_report(
    run: str | pathlib.Path,
    *,
    folder: str | pathlib.Path | None = None,
    trust: Iterable[str] = (),
) -> pathlib.Path:
    """Writes the report of one run: curves, metrics.csv and index.html, whose path it returns.

    Args:
        run: the run folder.
        folder: where to write; None = report/ in the run folder.
        trust: packages that the stored configuration may name, to count the model's parameters.
    """
    record = read(pathlib.Path(run))
    folder = record.path / "report" if folder is None else pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = plots.draw([record], folder)
    _write_series([record], folder / "metrics.csv")
    size, why = size_of(record, trust)
    body = [
        page.table([facts(record, size)], across=False),
        *([f"<p class=note>{html.escape(why)}</p>"] if why else []),
        *(page.note(text) for text in _warnings(record)),
        *_evaluations([record]),
        *map(page.image, images),
        page.details("configuration", page.flat_rows(record.config)),
    ]
    return page.write_page(folder / "index.html", f"{record.path.parent.name}/{record.label}", body)


def write_comparison(
    runs: Sequence[str | pathlib.Path], folder: str | pathlib.Path, *, trust: Iterable[str] = ()
) -> tuple[pathlib.Path, Comparison]:
    """Writes a report of several runs into `folder`: one table, curves on shared axes.

    Returns:
        The path of index.html, and what the table holds.

    Raises:
        ConfigError: the runs saw different data, or are scored by different metrics.
    """
    records = read_all([pathlib.Path(run) for run in runs])
    check_same_data(records)
    sizes, notes = {}, []
    for record in records:
        size, why = size_of(record, trust)
        if size is not None:
            sizes[record.path] = size
        if why:
            notes.append(why)
    found = compare(records, sizes)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = plots.draw(records, folder)
    _write_series(records, folder / "metrics.csv")
    rows = table(found)
    page.write_rows(rows, folder / "comparison.csv")
    body = [
        page.table(rows),
        page.note(
            f"matched on {' and '.join(found.matched)}" if found.matched else "matched on nothing"
        )
        if len(found.rows) > 1
        else "",
        *(page.note(text) for text in (*found.remarks, *dict.fromkeys(notes))),
        *_evaluations(records),
        *map(page.image, images),
    ]
    title = f"{len(records)} runs compared"
    return page.write_page(folder / "index.html", title, body), found


def size_of(record: Record, trust: Iterable[str] = ()) -> tuple[Size | None, str | None]:
    """Counts what a run's model costs; (None, why) where it cannot be built here."""
    try:
        config = load_untrusted(record.path / "config.yaml", trust)
        return _size(json.dumps({key: config[key] for key in ("model", "task", "data")})), None
    except Exception as error:  # a stranger's model may fail in any way; the report goes on
        return None, f"{record.label}: the size of its model could not be had: {error}"


@functools.lru_cache(maxsize=64)
def _size(config_json: str) -> Size:
    config = json.loads(config_json)
    model = describe.abstract_model(config["model"])
    length = config["data"].get("seq_len") or 1024
    counted = describe.parameters(model)
    try:
        state = model.state_bytes(length)
    except NotImplementedError:  # an encoder keeps none
        state = {"recurrent": 0, "total": 0}
    return Size(
        counted.total,
        counted.without_embeddings,
        state["recurrent"],
        state["total"],
        describe.flops_per_token(config, length).training,
    )


def facts(record: Record, size: Size | None) -> dict[str, Any]:
    """What is said of one run."""
    start, metric = record.last_start, record.metric
    git = start.get("git") or {}
    devices = start.get("devices") or {}
    commit = (git.get("commit") or "")[:10] + (" (changed)" if git.get("dirty") else "")
    return {
        "state": record.status.get("state"),
        "step": record.status.get("step"),
        f"best {metric.get('name', 'metric')} (valid)": metric.get("value"),
        f"{metric.get('name', 'metric')} (test)": record.tested.get(metric.get("name", "")),
        "target": metric.get("target"),
        "parameters": size and size.parameters,
        "without embeddings": size and size.without_embeddings,
        "state bytes, recurrent": size and size.state_recurrent,
        "state bytes, all": size and size.state_total,
        "training FLOPs per token": size and round(size.flops_per_token),
        "tokens read": record.tokens,
        "seed": record.seed,
        "commit": commit or None,
        "hash": record.status.get("hash"),
        "data fingerprint": record.fingerprint,
        "device": " ".join(str(devices[k]) for k in ("kind", "count") if k in devices) or None,
        "versions": ", ".join(f"{k} {v}" for k, v in (start.get("versions") or {}).items()),
        "implementation": implementation(record.config),
        "precision": (record.config.get("model") or {}).get("dtype"),
        "starts": len(record.starts),
    }


def implementation(config: Mapping[str, Any]) -> str:
    """The implementations that a configuration asks for; auto = the best at the time."""
    mixers = (config.get("model") or {}).get("mixers") or {}
    found = {str(m.get("implementation") or "auto") for m in mixers.values() if m}
    return ", ".join(sorted(found)) or "auto"


def table(found: Comparison) -> list[dict[str, Any]]:
    """The rows of a comparison as they are shown and written as CSV."""
    return [_shown(found, place, row) for place, row in enumerate(found.rows, 1)]


def _shown(found: Comparison, place: int, row: Row) -> dict[str, Any]:
    n = len(row.values)
    many = n > 1
    targets = {record.metric.get("target") for record in row.records} - {None}
    solved = None
    if len(targets) == 1:
        target = next(iter(targets))
        better = (lambda v: v >= target) if found.mode == "max" else (lambda v: v <= target)
        solved = f"{sum(map(better, row.values))}/{n}"
    shared = facts(row.records[0], row.size)
    taken = {implementation(record.config) for record in row.records}
    shared["implementation"] = "; ".join(sorted(taken))
    config = row.records[0].config
    own = (f"best {found.metric} (valid)", f"{found.metric} (test)")
    for one in ("state", "step", "target", "seed", "starts", *own):
        shared.pop(one, None)
    return {
        "place": place,
        "run": row.label,
        "runs": n,
        f"{found.metric} ({found.split})": row.median,
        "min - max": f"{min(row.values):.4g} - {max(row.values):.4g}" if many else None,
        "95 %": f"{row.low:.4g} - {row.high:.4g}" if many else None,
        "solved": solved,
        "diverged": sum(record.diverged for record in row.records),
        "lr": (config.get("optimizer") or {}).get("lr"),
        **shared,
    }


def _evaluations(records: Sequence[Record]) -> list[str]:
    """Tables of `seqzoo eval`; slices are shown only where the easy form was learned."""
    parts = []
    for record in records:
        for name, one in record.evaluations.items():
            metrics = one.get("metrics") or {}
            easy = learned(record.metric.get("name") or "", record.metric.get("value"))
            rows = [
                {"metric": key, "value": value if easy or "/" not in key else "not learned"}
                for key, value in metrics.items()
            ]
            title = f"{record.label}: {name} ({one.get('split', '')}, step {one.get('step')})"
            parts += [f"<h2>{html.escape(title)}</h2>", page.table(rows)]
    return parts


def _warnings(record: Record) -> list[str]:
    log = record.path / "train.log"
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.partition("warning: ")[2] for line in lines if "warning: " in line]
    return [f"warning: {text}" for text in dict.fromkeys(found)][-20:]


def _write_series(records: Sequence[Record], file: pathlib.Path) -> None:
    rows = (
        {"run": record.label, "name": name, "step": step, "value": value}
        for record in records
        for name, (steps, values) in {**series(record.timing), **series(record.metrics)}.items()
        for step, value in zip(steps, values, strict=True)
    )
    page.write_rows(rows, file, ("run", "name", "step", "value"))
