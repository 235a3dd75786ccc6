"""Trials that differ in run-time values alone, as groups: one program trains all runs of a group.

Which trials are a group follows from the study alone, whoever asks, so that a group that was killed
comes together again, each run at its place.
"""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from optuna.trial import FrozenTrial

from seqzoo.errors import LockedError, NotFiniteError, Preempted
from seqzoo.sweep import trial
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.groups import parts
from seqzoo.sweep.storage import StorageError
from seqzoo.sweep.study import Study
from seqzoo.train.group import Job, Outcome, train_group
from seqzoo.train.result import Result


class Group(NamedTuple):
    """Trials that are trained together.

    Attributes:
        name: a hash of what their runs are, in order.
        trials: in order.
    """

    name: str
    trials: list[FrozenTrial]


def groups(study: Study) -> list[Group]:
    """The groups of a study."""
    trials = study.trials()
    points = [frozen.system_attrs.get("fixed_params") or frozen.params for frozen in trials]
    found = []
    for numbers in parts(study.space, study.definition.sweep, points):
        words = [study.space.words(points[number]) for number in numbers]
        text = json.dumps([study.definition.sweep.seeds, words])
        name = hashlib.sha256(text.encode()).hexdigest()[:10]
        found.append(Group(name, [trials[number] for number in numbers]))
    return found


def claim(study: Study) -> list[Claimed]:
    """Takes the trials of a group that are left to do, all of them; [] = no group is free now.

    Raises:
        StorageError: the storage is away.
    """
    for group in groups(study):
        left = [frozen for frozen in group.trials if not _ended(frozen)]
        if not left or not all(study.free(frozen) for frozen in left):
            continue
        claims: list[Claimed] = []
        try:
            # Whoever has the first has them all: everybody takes them in this order.
            for frozen in left:
                claimed = study.take(frozen.number)
                if claimed is not None:
                    claims.append(claimed)
        except LockedError:
            for claimed in claims:
                claimed.leave()
                claimed.__exit__()
        except BaseException:
            for claimed in claims:
                claimed.__exit__()
            raise
        else:
            if claims:
                return claims
    return []


def run(
    study: Study,
    claims: Sequence[Claimed],
    *,
    size: trial.Size = lambda path: None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Trains what is left of a group and tells the study the values of its trials.

    Args:
        study: whose trials they are.
        claims: trials of one group.
        size: as for trial.run.
        say: gets a line per trial that failed.

    Returns:
        What became of them, in a few words.

    Raises:
        Preempted, LockedError, StorageError, SeqzooError: as trial.run.
    """
    numbers = {claimed.number: claimed for claimed in claims}
    (group,) = (g for g in groups(study) if any(t.number in numbers for t in g.trials))
    held = {number: _Held(study, claimed, size, say) for number, claimed in numbers.items()}
    seeds = study.definition.sweep.seeds
    # A trial that has ended leaves its places empty.
    jobs: list[Job | None] = []
    for frozen in group.trials:
        one = held.get(frozen.number)
        jobs += [None] * seeds if one is None else one.jobs

    def ended(place: int, outcome: Outcome) -> None:
        held[group.trials[place // seeds].number].ended(place % seeds, outcome)

    by = study.definition.sweep.vectorize_by
    try:
        train_group(jobs, name=group.name, root=study.path, by=by, ended=ended)
    except Preempted:
        _raise_lost(held.values())
        raise
    _raise_lost(held.values())
    return ", ".join(one.told for one in held.values())


class _Held:
    """A trial of a group: its runs, and what became of them."""

    def __init__(
        self, study: Study, claimed: Claimed, size: trial.Size, say: Callable[[str], None]
    ):
        self.told = ""
        self.lost: StorageError | None = None
        self._study, self._claimed, self._size, self._say = study, claimed, size, say
        self._runs = trial.begin(study, claimed)
        self.watch = trial.watch_of(study, claimed, self._runs)
        self._outcomes: dict[int, Outcome] = {}

    @property
    def jobs(self) -> list[Job]:
        """One per seed; the first is watched."""
        hooks = [[self.watch], *([] for _ in self._runs[1:])]
        return [Job(one.config, one.words, h) for one, h in zip(self._runs, hooks, strict=True)]

    def ended(self, seed: int, outcome: Outcome) -> None:
        """Remembers how a run ended; tells the study when all have."""
        self._outcomes[seed] = outcome
        if len(self._outcomes) < len(self._runs):
            return
        try:
            self.told = self._finish()
        except StorageError as error:
            self.lost = error
            os.kill(os.getpid(), signal.SIGTERM)  # the others save at the next step boundary
        except Exception as error:
            self.told = "failed"
            self._say(f"trial {self._claimed.number} failed: {error}")
            with contextlib.suppress(StorageError):
                self._claimed.fail(str(error))

    def _finish(self) -> str:
        ended = []
        for number, one in enumerate(self._runs):
            outcome = self._outcomes[number]
            if isinstance(outcome, Result):
                ended.append(trial.ended_with(self._study, one, outcome))
            elif isinstance(outcome, NotFiniteError):
                ended.append(trial.Ended(self._study.definition.worst, None, 0.0))
            else:
                raise outcome
        return trial.finish(self._study, self._claimed, self._runs, ended, self._size)


def _raise_lost(held: Iterable[_Held]) -> None:
    """The storage stayed away; what was trained is saved."""
    for one in held:
        lost = one.lost or one.watch.lost
        if lost is not None:
            raise lost from None


def _ended(frozen: FrozenTrial) -> bool:
    return frozen.state.is_finished() or bool(frozen.user_attrs.get("failure"))
