"""A study: its trials, who holds which, when it is done.

Every trial waits in the storage from the beginning, so that n_trials is a total whoever asks, and
however often. A worker takes one atomically (Optuna's ask), and holds it by a lock in the study's
folder. A trial that is RUNNING and held by nobody lost its worker: the next worker goes on with it,
in the same run folders, from their checkpoints. Imports no jax.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from seqzoo.errors import ConfigError, LockedError, SeqzooError
from seqzoo.sweep import definition as definitions
from seqzoo.sweep import locks, places, sampler, storage
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.definition import Definition
from seqzoo.sweep.rows import Row, row_of
from seqzoo.sweep.settings import Settings
from seqzoo.sweep.space import Space
from seqzoo.train.lock import RunLock
from seqzoo.train.run_files import read_status

_DEFINITION, _STOP = "definition", "stop"
# A trial whose worker died so often at the same step would kill workers for ever.
_MOST_DEATHS = 10
_BUSY_SECONDS = 5.0  # before a trial that somebody else has is looked at again


class Study:
    """A study in its folder. Made by `Study.create`, `Study.open` or `Study.join`.

    Attributes:
        path: its folder.
        definition: what it is.
        space: what it searches.
        optuna: the study in its storage.
        patience: calls what needs the storage.
    """

    def __init__(
        self,
        path: pathlib.Path,
        definition: Definition,
        *,
        url: str | None = None,
        create: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.path, self.definition = path, definition
        self.space = Space(definition.words, config_dir=definition.config_dir)
        url = places.with_password(definition, url)
        place = storage.shown(url) if url else str(path / "journal.log")
        self.patience = storage.Patience(place, 60 * definition.sweep.patience_minutes, say)
        self._busy: dict[int, float] = {}  # trials that somebody else holds, and until when
        make = optuna.create_study if create else optuna.load_study
        more: dict[str, Any] = {}
        if create:
            mode = "maximize" if definition.mode == "max" else "minimize"
            more = {"direction": mode, "load_if_exists": True}
        try:
            store = self.patience(storage.open_storage, url, path)
            self.optuna: optuna.Study = self.patience(
                make,
                study_name=definition.name,
                storage=store,
                sampler=sampler.SeededTPE(definition.sweep.seed),
                pruner=sampler.pruner(definition.sweep, definition.eval_every),
                **more,
            )
        except KeyError as error:
            raise ConfigError(
                f"{place} holds no study '{definition.name}': the command that made {path} "
                "makes it again"
            ) from error

    @classmethod
    def create(
        cls,
        settings: Settings,
        *,
        root: str | os.PathLike = "runs",
        config_dir: str | None = None,
        threads: int = 1,
    ) -> "Study":
        """Creates a study, or finds the one that the same words created.

        Raises:
            ConfigError: a word is wrong, or the study of that name searches something else.
            StorageError: its storage cannot be reached.
        """
        space = Space(settings.words, config_dir=config_dir)
        points = sampler.points(space, settings.sweep)
        url = places.absolute(settings.sweep.storage or os.environ.get(storage.VARIABLE))
        new = definitions.define(settings, space, config_dir=config_dir, url=url, threads=threads)
        path = pathlib.Path(root).resolve() / places.FOLDER / new.name
        path.mkdir(parents=True, exist_ok=True)
        with locks.held(path / "claims" / "study", patience=60):
            if (path / definitions.FILE).exists():
                old = definitions.read(path)
                definitions.check_same(old, new)
                if url is None and old.storage is not None:
                    url = places.with_password(old, None)
                if old.storage != (None if url is None else storage.shown(url)):
                    raise ConfigError(
                        f"sweep.storage={storage.shown(url)}, but the study '{old.name}' lies in "
                        f"{storage.shown(old.storage)}; leave it, or take another sweep.name"
                    )
                # What may change: how many trials, how the launcher starts workers.
                new = dataclasses.replace(
                    new,
                    storage=old.storage,
                    place=old.place,
                    created=old.created,
                    threads=old.threads,
                )
            study = cls(path, new, url=url, create=True)
            study._check_shared()
            study._check_total(len(points))
            study._share()
            new.write(path)
            study._enqueue(points)
        return study

    @classmethod
    def open(cls, path: str | os.PathLike, *, say: Callable[[str], None] = print) -> "Study":
        """Opens a study by its folder.

        Raises:
            ConfigError: it is none.
            StorageError: its storage cannot be reached.
        """
        folder = pathlib.Path(path).resolve()
        return cls(folder, definitions.read(folder), say=say)

    @classmethod
    def join(cls, name: str, url: str, *, root: str | os.PathLike = "runs") -> "Study":
        """Opens a study by its storage, in a folder of this machine.

        Raises:
            ConfigError: there is no such study.
        """
        path = pathlib.Path(root).resolve() / places.FOLDER / name
        if (path / definitions.FILE).exists():
            return cls.open(path)
        try:
            store = storage.Patience(storage.shown(url), 60)(storage.open_storage, url, path)
            found = optuna.load_study(study_name=name, storage=store).user_attrs[_DEFINITION]
        except KeyError as error:
            raise ConfigError(f"{storage.shown(url)} holds no study '{name}'") from error
        path.mkdir(parents=True, exist_ok=True)
        place = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        new = definitions.from_plain(found, place=place, storage=storage.shown(url))
        new.write(path)
        study = cls(path, new, url=url)
        study._check_shared()
        study._share()
        return study

    def claim(self) -> Claimed | None:
        """Takes a trial: one that lost its worker, else one that waits. None = none is free now.

        Raises:
            StorageError: the storage is away.
        """
        trials = self.trials()
        now = time.monotonic()
        for frozen in trials:
            if self._orphaned(frozen) and self._busy.get(frozen.number, 0) < now:
                with contextlib.suppress(LockedError):
                    claimed = self.take(frozen.number)
                    if claimed is not None:
                        return claimed
        if any(frozen.state == TrialState.WAITING for frozen in trials):
            return self._ask()
        return None

    def take(self, number: int) -> Claimed | None:
        """Takes this very trial, which waits or lost its worker; None = it ended, or was put aside.

        Raises:
            LockedError: somebody else has it.
        """
        lock = self._lock(number)
        if lock is None:
            raise self._taken(number)
        frozen = self._frozen(number)
        if frozen.state == TrialState.WAITING:
            begin = self.optuna._storage.set_trial_state_values
            begun = self.patience(begin, frozen._trial_id, TrialState.RUNNING)
            frozen = self._frozen(number)
            if not begun and frozen.user_attrs.get("place") != self.definition.place:
                # Another machine was quicker: its locks lie in its own folder. Or a first try of
                # ours broke behind the commit: then it has no place, and is soon an orphan.
                lock.release()
                raise self._taken(number)
        elif not self._orphaned(frozen):  # it ended while we looked
            lock.release()
            return None
        return self._begin(Trial(self.optuna, frozen._trial_id), frozen, lock)

    def free(self, frozen: FrozenTrial) -> bool:
        """Whether a trial waits, or lost its worker, by the look of it."""
        if self._busy.get(frozen.number, 0) > time.monotonic():
            return False
        return frozen.state == TrialState.WAITING or self._orphaned(frozen)

    def skip(self, claimed: Claimed) -> None:
        """Does not look at a trial again for a while: somebody works in its run folder."""
        self._busy[claimed.number] = time.monotonic() + _BUSY_SECONDS

    def trials(self) -> list[FrozenTrial]:
        """Optuna's trials, without those that a broken connection made twice."""
        found: dict[int, FrozenTrial] = {}
        for frozen in self.patience(self.optuna.get_trials, deepcopy=False):
            point = frozen.user_attrs.get("point")
            if point is not None and point not in found:
                found[point] = frozen
        return sorted(found.values(), key=lambda frozen: frozen.number)

    def rows(self) -> list[Row]:
        """The trials as they are shown."""
        return [row_of(self.path, self.definition, frozen) for frozen in self.trials()]

    def finished(self) -> bool:
        """Whether every trial has ended, or failed."""
        return all(
            frozen.state.is_finished() or frozen.user_attrs.get("failure")
            for frozen in self.trials()
        )

    def failures(self) -> list[Row]:
        return [row for row in self.rows() if row.state == "failed"]

    def importances(self) -> dict[str, float]:
        """How much each parameter decides whether a trial is among the best (PED-ANOVA)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few trials, and that it may change in Optuna
            try:
                found = optuna.importance.get_param_importances(
                    self.optuna, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
                )
            except (ValueError, RuntimeError):  # nothing has ended yet
                return {}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def too_many_failures(self) -> bool:
        return len(self.failures()) > self.definition.sweep.max_failures

    def stop(self, why: str) -> None:
        """Asks all workers, wherever they are, to save and leave; '' takes it back."""
        self.patience(self.optuna.set_user_attr, _STOP, why)
        file = self.path / "stop"  # for the script of SLURM
        if why:
            file.write_text(why + "\n", encoding="utf-8")
        else:
            file.unlink(missing_ok=True)

    def stopped(self) -> str:
        """Why workers are to leave; '' = they are not."""
        return self.patience(lambda: self.optuna.user_attrs).get(_STOP, "")

    def resume(self) -> None:
        """Takes back what kept workers from its trials: a stop, and failures."""
        self.stop("")
        for frozen in self.trials():
            if frozen.state == TrialState.RUNNING and frozen.user_attrs.get("failure"):
                trial = Trial(self.optuna, frozen._trial_id)
                self.patience(trial.set_user_attr, "failure", "")

    def _ask(self) -> Claimed | None:
        trial = self.patience(self.optuna.ask)
        lock = self._lock(trial.number)
        frozen = self._frozen(trial.number)
        firsts = {one.number for one in self.trials()}
        if trial.number not in firsts:
            # Another worker took the last one that waited; or the trial is there twice.
            self.patience(
                self.optuna.tell, trial.number, state=TrialState.FAIL, skip_if_finished=True
            )
            if lock is not None:
                lock.release()
            return None
        if lock is None:  # somebody was quicker: it goes on there
            return None
        return self._begin(trial, frozen, lock)

    def _begin(self, trial: Trial, frozen: FrozenTrial, lock: RunLock) -> Claimed | None:
        try:
            claimed = Claimed(self, trial, frozen, lock)
            starts = claimed.attrs.get("starts", 0) + 1
            claimed.note(place=self.definition.place, starts=starts)
            step = sum(
                read_status(self.path / name).get("step") or 0
                for name in claimed.attrs.get("runs", [])
            )
            before, deaths = claimed.attrs.get("deaths") or (None, 0)
            deaths = deaths + 1 if before == step else 0
            claimed.note(deaths=[step, deaths])
            if deaths >= _MOST_DEATHS:
                claimed.fail(f"its worker died {deaths} times at step {step}")
                lock.release()
                return None
        except BaseException:
            lock.release()
            raise
        return claimed

    def _orphaned(self, frozen: FrozenTrial) -> bool:
        """Whether it runs, could go on here, and has no holder that moved lately."""
        if frozen.state != TrialState.RUNNING or frozen.user_attrs.get("failure"):
            return False
        place = frozen.user_attrs.get("place")
        if place not in (None, self.definition.place):
            return False
        if place is None and len(self._places()) > 1:  # its worker died, or is about to say where
            began = frozen.datetime_start
            if began is not None and locks.fresh(began.timestamp()):
                return False
        return not locks.held_elsewhere(self.path, frozen.number)

    def _taken(self, number: int) -> LockedError:
        """What to raise of a trial that somebody else has; it is not looked at for a while."""
        self._busy[number] = time.monotonic() + _BUSY_SECONDS
        return LockedError(f"another worker has trial {number}")

    def _lock(self, number: int) -> RunLock | None:
        folder = locks.folder(self.path, number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return self.patience(RunLock, folder)
        except LockedError:
            return None

    def _frozen(self, number: int) -> FrozenTrial:
        return self.patience(self.optuna.get_trials, deepcopy=False)[number]

    def _places(self) -> list[str]:
        attrs = self.patience(lambda: self.optuna.user_attrs)
        return [name for name in attrs if name.startswith("place:")]

    def _check_shared(self) -> None:
        """Refuses what is not the study of this name in the storage."""
        attrs = self.patience(lambda: self.optuna.user_attrs)
        there = attrs.get(_DEFINITION)
        if there is not None:
            definitions.check_same(definitions.from_plain(there, place=""), self.definition)

    def _check_total(self, n: int) -> None:
        """Refuses a total that is asked for and smaller than what there is."""
        asked, there = self.definition.sweep.n_trials, len(self.trials())
        if asked is not None and n < there:
            raise ConfigError(
                f"sweep.n_trials={asked}, but the study '{self.definition.name}' has {there} "
                "trials already, and n_trials is their number in all: leave it out or raise it"
            )

    def _share(self) -> None:
        """Writes into the storage what it is, and that this folder takes part."""
        self.patience(self.optuna.set_user_attr, _DEFINITION, self.definition.shared())
        here = f"{socket.gethostname()}:{self.path}"
        self.patience(self.optuna.set_user_attr, f"place:{self.definition.place}", here)

    def _enqueue(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Lets every point wait that does not yet; again after a failure, none twice."""

        def add() -> None:
            there = {
                frozen.user_attrs.get("point") for frozen in self.optuna.get_trials(deepcopy=False)
            }
            for number, point in enumerate(points):
                if number not in there:
                    self.optuna.enqueue_trial(dict(point), user_attrs={"point": number})

        self.patience(add)


class Stopped(SeqzooError):
    """The study was asked to stop; the same command goes on."""

    exit_code = 75
