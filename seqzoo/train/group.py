"""Runs that differ in run-time values alone, trained in one process by one program.

Each of them is a run like any other: a folder, a Session, the loop of loop.py. Only the update is
common: the states lie in one array each (stacked.py), and what a step needs is asked of all. A run
that ends, at its target or because it is no longer finite, leaves its place empty. What was killed
goes on from each run's own checkpoint: those that are behind catch up first.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqzoo.allocator import keep_freed_memory
from seqzoo.data.source import Batch, Split
from seqzoo.errors import ConfigError, NotFiniteError, Preempted
from seqzoo.train import branch as branches
from seqzoo.train import loop, precision, processes, programs, stacked
from seqzoo.train.evaluate_group import evaluate_group
from seqzoo.train.feed import Feed
from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks import Hook, make_hooks
from seqzoo.train.hooks.progress import Progress
from seqzoo.train.identity import plain
from seqzoo.train.result import Result, finished_before
from seqzoo.train.run_files import read_status
from seqzoo.train.session import Session
from seqzoo.train.setup import Setup, build_data, check_data, setup
from seqzoo.train.signals import StopRequest
from seqzoo.train.state import TrainState
from seqzoo.train.step import Metrics
from seqzoo.train.timing import Pauses, Shapes, row_length, shapes_of
from seqzoo.train.values import check_values

_LINE_SECONDS = 10.0


class Job(NamedTuple):
    """A run of a group, before it is trained.

    Attributes:
        config: composed and checked.
        overrides: what was typed.
        hooks: look on.
    """

    config: Mapping[str, Any]
    overrides: Sequence[str]
    hooks: Sequence[Hook] = ()


Outcome = Result | Exception


def train_group(
    jobs: Sequence[Job | None],
    *,
    name: str,
    root: str | os.PathLike = "runs",
    by: str | None = None,
    ended: Callable[[int, Outcome], None] = lambda place, outcome: None,
) -> list[Outcome | None]:
    """Trains runs together, or goes on with them.

    Args:
        jobs: the runs, each at its place; None = nothing is to be done there.
        name: of the group: the same for the same runs in the same places.
        root: the folder of all runs.
        by: map or vmap (stacked.py); None = map on a CPU, vmap on an accelerator.
        ended: told at once of a run that ended; must not raise.

    Returns:
        Of each place its result, or why it ended: NotFiniteError, or an error of that run alone.

    Raises:
        Preempted: they were asked to stop, and saved.
        ConfigError: the runs differ in more than run-time values.
    """
    keep_freed_memory()
    places = [None if job is None else _Place.of(number, job, root)
              for number, job in enumerate(jobs)]  # fmt: skip
    outcomes: list[Outcome | None] = [one and one.before() for one in places]
    for place, outcome in enumerate(outcomes):
        if outcome is not None:
            ended(place, outcome)
    due = [one for one in places if one is not None and outcomes[one.number] is None]
    if not due:
        return outcomes
    for one in due:
        check_values(one.job.config)
    processes.start()
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        warning = precision.prepare(due[0].job.config["trainer"], due[0].folder.path)
        programs.use_disk_cache()
        runs = [setup(one.job.config, data=one.data) for one in due]
        _check_alike(runs)
        for data in {run.data: run for run in runs}.values():
            check_data(data)
        by = by or ("map" if jax.default_backend() == "cpu" else "vmap")
        group = Group(runs[0], len(jobs), by, stop, ended)
        stack.callback(group.close)
        if warning:
            group.say(f"warning: {warning}")
        for one, run in zip(due, runs, strict=True):
            layout = {"group": f"{name}, {len(jobs)} by {by}", "place": one.number}
            branch = branches.of(one.folder, run.config)
            folder = loop.open_folder(
                run,
                one.job.overrides,
                root,
                fingerprint=one.fingerprint,
                branch=branch,
                layout=layout,
            )
            stack.callback(folder.close)
            group.add(one.number, one.job, run, folder, branch)
        for number, reached in group.train().items():
            outcomes[number] = reached
    for outcome in outcomes:
        if isinstance(outcome, Preempted):
            raise outcome
    return outcomes


class _Place(NamedTuple):
    """A job and where its run lies."""

    number: int
    job: Job
    data: Any
    fingerprint: str
    folder: RunFolder

    @classmethod
    def of(cls, number: int, job: Job, root: str | os.PathLike) -> "_Place":
        config = plain(job.config)
        data = build_data(config)
        fingerprint = data.fingerprint()
        folder = RunFolder.locate(config, job.overrides, root=root, data_fingerprint=fingerprint)
        return cls(number, job._replace(config=config), data, fingerprint, folder)

    def before(self) -> Outcome | None:
        """How it ended before; None = it did not."""
        if self.folder.finished():
            return finished_before(self.folder, self.job.config)
        status = read_status(self.folder.path)
        if status.get("state") == "not_finite":
            return NotFiniteError(status.get("error", "it was not finite"))
        return None


def _check_alike(runs: Sequence[Setup]) -> None:
    first = runs[0]
    if first.spec.mesh.size > 1:
        raise ConfigError(
            f"a group of runs takes one device, and the mesh has {first.spec.mesh.size}: set "
            "mesh.data=1, or leave sweep.vectorize out"
        )
    if first.trainer.profile is not None:
        raise ConfigError("trainer.profile traces a run alone: leave sweep.vectorize out for it")
    if first.logger.wandb:
        raise ConfigError(
            "logger.wandb follows one run per process: set it to false, or leave sweep.vectorize "
            "out"
        )
    for run in runs[1:]:
        changed = [
            name
            for name in first.spec._fields
            if getattr(run.spec, name) != getattr(first.spec, name)
        ]
        changed += [
            f"trainer.{name}"
            for name in ("steps", "global_batch_size")
            if getattr(run.trainer, name) != getattr(first.trainer, name)
        ]
        if changed:
            raise ConfigError(
                f"runs of one group must share one program, and {', '.join(changed)} differ: what "
                "sweep.vectorize names may change initial values, rates and data alone"
            )


class Member(Session):
    """A run whose state lies at a place of its group's."""

    def __init__(self, group: "Group", place: int, job: Job, run: Setup, folder: RunFolder):
        self.group, self.place = group, place
        self.overrides = job.overrides
        progress = Progress("none", steps=run.trainer.steps, metric=run.task.metric, log=folder.log)
        hooks = [*make_hooks(run, folder), *job.hooks]
        super().__init__(
            run, folder, progress=progress, hooks=hooks, stop=group.stop, pauses=group.pauses
        )

    @property
    def state(self) -> TrainState:
        """After the updates that were begun."""
        return stacked.taken(self.group.states, self.place)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.group.put(self.place, state)

    def batch(self) -> Batch:
        """What its next update learns from."""
        assert self._stream is not None
        for hook in self._hooks:
            hook.before_step(self.step, None)
        return next(self._stream)[1]

    def _values(self, split: Split, weights: Any, rest: Any) -> dict[str, float]:
        if split == "valid" and self.group.by == "vmap":  # by map nothing is gained together
            return self.group.evaluated(self)
        return super()._values(split, weights, rest)

    def _stream_from(self, start: int, stop: int) -> Any:
        return self.group.feed(self.run).reader(start)


