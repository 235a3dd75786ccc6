"""A trial in the hands of a worker: what it is, what is told of it, how it ends."""

from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from seqzoo.sweep import sampler
from seqzoo.sweep.definition import Definition
from seqzoo.sweep.space import Space
from seqzoo.sweep.storage import Patience
from seqzoo.train.lock import RunLock


class Owner(Protocol):
    """What a claimed trial needs of its study (study.py)."""

    definition: Definition
    space: Space
    optuna: optuna.Study
    patience: Patience

    def too_many_failures(self) -> bool: ...

    def stop(self, why: str) -> None: ...


class Claimed:
    """A trial that this process holds; leave it with `with`.

    Attributes:
        number: of the trial.
        trial: Optuna's.
        point: what was chosen.
        words: its command line.
        attrs: what earlier workers wrote.
        reported: steps that were reported already.
        told: whether it ended: nothing more can be written of it.
    """

    def __init__(self, study: Owner, trial: Trial, frozen: FrozenTrial, lock: RunLock):
        self.study, self.trial, self.number = study, trial, frozen.number
        self.attrs = dict(frozen.user_attrs)
        self.reported = set(frozen.intermediate_values)
        self.told = False
        self._lock = lock
        choose = lambda: study.space.choose(lambda one: sampler.suggest(trial, one))
        self.point = study.patience(choose)
        self.words = study.space.words(self.point)

    def __enter__(self) -> "Claimed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def note(self, **attrs: Any) -> None:
        """Writes attributes of the trial where they changed."""
        for name, value in attrs.items():
            if name not in self.attrs or self.attrs[name] != value:
                self.study.patience(self.trial.set_user_attr, name, value)
                self.attrs[name] = value

    def report(self, step: int, value: float) -> None:
        """Tells the storage an evaluation; one that was told before is left as it is."""
        if step not in self.reported:
            self.study.patience(self.trial.report, value, step)
            self.reported.add(step)

    def lags(self) -> bool:
        """Whether the pruner would end it here."""
        return self.study.patience(self.trial.should_prune)

    def leave(self) -> None:
        """Goes, having saved: no sign that the trial is at fault."""
        if not self.told:
            self.note(deaths=[])

    def fail(self, why: str) -> None:
        """Puts the trial aside until `resume`; ends the study where too many are."""
        if self.told:
            return
        self.note(failure=why[:2000], deaths=[])
        most = self.study.definition.sweep.max_failures
        if self.study.too_many_failures():
            self.study.stop(f"more than {most} trials failed (sweep.max_failures)")

    def tell(self, value: float | None) -> None:
        """Ends the trial: with its value, or None = pruned."""
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        self.study.patience(
            self.study.optuna.tell, self.number, value, state=state, skip_if_finished=True
        )
        self.told = True
