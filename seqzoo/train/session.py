"""A run at work: its state, where it stands, and what happens at a step boundary.

The loop (loop.py) says when; this says how.
"""

import collections
import contextlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from seqzoo.data import pipeline
from seqzoo.data.source import Split
from seqzoo.errors import CheckpointError, ConfigError, NotFiniteError, suggest
from seqzoo.train import branch as branches
from seqzoo.train import mesh as meshes
from seqzoo.train import processes, programs
from seqzoo.train.checkpoint import Checkpointer
from seqzoo.train.evaluate import evaluate
from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks import Hook
from seqzoo.train.hooks.progress import Progress
from seqzoo.train.metrics_log import MetricsLog
from seqzoo.train.setup import Setup, initial_state
from seqzoo.train.signals import StopRequest
from seqzoo.train.state import TrainState
from seqzoo.train.step import SKIPPED, Metrics, train_step
from seqzoo.train.timing import Pauses, Shapes, Timing, row_length, shapes_of, tokens_of

# Updates that may be computing before the metrics of the oldest are fetched: the host never waits
# for the device, and a loss that is not finite is noticed so many steps late (never after a save).
_LAG = 4
_STATUS_SECONDS = 10.0

# Updates that may be skipped in a row: then nothing will change any more.
_MOST_SKIPPED = 20


class Best(NamedTuple):
    """The best evaluation on the valid split so far."""

    value: float
    step: int