class Group:
    """The runs of one program.

    Args:
        run: one of them.
        n: places.
        by: how they are carried.
        stop: who asks them to stop.
        ended: told of a run that ended.

    Attributes:
        states: of all places.
        by: how they are carried.
        pauses: time that belongs to no step of any of them.
    """

    def __init__(
        self,
        run: Setup,
        n: int,
        by: str,
        stop: StopRequest,
        ended: Callable[[int, Outcome], None] = lambda place, outcome: None,
    ):
        self.stop, self.pauses = stop, Pauses()
        self.states = stacked.empty(run.spec, n)()
        self.by, self._run, self._n, self._ended = by, run, n, ended
        self._valid: dict[tuple[int, int], dict[str, float]] = {}
        self._step = stacked.group_step(run.spec, by)
        self._programs: dict[Shapes, programs.Program] = {}
        self._whole = NamedSharding(run.spec.mesh, PartitionSpec())
        self._feeds: dict[Any, Feed] = {}
        self._members: dict[int, Member] = {}
        self._loops: dict[int, Iterator[dict[str, float] | None]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._began = time.monotonic()
        self._told = time.monotonic()
        kind = "none" if run.logger.progress == "none" else "lines"
        self.say: Callable[[str], None] = Progress(
            kind, steps=run.trainer.steps, metric=run.task.metric, log=lambda text: None
        ).say

    def add(
        self,
        place: int,
        job: Job,
        run: Setup,
        folder: RunFolder,
        branch: branches.Branch | None = None,
    ) -> None:
        """Takes a run in, at the step that it has come to."""
        member = Member(self, place, job, run, folder)
        self._members[place] = member
        self._loops[place] = loop.fit(member)
        self._try(member, member.begin, branch)

    def train(self) -> dict[int, Outcome]:
        """Trains all to their ends."""
        try:
            while self._loops:
                for member in self._there():
                    self._try(member, self._to_the_update, member)
                if self._loops and self.stop.received is None:
                    self._advance()
        except BaseException as error:
            known = loop.known_as(error, next(iter(self._there()), None))
            for member in self._there():
                loop.leave(member.folder, member, known or error)
            if known is None:
                raise
            raise known from error
        return self._outcomes

    def put(self, place: int, state: TrainState) -> None:
        """Lays a state into its place."""
        self.states = stacked.put(self.states, state, np.int32(place))

    def evaluated(self, member: Member) -> dict[str, float]:
        """What the valid split gives a member: asked by the first, counted for all that will."""
        place = (member.step, member.place)
        if place not in self._valid:
            asking = [m for m in self._there() if m.step == member.step and m.must_evaluate]
            states = self.states
            found = evaluate_group(
                {one.place: one.run for one in asking},
                states.params if states.ema is None else states.ema,
                states.rest,
                n=self._n,
                say=self.say,
                interrupt=lambda: self.stop.received is not None,
            )
            self._valid = {(member.step, one): values for one, values in found.items()}
        return self._valid.pop(place)

    def feed(self, run: Setup) -> Feed:
        """Where a run reads; those that read the same share it."""
        return self._feeds.setdefault(run.data, Feed(run))

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()

    def _there(self) -> list[Member]:
        return [self._members[place] for place in self._loops]

    def _to_the_update(self, member: Member) -> None:
        tested = next(self._loops[member.place])
        if tested is None:
            return
        member.close()
        # All share the time; each is told its part.
        seconds = (time.monotonic() - self._began) / len(self._members)
        self._end(
            member,
            Result.of(member.run, member.folder, member, tested, seconds, member.overrides),
        )

    def _try(self, member: Member, do: Callable[..., None], *arguments: Any) -> None:
        """What goes wrong with one run ends that run alone."""
        try:
            do(*arguments)
        except Exception as error:
            known = loop.known_as(error, member) or error
            loop.leave(member.folder, member, known)
            self._end(member, known)
            if not isinstance(known, Preempted):
                self.say(f"{member.folder.path.name}: {known}")

    def _end(self, member: Member, outcome: Outcome) -> None:
        self._outcomes[member.place] = outcome
        del self._loops[member.place]
        member.folder.close()
        if not isinstance(outcome, Preempted):
            with self.pauses.counted():
                self._ended(member.place, outcome)

    def _advance(self) -> None:
        """Begins the next update of those that are furthest behind."""
        there = self._there()
        step = min(member.step for member in there)
        due = [member for member in there if member.step == step]
        batches = {member.place: member.batch() for member in due}
        alike: dict[Shapes, list[Member]] = {}
        for member in due:  # data sets of other seeds may have rows of another length here
            alike.setdefault(shapes_of(batches[member.place]), []).append(member)
        for shapes, members in alike.items():
            metrics = self._update(shapes, members, batches)
            for member in members:
                self._try(member, member.begun, shapes, Row(metrics, member.place))
        if time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            steps = self._run.trainer.steps
            self.say(f"step {step + 1}/{steps}  {len(self._loops)} of {self._n} runs")

    def _update(
        self, shapes: Shapes, members: Sequence[Member], batches: Mapping[int, Batch]
    ) -> Metrics:
        """One call of the program; places that take no part get what the first one gets."""
        taking = {member.place: member for member in members}
        rows = [taking.get(place, members[0]) for place in range(self._n)]
        host = jax.tree.map(lambda *a: np.stack(a), *(batches[one.place] for one in rows))
        hypers, seeds = (np.stack(a) for a in zip(*(one.arguments() for one in rows), strict=True))
        active = np.array([place in taking for place in range(self._n)])
        arguments = jax.device_put((host, hypers, seeds, active), self._whole)
        if shapes not in self._programs:
            self._programs[shapes] = self._compile(members[0], batches, arguments)
        for member in members:
            member.doing = self._programs[shapes]
        self.states, metrics = self._programs[shapes](self.states, *arguments)
        return metrics

    def _compile(
        self, member: Member, batches: Mapping[int, Batch], arguments: Iterable[Any]
    ) -> programs.Program:
        batch = batches[member.place]
        rows, length = len(next(iter(batch.values()))), row_length(batch)
        member.folder.phase("compile", member.step)
        with self.pauses.counted():
            program = programs.compiled(
                self._step,
                *(self.states, *arguments),
                name=f"train step of {self._n} runs",
                what=f"{self._n} runs (sweep.vectorize_most), {rows} rows of {length} tokens each",
                say=self.say,
            )
        member.folder.phase("train", member.step)
        return program


class Row(NamedTuple):
    """The metrics of one place; fetched with those of the others when they are looked at."""

    all: Metrics
    place: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.all.names

    @property
    def pairs(self) -> np.ndarray:
        return np.asarray(self.all.pairs)[self.place]

    @property
    def finite(self) -> bool:
        return bool(np.asarray(self.all.finite)[self.place])
