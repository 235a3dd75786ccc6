"""Where a study lies, and patience where that place cannot be reached.

A journal file by default, with the lock that works on NFS; else any database that Optuna speaks
to. Nothing is lost while it is away: what was to be written is tried again.
"""

import functools
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from seqzoo.errors import ConfigError, SeqzooError

VARIABLE = "SEQZOO_STORAGE"
# What says that a storage is away, or busy; anything else is an error of ours.
AWAY = (OSError, StorageInternalError, SQLAlchemyError)
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
_PASSWORD = re.compile(r"(://[^:/@]*):[^@/]*@")

T = TypeVar("T")

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StorageError(SeqzooError):
    """The storage could not be reached for longer than the study has patience."""


class Patience:
    """Calls again what a storage refused, for a while.

    Args:
        place: of the storage, as it may be shown.
        seconds: how long.
        say: gets one line when waiting begins and one when it ends.
    """

    def __init__(self, place: str, seconds: float, say: Callable[[str], None] = print):
        self._place, self.seconds, self.say = place, seconds, say

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls `function`, which must do no harm when it was half done before.

        Raises:
            StorageError: it failed for too long.
        """
        began, wait, told = time.monotonic(), _FIRST_WAIT, False
        while True:
            try:
                found = function(*args, **kwargs)
            except AWAY as error:
                why = _first_line(error)
                if time.monotonic() - began + wait > self.seconds:
                    raise StorageError(
                        f"the storage {self._place} cannot be reached: {why}. Tried for "
                        f"{self.seconds:.0f} s (sweep.patience_minutes). Nothing is lost: bring "
                        "it back, then run the same command, or 'seqzoo sweep resume STUDY'"
                    ) from error
                if not told and wait > 1:
                    self.say(f"the storage {self._place} is away ({why}); trying again")
                    told = True
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            else:
                if told:
                    self.say("the storage is back")
                return found


def open_storage(url: str | None, folder: pathlib.Path) -> BaseStorage:
    """Opens a study's storage.

    Args:
        url: of a database; None = the journal in the study's folder.
        folder: of the study.

    Raises:
        ConfigError: there is no driver for such a URL.
    """
    if url is None:
        return JournalStorage(Journal(folder / "journal.log"))
    try:
        connect = {"timeout": 60} if url.startswith("sqlite") else {}
        # Connections that a restart of the server cut are noticed before they are used.
        options = {"pool_pre_ping": True, "connect_args": connect}
        return RDBStorage(_driver(url), engine_kwargs=options)
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            f"sweep.storage={shown(url)}: its driver is not installed ({_first_line(error)}); for "
            "PostgreSQL pip install 'seqzoo[postgres]', or make install EXTRA=postgres"
        ) from error
    except (ValueError, ArgumentError) as error:  # a URL that is none
        raise ConfigError(f"sweep.storage={shown(url)}: {_first_line(error)}") from error


def shown(url: str | None) -> str:
    """A storage as it may be printed and written down: without its password."""
    return "journal.log" if url is None else _PASSWORD.sub(r"\1@", url)


def check_url(url: str) -> None:
    """Refuses what is no database URL."""
    if "://" not in url:
        raise ConfigError(
            f"sweep.storage={url}: a URL is needed, as in sqlite:///study.db or "
            "postgresql://user@host/name; null = a journal file in the study's folder"
        )


class Journal(BaseJournalBackend):
    """Optuna's journal file, whole even where a write was cut off (a kill, a full disk)."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._lock = JournalFileOpenLock(str(file))
        self._inner = JournalFileBackend(str(file), lock_obj=self._lock)

    def read_logs(self, log_number_from: int):
        return self._inner.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._mend()
        try:
            self._inner.append_logs(logs)
        except RuntimeError as error:
            # The lock was taken from us after 30 s without a sign of life; the line was written.
            if "possess lock" not in str(error):
                raise

    def _mend(self) -> None:
        """Cuts off a last line without an end: nobody was told that it was written."""
        if self._whole():
            return
        self._lock.acquire()
        try:
            if not self._whole():
                content = self._file.read_bytes()
                os.truncate(self._file, content.rfind(b"\n") + 1)
        finally:
            self._lock.release()

    def _whole(self) -> bool:
        with open(self._file, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return True
            file.seek(size - 1)
            return file.read(1) == b"\n"


@functools.cache
def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _driver(url: str) -> str:
    """postgresql:// by psycopg 3, where SQLAlchemy's own choice is not installed."""
    if url.startswith("postgresql://") and not _has("psycopg2") and _has("psycopg"):
        return url.replace("postgresql://", "postgresql+psycopg://", 1)
    return url


def _first_line(error: BaseException) -> str:
    cause: BaseException = error
    while isinstance(cause, StorageInternalError) and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return _PASSWORD.sub(r"\1@", lines[0]) if lines else type(cause).__name__