class Session:
    """Everything that changes while a run trains.

    Attributes:
        step: updates begun.
        state: the state after them.
        best: the best evaluation so far; None before the first.
        reached: whether an evaluation reached the target.
        tested: the step whose weights were tested; None before.
        updated: whether an update was begun by this start.
        tokens: that the updates have read; None = not known, a checkpoint before did not say.
    """

    def __init__(
        self,
        run: Setup,
        folder: RunFolder,
        *,
        progress: Progress,
        hooks: list[Hook],
        stop: StopRequest,
        pauses: Pauses | None = None,
    ):
        self.run, self.folder, self.stop = run, folder, stop
        self.step = 0
        self._state: TrainState | None = None
        self.best: Best | None = None
        self.reached = False
        self.tested: int | None = None
        self.updated = False
        self.tokens: int | None = 0
        self.doing: programs.Program | None = None  # what runs, for the message if memory ends
        writes = processes.first()
        self._progress = progress
        self._hooks: list[Hook] = [progress, *hooks] if writes else []
        self._fingerprint = run.data.fingerprint()
        self._branched_at = -1  # the step that was taken over from another run
        self._evaluated = -1  # the last step that was evaluated
        self._value: float | None = None  # the metric there
        self._saved = (-1, -1)  # the last step that was saved, and what was evaluated then
        self._saved_at = self._status_at = time.monotonic()
        self._next_sample = 0
        self._skipped = 0  # the last so many updates
        self._pending: collections.deque[tuple[int, Shapes, Metrics]] = collections.deque()
        self._programs: dict[Shapes, programs.Program] = {}
        self._sharding = meshes.batch_sharding(run.spec.mesh, run.spec.rules)
        self._seed = np.uint32(run.trainer.seed)
        self._stream: pipeline.Stream | None = None
        timing = folder.path / "timing.jsonl" if writes else None
        self._timing = Timing(run, timing, folder.attempt, pauses)
        self._checkpoints = Checkpointer(folder.checkpoints, metric_mode=run.task.mode)
        self._log: MetricsLog | None = None

    def begin(self, branch: branches.Branch | None) -> None:
        """Goes on from the newest whole checkpoint, else from the branch, else from the start."""
        restored = self._checkpoints.restore(self.run.state)
        for text in (*branches.moved(self.folder, self.run.config), *self._checkpoints.damaged):
            self.say(f"warning: {text}")
        if restored is None and self._checkpoints.damaged:
            self.say("warning: no checkpoint is whole; beginning anew")
            # Not asked for while checkpoints were there.
            branch = branches.find(self.run.config, self.folder.branch_step)
        if restored is not None:
            self.step, self.state = restored.step, restored.state
            self._remember(restored.meta)
            self._saved = (self.step, self._evaluated)
            self.say(f"going on from step {self.step}")
            if jax.default_backend() != "cpu" and not self.run.trainer.deterministic:
                self.say(
                    "exact in data and state, not bitwise: on this device that needs "
                    "trainer.deterministic=true from the first start"
                )
        elif branch is not None:
            self.state, self._next_sample, self.tokens, changed = branches.begin(
                branch, self.run, self._fingerprint
            )
            self.step = int(self.state.step)
            self._branched_at = self.step
            self.say(f"beginning from step {branch.step} of {branch.path}")
            if changed:
                self.say(f"warning: its model was another: {'; '.join(changed)}")
        else:
            self.state = initial_state(self.run)
        self.folder.rewind_metrics(0 if restored is None else restored.meta["metrics_bytes"])
        path = self.folder.metrics_path if self._hooks else None
        log = MetricsLog(path, every=self.run.trainer.log_every, finish=self.run.task.finish)
        if restored is not None:
            log.remember(restored.meta["log"])
        self._log = log
        for hook in self._hooks:
            if restored is not None and hook.name in restored.meta["hooks"]:
                hook.remember(restored.meta["hooks"][hook.name])
            hook.start(self.step)
        self._open_stream()
        self._timing.start()

    @property
    def state(self) -> TrainState:
        """After the updates that were begun."""
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def say(self, text: str) -> None:
        """Prints, on process 0."""
        if self._hooks:
            self._progress.say(text)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens at this boundary."""
        return self.step > 0 and every > 0 and self.step % every == 0

    @property
    def must_evaluate(self) -> bool:
        due = self.due(self.run.trainer.eval_every) or self.step == self.run.trainer.steps
        return due and self._evaluated != self.step

    @property
    def saved(self) -> bool:
        """Whether this step, as evaluated as it is, is saved or being saved."""
        return self._saved == (self.step, self._evaluated)

    @property
    def done(self) -> bool:
        return self.step >= self.run.trainer.steps or self.reached

    def asked(self) -> tuple[bool, bool]:
        """Whether to stop here, and whether to save here; the same on all processes."""
        trainer = self.run.trainer
        minutes = (time.monotonic() - self._saved_at) / 60
        by_clock = bool(trainer.save_minutes) and minutes >= trainer.save_minutes
        stop, save = self.stop.agree(self.step, by_clock)
        best = self.best is not None and self.best.step == self.step
        late = self._saved[0] == self.step  # saved on request, evaluated since
        save = save or best or late or self.due(trainer.save_every)
        return stop, (save or stop) and self.step > 0 and not self.saved

    def advance(self) -> None:
        """Begins the next update; its metrics are looked at a few updates later."""
        assert self._stream is not None
        for hook in self._hooks:
            hook.before_step(self.step, self.state)
        _, host_batch = next(self._stream)
        batch = meshes.put_batch(host_batch, self._sharding)
        shapes = shapes_of(batch)
        if shapes not in self._programs:
            self._programs[shapes] = self._compile(batch)
        self.doing = self._programs[shapes]
        self.state, metrics = self.doing(self.state, batch, *self.arguments())
        self.begun(shapes, metrics)

    def arguments(self) -> tuple[np.ndarray, np.uint32]:
        """Run-time values of the next update, and the seed, as the compiled step takes them."""
        return self.run.hyper(self.step), self._seed

    def begun(self, shapes: Shapes, metrics: Metrics) -> None:
        """The next update is being computed, and these will be its metrics.

        Raises:
            NotFiniteError: an update a few steps ago was not finite.
        """
        self.step += 1
        self.updated = True
        self._next_sample += self.run.trainer.global_batch_size
        if self.tokens is not None:
            self.tokens += tokens_of(shapes)
        self._pending.append((self.step, shapes, metrics))
        if len(self._pending) > _LAG:
            self._look()

    def evaluate(self) -> None:
        """Evaluates the valid split.

        Raises:
            Interrupted: the run was asked to stop meanwhile.
        """
        task = self.run.task
        values = self._evaluate("valid", self.weights, self.state.rest)
        if task.metric not in values:
            raise ConfigError(
                f"task.metric={task.metric}: there are {', '.join(values)}"
                f"{suggest(task.metric, values)}"
            )
        value = values[task.metric]
        self._evaluated, self._value = self.step, value
        sign = 1 if task.mode == "max" else -1
        if value == value and (self.best is None or sign * value >= sign * self.best.value):
            self.best = Best(value, self.step)
        if self.run.trainer.stop_at_target and task.target is not None:
            self.reached = self.reached or sign * value >= sign * task.target
            if self.reached and self.step == self._branched_at:
                self.say(
                    f"warning: the branch begins at its target, {task.metric} {task.target}, and "
                    "trains nothing; trainer.stop_at_target=false lets it train"
                )
        self.write_status()

    def test(self) -> dict[str, float]:
        """Evaluates the test split with the weights of the best step."""
        if self.run.trainer.test_samples == 0:
            return {}
        weights, rest, self.tested = self.weights, self.state.rest, self.step
        best, known = self._checkpoints.best_step(), len(self._checkpoints.damaged)
        if best is not None and best != self.step:
            name = "params" if self.state.ema is None else "ema"
            wanted = {name: getattr(self.run.state, name), "rest": self.run.state.rest}
            try:
                restored = self._checkpoints.restore(wanted, "best", partial=True)
            except CheckpointError:
                if self._checkpoints.best_step() is not None:  # it cannot be read for now
                    raise
                restored = None  # none that is left was evaluated
            if restored is not None:
                weights, rest = restored.state[name], restored.state["rest"]
                self.tested = restored.step
            for text in self._checkpoints.damaged[known:]:
                self.say(f"warning: {text}; step {self.tested} is tested in its place")
            if self.tested != self.step:
                self.say(f"testing step {self.tested}, the best on the valid split")
        return self._evaluate("test", weights, rest)

    @property
    def weights(self) -> Any:
        """The parameters that are evaluated: their moving average where there is one."""
        return self.state.params if self.state.ema is None else self.state.ema

    def save(self) -> None:
        """Saves this step. Nothing that is not finite is saved."""
        self.drain()
        assert self._log is not None
        with self._timing.paused():
            self._checkpoints.wait()
        self.folder.phase("save", self.step)
        meta = {
            "data": {"next_sample": self._next_sample, "fingerprint": self._fingerprint},
            "tokens": self.tokens,
            "metrics_bytes": self._log.n_bytes(),
            "metric": {"name": self.run.task.metric, "mode": self.run.task.mode},
            "log": self._log.memory,
            "evaluated": [self._evaluated, self._value],
            "best": self.best,
            "reached": self.reached,
            "hooks": {h.name: h.memory() for h in self._hooks if h.memory() is not None},
            "config": self.run.config,
        }
        value = self._value if self._evaluated == self.step else None
        with self._timing.paused():
            self._checkpoints.save(self.step, self.state, meta, value)
        self._saved, self._saved_at = (self.step, self._evaluated), time.monotonic()
        self.write_status()

    def drain(self) -> None:
        """Looks at the metrics of all updates that were begun.

        Raises:
            NotFiniteError: one of them was not finite.
        """
        while self._pending:
            self._look()

    def write_status(self, **more: Any) -> None:
        """Updates status.json."""
        task, best = self.run.task, self.best
        value = None if best is None else best.value
        metric = {"name": task.metric, "value": value, "target": task.target}
        self.folder.write_status(step=self.step, tokens=self.tokens, metric=metric, **more)
        self._status_at = time.monotonic()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Lets go of everything, however the run ended; a hook that fails is a warning."""
        with contextlib.ExitStack() as stack:  # the last one first, each whatever the others do
            stack.callback(self._checkpoints.close)
            if self._log is not None:
                stack.callback(self._log.close)
            for hook in reversed(self._hooks):
                stack.callback(self._close, hook)
            if self._stream is not None:
                stack.callback(self._stream.close)

    def _close(self, hook: Hook) -> None:
        try:
            hook.close()
        except Exception as error:
            with contextlib.suppress(Exception):  # the display itself may be what fails
                self.say(f"warning: {hook.name or type(hook).__name__} did not close: {error}")

    def _remember(self, meta: dict[str, Any]) -> None:
        self._next_sample, self.tokens = meta["data"]["next_sample"], meta.get("tokens")
        self._evaluated, self._value = meta["evaluated"]
        self.best = None if meta["best"] is None else Best(*meta["best"])
        self.reached = meta["reached"]

    def _open_stream(self) -> None:
        trainer = self.run.trainer
        start = -(-self._next_sample // trainer.global_batch_size)
        if start * trainer.global_batch_size != self._next_sample:
            self.say(
                f"the data goes on at sample {start * trainer.global_batch_size:,} rather than "
                f"{self._next_sample:,}: batches have another size now"
            )
            self._next_sample = start * trainer.global_batch_size
        self._stream = self._stream_from(start, start + trainer.steps - self.step)

    def _stream_from(self, start: int, stop: int) -> pipeline.Stream:
        return stream_of(self.run, start, stop)

    def _compile(self, batch: dict[str, jax.Array]) -> programs.Program:
        self.folder.phase("compile", self.step)
        rows, length = len(next(iter(batch.values()))), row_length(batch)
        parts = self.run.trainer.grad_accum_steps
        cut = f" in {parts} microbatches" if parts > 1 else ""
        with self._timing.paused():
            program = programs.compiled(
                train_step(self.run.spec),
                *(self.run.state, batch, self.run.hyper(0), self._seed),
                name="train step",
                what=f"{rows} rows of {length} tokens{cut}",
                say=self.say,
            )
        self.folder.phase("train", self.step)
        return program

    def _look(self) -> None:
        """Fetches the metrics of the oldest update that was not looked at."""
        assert self._log is not None and self._stream is not None
        step, shapes, metrics = self._pending.popleft()
        pairs = np.asarray(metrics.pairs, np.float64)
        totals = {name: (pairs[i, 0], pairs[i, 1]) for i, name in enumerate(metrics.names)}
        if not metrics.finite:
            loss, norm = totals["loss"], totals["grad_norm"]
            raise NotFiniteError(
                f"step {step} is not finite: its loss is {loss[0] / max(loss[1], 1):.4g}, the norm "
                f"of its gradients {norm[0]:.4g}. {self._kept()} Lower optimizer.lr, set "
                "optimizer.clip_norm, or lengthen schedule.warmup_steps"
            )
        self._count_skipped(step, totals)
        self._timing.count(shapes)
        values = self._log.add(step, totals, lr=self.run.lr(step - 1))
        if values is None:
            return
        timing = self._timing.lap(step, self._stream.waited)
        for hook in self._hooks:
            hook.line(step, values, timing)
        if time.monotonic() - self._status_at > _STATUS_SECONDS:
            self.write_status()

    def _count_skipped(self, step: int, totals: Mapping[str, tuple[float, float]]) -> None:
        """Says when updates begin to be skipped, and ends a run that does nothing else."""
        asked = (name for name, (count, _) in totals.items() if name.startswith(SKIPPED) and count)
        reasons = ", ".join(name.removeprefix(SKIPPED) for name in asked)
        self._skipped = self._skipped + 1 if reasons else 0
        if self._skipped == 1:
            self.say(f"warning: the update of step {step} is skipped: {reasons}")
        if self._skipped >= _MOST_SKIPPED:
            raise NotFiniteError(
                f"the updates of {self._skipped} steps up to step {step} were skipped: {reasons}. "
                f"{self._kept()} Lower optimizer.lr, or the learning rates that the mixer has of "
                "its own"
            )

    def _kept(self) -> str:
        steps = self._checkpoints.steps()
        return f"The checkpoint of step {steps[-1]} is kept." if steps else "Nothing was saved yet."

    def _evaluate(self, split: Split, weights: Any, rest: Any) -> dict[str, float]:
        self.drain()
        assert self._log is not None
        self.folder.phase("eval", self.step)
        with self._timing.paused():
            values = self._values(split, weights, rest)
        self._log.write(self.step, split, values)
        for hook in self._hooks:
            hook.evaluated(self.step, split, values)
        self.folder.phase("train", self.step)
        return values

    def _values(self, split: Split, weights: Any, rest: Any) -> dict[str, float]:
        trainer = self.run.trainer
        return evaluate(
            self.run,
            weights,
            rest,
            split,
            max_samples=trainer.eval_samples if split == "valid" else trainer.test_samples,
            say=self.say,
            interrupt=lambda batch: self.stop.agree(batch)[0],
        )


def stream_of(run: Setup, start: int, stop: int | None) -> pipeline.Stream:
    """The batches that a run learns from in steps start to stop of its data."""
    part = meshes.feed(run.spec.mesh, run.spec.rules)
    return pipeline.batches(
        run.data,
        "train",
        global_batch_size=run.trainer.global_batch_size,
        start_step=start,
        stop_step=stop,
        process_index=part.index,
        process_count=part.count,
        workers=run.trainer.workers,
        prefetch=run.trainer.prefetch,
    )
