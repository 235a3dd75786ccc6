"""Arguments and small printing that several commands share."""

import argparse
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seqzoo.errors import ConfigError


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the key=value words and --config-dir."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings; docs/keys.md lists them",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="your own config groups, beside ours")


def add_run_arguments(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Adds the positional run folder (or folders)."""
    if many:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    else:
        parser.add_argument("run", metavar="RUN", help="a run folder")


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --trust: which packages a stored configuration may name."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package whose classes the run's stored configuration may name (also SEQZOO_TRUST)",
    )


def run_path(name: str) -> pathlib.Path:
    """Returns a run folder, links followed.

    Raises:
        ConfigError: it is none.
    """
    path = pathlib.Path(name)
    if not path.is_dir():
        raise ConfigError(f"{name}: there is no such folder; 'seqzoo runs' lists the runs here")
    if not (path / "config.yaml").is_file():
        inside = sorted(p.parent for p in path.glob("*/config.yaml") if not p.parent.is_symlink())
        hint = f"; it holds runs, as {inside[-1]}" if inside else "; 'seqzoo runs' lists the runs"
        raise ConfigError(f"{name} is no run folder: it has no config.yaml{hint}")
    return path.resolve()


def print_table(rows: Sequence[Mapping[str, Any]], *, missing: str = "") -> None:
    """Prints rows with equal keys as aligned columns, numbers to the right."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [[cell(row.get(column), missing) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *texts]) for i in range(len(columns))]
    numeric = [
        all(isinstance(row.get(c), int | float | None) for row in rows)
        and any(c in r for r in rows)
        for c in columns
    ]
    for line in [columns, *texts]:
        cells = zip(line, widths, numeric, strict=True)
        print("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in cells).rstrip())


def cell(value: Any, missing: str = "") -> str:
    """One value as people read it."""
    if value is None:
        return missing
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(cell(item) for item in value) + "]"
    return str(value)


def bytes_text(n: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return ""


def print_json(content: Any) -> None:
    """Prints JSON for programs."""
    print(json.dumps(content, indent=2, default=str))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields ``("model.d_model", 64), ...`` of nested mappings."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flat(value, path)
        else:
            yield path, value
