"""The files of a run folder, read and written: whole at any moment, readable where a disk was full.

Imports no jax, so that commands that only read runs start quickly.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def read_status(path: str | os.PathLike) -> dict[str, Any]:
    """Returns status.json of a run folder, empty where there is none."""
    file = pathlib.Path(path) / "status.json"
    return read_json(file) if file.exists() else {}


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; a last line that was being written is left out."""
    file = pathlib.Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def find_runs(root: str | os.PathLike = "runs") -> list[pathlib.Path]:
    """Returns every run folder under `root`, oldest status first."""
    found = [file.parent for file in pathlib.Path(root).glob("*/*/status.json")]
    found = [path for path in found if not path.is_symlink()]
    return sorted(found, key=lambda path: (path / "status.json").stat().st_mtime)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns a JSON object; an unreadable one is an empty one (a disk may have been full)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON beside `path` and renames it there."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text beside `path` and renames it there; on failure `path` stays as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
