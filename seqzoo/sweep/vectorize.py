"""Trials that differ in run-time values alone, as groups: one program trains all runs of a group.

Which trials are a group follows from the study alone, whoever asks, so that a group that was killed
comes together again, each run at its place.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial

from seqzoo.errors import LockedError, NotFiniteError, Preempted
from seqzoo.sweep import trial
from seqzoo.sweep.settings import SweepSettings
from seqzoo.sweep.space import Space
from seqzoo.sweep.study import Claimed, Study
from seqzoo.train.group import Job, Outcome, train_group
from seqzoo.train.result import Result

Point = dict[str, Any]


class Group(NamedTuple):
    """Trials that are trained together.

    Attributes:
        name: a hash of what their runs are, in order.
        trials: in order.
    """

    name: str
    trials: list[FrozenTrial]


def parts(space: Space, sweep: SweepSettings, points: Sequence[Point]) -> Iterator[list[int]]:
    """The points of each group, by number: alike but for what is vectorised, and not too many."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, point in enumerate(points):
        rest = [word for word in space.words(point) if _setting(word) not in sweep.vectorize]
        alike.setdefault(tuple(rest), []).append(number)
    most = max(1, sweep.vectorize_most // sweep.seeds)
    for numbers in alike.values():
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


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
        except BaseException as error:
            for claimed in claims:
                claimed.leave()
                claimed.__exit__()
            if not isinstance(error, LockedError):
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
    plans = {number: trial.begin(study, claimed) for number, claimed in numbers.items()}
    watches = {n: trial.watch_of(study, numbers[n], runs) for n, runs in plans.items()}
    jobs: list[Job | None] = []
    for frozen in group.trials:
        runs = plans.get(frozen.number)
        if runs is None:  # it has ended: its places stay empty
            jobs += [None] * study.definition.sweep.seeds
            continue
        hooks = [[watches[frozen.number]], *([] for _ in runs[1:])]
        jobs += [Job(one.config, one.words, h) for one, h in zip(runs, hooks, strict=True)]
    try:
        outcomes = train_group(
            jobs, name=group.name, root=study.path, by=study.definition.sweep.vectorize_by
        )
    except Preempted:
        for watch in watches.values():
            if watch.lost is not None:
                raise watch.lost from None
        raise
    told = []
    seeds = study.definition.sweep.seeds
    for place, frozen in enumerate(group.trials):
        if frozen.number in numbers:
            ended = outcomes[place * seeds : (place + 1) * seeds]
            told.append(_finish(study, numbers[frozen.number], plans, ended, size, say))
    return ", ".join(told)


def _finish(
    study: Study,
    claimed: Claimed,
    plans: dict[int, list[trial.Planned]],
    outcomes: Sequence[Outcome | None],
    size: trial.Size,
    say: Callable[[str], None],
) -> str:
    """Tells the study what became of a trial; what went wrong with one stays with it."""
    runs = plans[claimed.number]
    ended = []
    for one, outcome in zip(runs, outcomes, strict=True):
        if isinstance(outcome, Result):
            ended.append(trial.ended_with(study, one, outcome))
        elif isinstance(outcome, NotFiniteError):
            ended.append(trial.Ended(study.definition.worst, None, 0.0))
        else:
            say(f"trial {claimed.number} failed: {outcome}")
            claimed.fail(str(outcome))
            return "failed"
    return trial.finish(study, claimed, runs, ended, size)


def _ended(frozen: FrozenTrial) -> bool:
    return frozen.state.is_finished() or bool(frozen.user_attrs.get("failure"))


def _setting(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
