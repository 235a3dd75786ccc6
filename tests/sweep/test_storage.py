"""Storages that are away, and journals that a kill or a full disk cut off."""

import os
import socket

import optuna
import pytest

from seqzoo.errors import ConfigError
from seqzoo.sweep import storage
from seqzoo.sweep.study import Study

GRID = ("optimizer.lr=1e-3,3e-3", "sweep=grid")


def test_patience_calls_again_and_says_so(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_WAIT", 1.5)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    said, answers = [], [OSError("gone"), OSError("gone"), 7]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage.Patience("here", 60, said.append)(ask) == 7
    assert said == ["the storage here is away (gone); trying again", "the storage is back"]


def test_patience_ends():
    def ask():
        raise OSError("connection refused")

    with pytest.raises(storage.StorageError, match="here cannot be reached: connection refused"):
        storage.Patience("here", 0.1)(ask)


def test_errors_of_ours_are_not_waited_for():
    def ask():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        storage.Patience("here", 60)(ask)


def test_a_database_that_nobody_serves(create, postgres):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"postgresql+psycopg://me:secret@127.0.0.1:{port}/db"
    with pytest.raises(storage.StorageError, match="Nothing is lost") as caught:
        create(*GRID, f"sweep.storage={url}", "sweep.patience_minutes=0.01")
    assert "secret" not in str(caught.value) and f"127.0.0.1:{port}" in str(caught.value)


def test_a_sqlite_file_in_no_folder(create):
    with pytest.raises(storage.StorageError, match="unable to open database file"):
        create(*GRID, "sweep.storage=sqlite:////no/such/folder/x.db", "sweep.patience_minutes=0")


def test_a_driver_that_is_not_there(create):
    with pytest.raises(ConfigError, match="its driver is not installed"):
        create(*GRID, "sweep.storage=mysql+nodriver://host/db")


def test_a_line_that_was_cut_off_is_mended(create):
    study = create(*GRID)
    journal = study.path / "journal.log"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"wor')  # a full disk, or a kill
    other = Study.open(study.path)
    assert len(other.rows()) == 2
    with other.claim() as claimed:
        claimed.tell(0.5)
    assert journal.read_bytes().startswith(whole)
    assert [row.state for row in study.rows()] == ["finished", "waiting"]
    assert [row.state for row in Study.open(study.path).rows()] == ["finished", "waiting"]


def test_a_full_disk_under_the_journal_is_waited_for(create, monkeypatch):
    study = create(*GRID)
    claimed = study.claim()
    failures = [OSError(28, "No space left on device")] * 2
    fsync = os.fsync

    def full(descriptor):
        if failures:
            raise failures.pop()
        fsync(descriptor)

    study.patience = storage.Patience("journal.log", 60, lambda text: None)
    monkeypatch.setattr(os, "fsync", full)
    claimed.note(runs=["a"])
    assert not failures
    assert Study.open(study.path).rows()[0].attrs["runs"] == ["a"]


def test_optuna_is_silent():
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
