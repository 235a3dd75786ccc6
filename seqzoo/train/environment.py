"""What a run was started with: code, versions, devices, threads. One record per start.

Imports no jax; where jax runs already, its devices are named.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

_PACKAGES = ("seqzoo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Packages whose version says what they are; any other package that a config names is hashed.
_LIBRARIES = frozenset({"jax", "flax", "optax", "grain", "numpy", "torch"})
_VARIABLES = ("NPROC", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")
# A config may name a module that lies in a large folder of something else.
_MOST_FILES = 3000


def describe(targets: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the record of this start.

    Args:
      targets: the ``_target_`` names of the config, whose packages are code of the run too.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_state(),
        "code": code_hashes(targets),
        "devices": devices(),
        "threads": threads(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns one sentence for each thing that changed and may change the numbers."""
    found = logged_changes(before, now.get("logged", {}))
    for name, hashed in now.get("code", {}).items():
        earlier = before.get("code", {}).get(name)
        if earlier is not None and earlier != hashed:
            found.append(f"the code of {name} changed{_commits(before, now)}")
    for name, version in now.get("versions", {}).items():
        earlier = before.get("versions", {}).get(name)
        # seqzoo's own version is part of its code, above.
        if name != "seqzoo" and earlier is not None and earlier != version:
            found.append(f"{name} was {earlier}, is {version}")
    for name in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION"):
        earlier = before.get("variables", {}).get(name, "")
        setting = now["variables"].get(name, "")
        if earlier != setting:
            found.append(f"{name} was {earlier!r}, is {setting!r}")
    if before.get("python", "").split(".")[:2] != now["python"].split(".")[:2]:
        found.append(f"Python was {before.get('python')}, is {now['python']}")
    return found


def logged_changes(before: Mapping[str, Any], logged: Mapping[str, Any]) -> list[str]:
    """Returns one sentence for each setting of the log that is not as in the record `before`."""
    earlier = before.get("logged") or {}
    return [
        f"{name} was {_yaml(earlier[name])}, is {_yaml(value)}"
        for name, value in logged.items()
        if name in earlier and earlier[name] != value
    ]


def threads() -> int:
    """Returns how many threads XLA's CPU client takes: NPROC, else the CPUs we may run on."""
    value = os.environ.get("NPROC", "")
    if value.isdigit() and int(value) > 0:
        return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(count: int) -> bool:
    """Pins the CPU thread count (it changes bits). Returns False when jax has started already."""
    if count == threads():
        return True
    if jax_started():
        return False
    os.environ["NPROC"] = str(count)
    return True


def versions() -> dict[str, str]:
    """Returns the installed version of each package that numbers may depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Returns {commit, dirty} of the checkout that seqzoo runs from; commit None in a wheel."""
    folder = pathlib.Path(__file__).resolve().parents[2]
    top = _git(folder, "rev-parse", "--show-toplevel")
    # An environment inside somebody's checkout is not a checkout of seqzoo.
    if top is None or pathlib.Path(top).resolve() != folder:
        return {"commit": None, "dirty": None}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changed)}


def code_hashes(targets: Iterable[str] = ()) -> dict[str, str]:
    """Returns a hash of the sources of seqzoo, pallas_kernels and the packages of `targets`."""
    names = {target.split(".")[0] for target in targets} - _LIBRARIES
    found = {}
    for name in sorted(names | {"seqzoo", "pallas_kernels"}):
        hashed = _hash_package(name)
        if hashed is not None:
            found[name] = hashed
    return found


def _hash_package(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        files = [
            (path, str(path.relative_to(location)))
            for location in spec.submodule_search_locations
            for path in sorted(pathlib.Path(location).rglob("*.py"))[:_MOST_FILES]
        ]
    else:
        files = [(pathlib.Path(spec.origin), name)] if spec.origin else []
    digest = hashlib.sha256()
    for path, inside in files:
        digest.update(inside.encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def jax_started() -> bool:
    """Whether jax has chosen its devices, after which flags change nothing."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is None:
        return False
    initialized = getattr(bridge, "backends_are_initialized", None)
    return True if initialized is None else bool(initialized())


def devices() -> dict[str, Any] | None:
    """Returns what jax computes on, or None while jax has not started."""
    if not jax_started():
        return None
    jax = sys.modules["jax"]
    found = jax.devices()
    return {
        "platform": found[0].platform,
        "kind": found[0].device_kind,
        "count": len(found),
        "processes": jax.process_count(),
    }


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


def _commits(before: dict[str, Any], now: dict[str, Any]) -> str:
    def name(record):
        git = record.get("git", {})
        commit = (git.get("commit") or "no commit")[:10]
        return commit + (" with local changes" if git.get("dirty") else "")

    return f" (was at {name(before)}, is at {name(now)})"
