"""Tables of tile sizes that were measured: one JSON file per kind of device.

    {"device_kind": "TPU v5 lite", "entries": [
        {"form": "selective_scan.pallas_tpu", "sizes": {"b": 1, "t": 2048, "e": 1536, "n": 16},
         "fields": {"chunk": 64}, "milliseconds": 1.2, "heuristic_milliseconds": 1.5, ...}]}

An entry serves calls of equal sizes, batch and time apart: of several the one of the nearest time.
"""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

VARIABLE = "PALLAS_KERNELS_TUNED"
_SHIPPED = pathlib.Path(__file__).parent / "tables"
_FREE = ("b", "t")  # letters that an entry may differ in
_LOG = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A call of Config.of: the class, and the sizes that it was asked for."""

    config: type
    sizes: dict[str, int]
    device_kind: str | None


_ASKED: list[list[Asked]] = []


@contextlib.contextmanager
def asked() -> Iterator[list[Asked]]:
    """Collects which configurations are asked for while something is traced."""
    found: list[Asked] = []
    _ASKED.append(found)
    try:
        yield found
    finally:
        _ASKED.remove(found)


def note(config: type, sizes: Mapping[str, int], device_kind: str | None) -> None:
    """Tells `asked` of a call."""
    for found in _ASKED:
        found.append(Asked(config, dict(sizes), device_kind))


def fields_for(
    config: type, sizes: Mapping[str, int], device_kind: str | None
) -> dict[str, Any] | None:
    """The fields of a configuration that were measured to be best for these sizes, or None."""
    if device_kind is None:
        return None
    form, best = form_of(config), None
    for path in _files(device_kind):
        near = [e for e in _entries(path, _changed(path)) if _serves(e, form, sizes)]
        if near:
            best = min(near, key=lambda e: _distance(e["sizes"], sizes))
            break
    return dict(best["fields"]) if best else None


def form_of(config: type) -> str:
    """How tables name the form of a configuration class: "selective_scan.pallas_tpu"."""
    return ".".join(config.__module__.split(".")[-2:])


def file_name(device_kind: str) -> str:
    """The name of a device's table."""
    return "-".join(device_kind.lower().split()) + ".json"


def write(path: pathlib.Path, device_kind: str, entries: list[dict[str, Any]]) -> None:
    """Puts entries into a table; they replace those of the same form and sizes.

    Raises:
        ValueError: the file is of another device.
    """
    table: dict[str, Any] = {"device_kind": device_kind, "entries": []}
    if path.exists():
        table = json.loads(path.read_text())
        if table["device_kind"] != device_kind:
            raise ValueError(f"{path} is a table of {table['device_kind']}, not of {device_kind}")
    key = lambda e: (e["form"], sorted(e["sizes"].items()))
    new = [key(e) for e in entries]
    kept = [e for e in table["entries"] if key(e) not in new]
    table["entries"] = sorted([*kept, *entries], key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


def _files(device_kind: str) -> list[pathlib.Path]:
    """The tables of a device that there are, the user's first."""
    name = file_name(device_kind)
    found = [_SHIPPED / name]
    if os.environ.get(VARIABLE):
        own = pathlib.Path(os.environ[VARIABLE])
        found.insert(0, own / name if own.is_dir() else own)
    told = [path for path in found if path.is_file()]
    return [path for path in told if _kind(path, _changed(path)) == device_kind]


def _serves(entry: Mapping[str, Any], form: str, sizes: Mapping[str, int]) -> bool:
    fixed = lambda of: {k: v for k, v in of.items() if k not in _FREE}
    return entry["form"] == form and fixed(entry["sizes"]) == fixed(sizes)


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    return sum(abs(math.log(max(1, one.get(k, 1)) / max(1, other.get(k, 1)))) for k in _FREE)


def _changed(path: pathlib.Path) -> int:
    return path.stat().st_mtime_ns


def _kind(path: pathlib.Path, changed: int) -> str | None:
    return _load(path, changed).get("device_kind")


def _entries(path: pathlib.Path, changed: int) -> list[dict[str, Any]]:
    return _load(path, changed).get("entries", [])


@functools.lru_cache(maxsize=16)
def _load(path: pathlib.Path, changed: int) -> dict[str, Any]:
    """A table; one that cannot be read counts as empty, with a warning."""
    del changed  # part of the cache's key
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        _LOG.warning("%s is no table of tile sizes: %s", path, error)
        return {}
