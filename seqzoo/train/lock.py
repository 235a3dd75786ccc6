"""One process per run folder: flock on this host, a heartbeat for the others."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from datetime import datetime

from seqzoo.errors import LockedError

_BEAT_SECONDS = 5.0
# A file system shared by hosts may not share flock. A holder on another host that has not moved
# its heartbeat for this long is dead.
_STALE_SECONDS = 30.0


class RunLock:
    """Holds a run folder for this process until `release` or the end of the process.

    The lock is flock on the file ``.lock``: the kernel drops it when the process ends, however it
    ends. The file also says who holds it (host, pid, since) and carries a beat that a thread moves
    every few seconds, for hosts that do not see each other's flock.

    Raises:
      LockedError: another process works in the folder; the message names it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        beat_seconds: float = _BEAT_SECONDS,
        stale_seconds: float = _STALE_SECONDS,
    ):
        self.path = pathlib.Path(folder) / ".lock"
        self._beat_seconds = beat_seconds
        self._done = threading.Event()
        self._file = self._acquire(stale_seconds)
        self._since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._beat = 0
        self._write()
        # A forked child must not keep the lock alive after its parent has died.
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the folder back; harmless when repeated."""
        if self._file < 0:
            return
        self._done.set()
        self._thread.join()
        os.ftruncate(self._file, 0)
        self._forget()

    def _acquire(self, stale_seconds: float) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reach = "host"
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = _read(descriptor)
                os.close(descriptor)
                raise LockedError(_refusal(self.path.parent, holder)) from None
            reach = "nobody"  # a file system without flock: the beat alone must do
        holder = _read(descriptor)
        # With flock in hand nobody on this host works here; on another one somebody may.
        elsewhere = reach == "nobody" or holder.get("host") != socket.gethostname()
        if holder and elsewhere and _still_beating(descriptor, holder, stale_seconds):
            os.close(descriptor)
            raise LockedError(_refusal(self.path.parent, holder))
        return descriptor

    def _write(self) -> None:
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "beat": self._beat,
        }
        data = json.dumps(content).encode()
        # In place, never renamed: flock holds the file, not its name.
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))

    def _keep_beating(self) -> None:
        while not self._done.wait(self._beat_seconds):
            self._beat += 1
            with contextlib.suppress(OSError):  # a full disk must not end the run from here
                self._write()

    def _forget(self) -> None:
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)


def _still_beating(descriptor: int, holder: dict, stale_seconds: float) -> bool:
    """Watches the beat of a holder on another host; needs no agreement between clocks."""
    if time.time() - os.fstat(descriptor).st_mtime > 10 * stale_seconds:
        return False
    end = time.monotonic() + stale_seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, stale_seconds / 4))
        now = _read(descriptor)
        if now and now.get("beat") != holder.get("beat"):
            return True
    return False


def _read(descriptor: int) -> dict:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or caught while being written
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(folder: pathlib.Path, holder: dict) -> str:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return (
        f"run folder {folder} is in use by {who}. One process works in a folder at a time: "
        "wait for it, stop it, or change a setting such as trainer.seed for a run of its own"
    )
