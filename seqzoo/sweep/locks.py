"""Which trials are held, by locks in the study's folder."""

import contextlib
import os
import pathlib
import socket
import time

from seqzoo.errors import LockedError
from seqzoo.train.lock import RunLock
from seqzoo.train.run_files import read_json

_FRESH_SECONDS = 60.0  # a lock that moved so lately has a living holder


def folder(study: pathlib.Path, number: int) -> pathlib.Path:
    """Where the lock of a trial lies."""
    return study / "claims" / f"{number:05d}"


def held_elsewhere(study: pathlib.Path, number: int) -> bool:
    """Whether a process on another host moved the lock lately, by the look of its file.

    On this host the lock itself is asked: the kernel drops it when its holder dies.
    """
    holder, age = _holder(study, number)
    if not holder or holder.get("host") == socket.gethostname():
        return False
    return age < _FRESH_SECONDS


def alive(study: pathlib.Path, number: int) -> bool:
    """Whether somebody works on a trial, as far as can be seen without taking its lock."""
    holder, age = _holder(study, number)
    if not holder or age > _FRESH_SECONDS:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (OSError, KeyError, ValueError):
        return False
    return True


def fresh(began: float) -> bool:
    """Whether a time of the clock is so near that whoever began then is about to say where."""
    return time.time() - began <= _FRESH_SECONDS


def _holder(study: pathlib.Path, number: int) -> tuple[dict, float]:
    """What the lock's file says, and seconds since it moved."""
    file = folder(study, number) / ".lock"
    if not file.exists():
        return {}, 0.0
    return read_json(file), time.time() - file.stat().st_mtime


@contextlib.contextmanager
def held(folder: pathlib.Path, patience: float = 0.0):
    """Holds a folder for this process; waits for another one so many seconds.

    Raises:
        LockedError: it is still held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    while True:
        try:
            lock = RunLock(folder)
            break
        except LockedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()
