"""The folder of a run: found again by its identity, held by one process, truthful at any moment.

Imports no jax, so that commands that only read runs start quickly.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seqzoo.errors import CheckpointError, ConfigError, DataError
from seqzoo.train import environment, identity
from seqzoo.train.lock import RunLock
from seqzoo.train.run_files import read_json, read_status, write_json, write_text

PHASE_VARIABLE = "SEQZOO_PHASE_FILE"


class RunFolder:
    """A run's folder, open for writing. Made by `RunFolder.open`; close it, or use it in `with`.

    Attributes:
      path: the folder.
      hash: the identity's hash.
      attempt: 1 for the first start, 2 for the second, ...
      warnings: what changed under the run since its last start, one sentence each.
      bitwise: whether going on here can repeat an unbroken run bit by bit (equal thread count).
    """

    def __init__(self, path: pathlib.Path, run_hash: str, *, writes: bool = True):
        self.path = path
        self.hash = run_hash
        self.attempt = 0
        self.warnings: list[str] = []
        self.bitwise = True
        self._writes = writes
        self._made: list[pathlib.Path] = []  # folders that this start made, the innermost first
        self._aside: pathlib.Path | None = None  # where --force moved what was there
        self._latest: str | None = None  # what `latest` named before
        self._lock: RunLock | None = None
        self._status: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        config: DictConfig | Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        root: str | os.PathLike = "runs",
        force: bool = False,
        strict: bool = False,
        data_fingerprint: str | None = None,
        layout: Mapping[str, Any] | None = None,
        branch_step: int | None = None,
        process_index: int = 0,
    ) -> "RunFolder":
        """Finds the folder of this run, or makes it, and takes hold of it.

        A finished run is returned untouched: ask `finished()` first.

        Args:
          config: the resolved configuration.
          overrides: what was typed; it names the folder and is stored.
          root: the folder that holds all runs.
          force: begin anew; what is there is moved aside to ``<folder>.1``, ``.2``, ...
          strict: refuse to go on when code or versions changed since the last start.
          data_fingerprint: what the data says of itself, a part of the identity.
          layout: how the work is cut (mesh, microbatches): changes rounding, not the run.
          branch_step: the step of another run that this one begins from; the first start counts.
          process_index: only process 0 of a run writes and locks.

        Raises:
          LockedError: another process works in the folder.
          DataError: the data changed since the run began.
          ConfigError: with `strict`, something else changed.
        """
        folder = cls.locate(config, overrides, root=root, data_fingerprint=data_fingerprint)
        path = folder.path
        if not path.exists() and not force:
            _refuse_changed_data(path.parent, config, data_fingerprint)
        folder._writes = process_index == 0
        if not folder._writes:
            return folder
        if force and path.exists():
            folder._aside = _move_aside(path)
        if folder.finished():
            return folder
        folder._made = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        folder._lock = RunLock(path)
        try:
            folder._start(config, overrides, data_fingerprint, layout, branch_step, strict=strict)
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def locate(
        cls,
        config: DictConfig | Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        root: str | os.PathLike = "runs",
        data_fingerprint: str | None = None,
    ) -> "RunFolder":
        """Returns the folder of this run, or where it will be, without opening it."""
        run_hash = identity.run_hash(config, data_fingerprint)
        above = pathlib.Path(root).resolve() / identity.experiment_name(config, overrides)
        path = _find(above, run_hash)
        if path is None:
            path = above / identity.run_name(config, overrides, data_fingerprint)
        return cls(path, run_hash, writes=False)

    def _start(
        self, config, overrides, data_fingerprint, layout, branch_step, *, strict: bool
    ) -> None:
        container = identity.plain(config)
        records = sorted((self.path / "env").glob("[0-9]*.json"))
        self.attempt = len(records) + 1
        now = environment.describe(_targets(container))
        now["hash"] = self.hash
        now["command_hash"] = identity.run_hash(config)
        now["data_fingerprint"] = data_fingerprint
        now["layout"] = dict(layout or {})
        now["logged"] = identity.logged(container)
        now["branch_step"] = self.branch_step if records else branch_step
        if records:
            self._notice_changes(read_json(records[0]), read_json(records[-1]), now, strict)
        self._status = read_status(self.path)
        self._status.pop("error", None)
        self._status.update(hash=self.hash, attempt=self.attempt, host=socket.gethostname())
        (self.path / "env").mkdir(exist_ok=True)
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(container)))
        write_text(self.path / "overrides.txt", "".join(f"{line}\n" for line in overrides))
        write_json(self.path / "env" / f"{self.attempt:03d}.json", now)
        self.write_status(state="running")
        self._latest = _link_latest(self.path)
        self.log(f"start {self.attempt} on {now['host']}, {now['threads']} CPU threads")
        for warning in self.warnings:
            self.log(f"warning: {warning}")

    def _notice_changes(self, first: dict, last: dict, now: dict, strict: bool) -> None:
        changed = environment.changes(last, now)
        if changed and strict:
            raise ConfigError(
                f"--strict: {'; '.join(changed)} since the last start of {self.path}. Go back to "
                "what the run began with, leave --strict out, or begin anew with --force"
            )
        self.warnings += [f"{change} since the last start" for change in changed]
        for name, kind in (
            ("threads", "CPU threads"),
            ("devices", "devices"),
            ("layout", "layout"),
        ):
            if first.get(name) not in (None, now[name]):
                self.bitwise = False
                self.warnings.append(
                    f"the run began with {kind} {_words(first[name])} and goes on with "
                    f"{_words(now[name])}: exact in data and state, not bitwise"
                )

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back to whoever comes next."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def take_back(self) -> bool:
        """Leaves everything as it was before the first start of a run that did nothing yet.

        The folder goes, with those above it that were made for it; `latest` names again what it
        named; what --force moved aside comes back. Returns False, and changes nothing, where the
        folder was there before this start.
        """
        if self._lock is None or self.path not in self._made:
            return False
        gone = self.path.with_name(f".{self.path.name}.{os.getpid()}.undone")
        latest = self.path.parent / "latest"
        if latest.is_symlink() and os.readlink(latest) == self.path.name:
            latest.unlink()
            if self._latest is not None:
                latest.symlink_to(self._latest)
        self.path.rename(gone)  # at once: nobody finds half of it
        self.close()
        shutil.rmtree(gone, ignore_errors=True)
        if self._aside is not None:
            self._aside.rename(self.path)
        for above in self._made[1:]:
            with contextlib.suppress(OSError):  # somebody else's run lies there by now
                above.rmdir()
        return True

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def branch_step(self) -> int | None:
        """The step of another run from which the first start of this one began."""
        return read_json(self.path / "env" / "001.json").get("branch_step")

    def finished(self) -> str | None:
        """Returns ``"finished on DATE at commit X; --force runs it again"`` for a finished run."""
        status = read_status(self.path)
        if status.get("state") != "finished":
            return None
        records = sorted((self.path / "env").glob("[0-9]*.json"))
        record = read_json(records[-1]) if records else {}
        commit = (record.get("git") or {}).get("commit")
        at = f"commit {commit[:10]}" if commit else f"seqzoo {_version(record)}"
        return f"finished on {status.get('time')} at {at}; --force runs it again"

    def noticed(self, config: DictConfig | Mapping[str, Any]) -> list[str]:
        """Returns what a finished run logged otherwise than this configuration asks, in words."""
        records = sorted((self.path / "env").glob("[0-9]*.json"))
        last = read_json(records[-1]) if records else {}
        return environment.logged_changes(last, identity.logged(config))

    def write_status(
        self,
        *,
        state: str | None = None,
        step: int | None = None,
        metric: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Updates status.json, written beside and renamed: a reader never sees half of it.

        Args:
          state: running, finished, preempted, interrupted, not_finite, pruned or failed.
          step: the step the run has reached.
          metric: {name, value, target}.
          **more: further plain values.
        """
        new = {"state": state, "step": step, "metric": metric, **more}
        self._status.update({key: value for key, value in new.items() if value is not None})
        self._status["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
        if self._writes:
            write_json(self.path / "status.json", self._status)

    def log(self, message: str) -> None:
        """Adds a line with the time to train.log."""
        if self._writes:
            stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            with open(self.path / "train.log", "a", encoding="utf-8") as file:
                file.write(f"{stamp} {message}\n")

    def phase(self, name: str, step: int | None = None) -> None:
        """Says what the run does now (compile, train, save, eval) to whoever set the variable
        SEQZOO_PHASE_FILE: the torture test, which kills at chosen moments."""
        if self._writes and (file := os.environ.get(PHASE_VARIABLE)):
            with open(file, "a", encoding="utf-8") as out:
                out.write(f"{os.getpid()} {name} {-1 if step is None else step} {time.time()}\n")

    def rewind_metrics(self, n_bytes: int) -> None:
        """Cuts metrics.jsonl back to what it was at the checkpoint that the run goes on from."""
        if not self._writes:
            return
        size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        if size < n_bytes:
            raise CheckpointError(
                f"{self.metrics_path} has {size} bytes, the checkpoint was saved at {n_bytes}: "
                "lines are missing. Put the file back, or begin anew with --force"
            )
        if size > n_bytes:
            os.truncate(self.metrics_path, n_bytes)


def apply_threads(
    config: DictConfig | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    root: str | os.PathLike = "runs",
) -> int:
    """Takes the thread count of this run's first start again. Call it before jax starts.

    Returns:
      The thread count in force. Where the stored one cannot be had any more, `RunFolder.open`
      says so in the log.
    """
    above = pathlib.Path(root).resolve() / identity.experiment_name(config, overrides)
    for _, record in _first_starts(above, identity.run_hash(config)):
        if isinstance(record.get("threads"), int):
            environment.set_threads(record["threads"])
    return environment.threads()


def begun(
    config: DictConfig | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    root: str | os.PathLike = "runs",
) -> pathlib.Path | None:
    """Returns the folder of this run, the newest where its data changed; None = it did not begin.

    Unlike `RunFolder.locate` it does not need the data.
    """
    above = pathlib.Path(root).resolve() / identity.experiment_name(config, overrides)
    found = [path for path, _ in _first_starts(above, identity.run_hash(config))]
    return max(found, key=lambda path: (path / "env").stat().st_mtime, default=None)


def _find(above: pathlib.Path, run_hash: str) -> pathlib.Path | None:
    found = [path for path in above.glob(f"*-{run_hash}") if path.is_dir()]
    return min(found, key=lambda path: path.stat().st_ctime) if found else None


def _first_starts(
    above: pathlib.Path, command_hash: str
) -> Iterable[tuple[pathlib.Path, dict[str, Any]]]:
    """The runs under `above` that the same configuration began, with their first records."""
    for file in sorted(above.glob("*/env/001.json")):
        path = file.parent.parent
        record = read_json(file)
        # `latest` is a link to one of them; a folder moved aside no longer ends in its hash.
        if (
            not path.is_symlink()
            and record.get("command_hash") == command_hash
            and path.name.endswith(f"-{record.get('hash')}")
        ):
            yield path, record


def _refuse_changed_data(above: pathlib.Path, config, data_fingerprint: str | None) -> None:
    for path, record in _first_starts(above, identity.run_hash(config)):
        raise DataError(
            f"the data changed since the run in {path} began: its fingerprint was "
            f"{record.get('data_fingerprint')}, is {data_fingerprint}. Put the data back to go on "
            "with that run, or start a new one on the new data with --force"
        )


def _move_aside(path: pathlib.Path) -> pathlib.Path:
    lock = RunLock(path)  # a run at work is not moved
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    lock.release()
    return aside


def _link_latest(path: pathlib.Path) -> str | None:
    """Lets `latest` name this folder; returns what it named before."""
    latest, beside = path.parent / "latest", path.parent / f".latest.{os.getpid()}.tmp"
    before = os.readlink(latest) if latest.is_symlink() else None
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.name)
        os.replace(beside, latest)
    except OSError:  # a file system without links: `latest` is a convenience
        beside.unlink(missing_ok=True)
    return before


def _targets(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_" and isinstance(item, str):
                yield item
            else:
                yield from _targets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _targets(item)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return str(value)


def _version(record: Mapping[str, Any]) -> str:
    return (record.get("versions") or {}).get("seqzoo", "of unknown version")
