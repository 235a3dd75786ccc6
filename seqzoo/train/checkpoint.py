"""Checkpoints: one atomic Orbax step each, checked bit by bit, the last two and the best kept."""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from seqzoo.errors import CheckpointError
from seqzoo.train import manifest, processes
from seqzoo.train.run_files import write_text

_LOG = logging.getLogger(__name__)

# Steps that are no longer kept are renamed into here first, so that a kill while deleting leaves
# no half of a step under its number.
_TRASH = "deleted"
_STATE, _META = "state", "meta"


# What keeps a whole step from being read for now: no rights, no memory, no descriptors, no server.
_PASSING = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
    errno.ETIMEDOUT,
)  # fmt: skip
_PASSING_WORDS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Restored(NamedTuple):
    """A step read back: its number, the state as asked for, what was saved beside it."""

    step: int
    state: Any
    meta: dict[str, Any]


class Damaged(Exception):
    """A step on disk is not what was saved."""


class Checkpointer:
    """Saves and restores the steps of one run. Needs the run folder to itself.

    Args:
      directory: where the steps lie, one folder each, named by the step's number.
      metric_mode: "max" or "min": which metric is best.
      keep_last: how many of the newest steps to keep beside the best one.
      asynchronous: write in the background; `save` returns once the state is copied.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        metric_mode: str = "max",
        keep_last: int = 2,
        asynchronous: bool = True,
    ):
        if metric_mode not in ("max", "min"):
            raise ValueError(f"metric_mode={metric_mode!r}: allowed are 'max' and 'min'")
        self.directory = pathlib.Path(directory).resolve()
        self.damaged: list[str] = []  # what was found damaged, one sentence each
        self._mode = metric_mode
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._metrics: dict[int, float | None] = {}
        self._open()

    def _open(self) -> None:
        self._empty_trash()
        self._metrics = {}
        for step in list_steps(self.directory):
            try:
                self._metrics[step] = read_meta(self.directory / str(step))["metric"]
            except Damaged as error:
                self._set_aside(step, error)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(self._kept),
                enable_async_checkpointing=self._asynchronous,
                cleanup_tmp_directories=True,
                todelete_subdir=_TRASH,
                save_root_metadata=False,
            ),
            item_handlers={_STATE: _state_handler(), _META: ocp.JsonCheckpointHandler()},
        )

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], metric: float | None = None
    ) -> None:
        """Begins to save a step. The caller may donate the state's buffers when this returns.

        Args:
          step: must not be below a step saved before. Of a step that is there already only meta
            and metric are written anew: it was evaluated after it had been saved.
          state: a pytree of arrays.
          meta: JSON beside it: data position, byte length of metrics.jsonl, hook memory, config.
          metric: ranks the step for "best"; None or a value that is not finite is never best.

        Raises:
          CheckpointError: this save or the one before it failed (a full disk). Older steps stay.
        """
        newest = max(self._metrics, default=-1)
        if step < newest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.directory}: step {newest} is there already"
            )
        if metric is not None and not math.isfinite(metric):
            metric = None
        document = {
            "format": 1,
            "step": step,
            "metric": None if metric is None else float(metric),
            "meta": meta,
        }
        if step == newest:
            self._amend(step, document)
            return
        arrays = manifest.flatten(state)
        document = manifest.seal(document | {"arrays": manifest.describe(arrays)})
        self.wait()
        self._metrics[step] = metric
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    # Orbax refuses arrays without elements; the table above remembers them.
                    state=ocp.args.PyTreeSave({k: v for k, v in arrays.items() if v.size}),
                    meta=ocp.args.JsonSave(document),
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error
        kept = self._kept(list(self._metrics))  # Orbax decided the same from the same table
        self._metrics = {step: value for step, value in self._metrics.items() if step in kept}

    def _amend(self, step: int, document: dict[str, Any]) -> None:
        """Replaces the document of the newest step, and lets go of what it no longer keeps."""
        self.wait()
        path = self.directory / str(step)
        document = manifest.seal(document | {"arrays": read_meta(path)["arrays"]})
        if jax.process_index() == 0:
            try:
                write_text(path / _META / "metadata", json.dumps(document))
            except OSError as error:
                raise self._failed(error) from error
        self._metrics[step] = document["content"]["metric"]
        kept = self._kept(list(self._metrics))
        for other in set(self._metrics) - kept:
            self._manager.delete(other)
            del self._metrics[other]

    def wait(self) -> None:
        """Waits until the step being saved is on disk.

        Raises:
          CheckpointError: it could not be written. Older steps stay.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._empty_trash()

    def _failed(self, error: Exception) -> CheckpointError:
        """Cleans up after a save that failed, so that the older steps serve on."""
        lost = set(self._metrics)
        with contextlib.suppress(Exception):
            self._manager.close()
        self._open()
        lost -= set(self._metrics)
        cause = _first_cause(error)
        return CheckpointError(
            f"step {max(lost, default='?')} could not be saved in {self.directory}: "
            f"{cause}. The steps {self.steps()} stay. If the disk or the quota is full, make room; "
            "then run the same command again"
        )

    def restore(
        self, abstract_state: Any, step: int | str | None = None, *, partial: bool = False
    ) -> Restored | None:
        """Reads a step back; a damaged one is reported, renamed damaged-STEP and passed over.

        Args:
          abstract_state: the pytree wanted, of arrays or ShapeDtypeStructs; their shardings say
            where the arrays go, else the first device of this process.
          step: None or "last" (the newest), "best", or a number.
          partial: take only what `abstract_state` has, as an evaluation takes the parameters.

        Returns:
          The step, or None when there is none that is whole.

        Raises:
          CheckpointError: the step is of another model, a number was asked for that is not there
            or is damaged, or "best" while no step has a metric.
        """
        self.wait()
        while self._metrics:
            number = self._pick(step)
            try:
                return read_step(self.directory / str(number), abstract_state, partial=partial)
            except Damaged as error:
                self._manager.close()
                self._set_aside(number, error)
                processes.barrier(f"set aside {number}")  # or others would still find it
                self._open()
                if isinstance(step, int):
                    raise CheckpointError(self.damaged[-1]) from error
        return None

    def steps(self) -> list[int]:
        """Returns the steps on disk or on their way there, oldest first."""
        return sorted(self._metrics)

    def best_step(self) -> int | None:
        """Returns the step with the best metric, the newest of equals; None without metrics."""
        return best_of(self._metrics, self._mode)

    def close(self) -> None:
        """Finishes saving and lets go."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def _pick(self, step: int | str | None) -> int:
        return pick(step, self._metrics, self._mode, self.directory)

    def _kept(self, steps: list[int]) -> set[int]:
        kept = set(sorted(steps)[-self._keep_last :])
        best = best_of({step: self._metrics.get(step) for step in steps}, self._mode)
        return kept | ({best} if best is not None else set())

    def _set_aside(self, step: int, error: Damaged) -> None:
        """Renames a damaged step: Orbax saves nothing at or below a step that it sees."""
        aside, number = self.directory / f"damaged-{step}", 1
        while aside.exists():
            number += 1
            aside = self.directory / f"damaged-{step}.{number}"
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(aside)
        self._metrics.pop(step, None)
        self.damaged.append(
            f"checkpoint {step} in {self.directory} is damaged ({error}); renamed {aside.name}"
        )
        if jax.process_index() == 0:
            _LOG.warning(self.damaged[-1])


def list_steps(directory: pathlib.Path) -> list[int]:
    """Returns the numbers of the steps in a folder, oldest first; half-written ones have none."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def best_of(metrics: Mapping[int, float | None], mode: str) -> int | None:
    """Returns the step whose metric is best under mode "max" or "min", the newest of equals."""
    sign = 1.0 if mode == "max" else -1.0
    ranked = [(sign * value, step) for step, value in metrics.items() if value is not None]
    return max(ranked)[1] if ranked else None


def pick(
    step: int | str | None, metrics: Mapping[int, float | None], mode: str, directory: pathlib.Path
) -> int:
    """Returns the number that "last", "best" or a number means among the steps of a folder.

    Raises:
      CheckpointError: there is no such step.
    """
    there = sorted(metrics)
    if not there:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    if step is None or step == "last":
        return there[-1]
    if step == "best":
        best = best_of(metrics, mode)
        if best is None:
            raise CheckpointError(
                f"no checkpoint in {directory} has a metric to be best by: ask for 'last' or one "
                f"of {there}"
            )
        return best
    if isinstance(step, str) and step.isdecimal():
        step = int(step)
    if step not in metrics:
        raise CheckpointError(
            f"step={step!r}: allowed are 'last', 'best' and the steps {there} in {directory}"
        )
    return int(step)


def find_step(directory: pathlib.Path, step: int | str | None) -> pathlib.Path:
    """Returns the folder of a step of any run, as one who only reads: changes nothing on disk.

    Args:
      directory: the checkpoints of a run.
      step: None or "last", "best" (the newest where none has a metric), or a number.

    Raises:
      CheckpointError: there is no such step.
    """
    metrics: dict[int, float | None] = {}
    mode = "max"
    for number in list_steps(directory):
        try:
            document = read_meta(directory / str(number))
        except Damaged as error:
            _LOG.warning("checkpoint %d in %s is damaged (%s)", number, directory, error)
            continue
        metrics[number] = document["metric"]
        mode = document["meta"]["metric"]["mode"]
    if step == "best" and best_of(metrics, mode) is None:
        step = "last"
    return directory / str(pick(step, metrics, mode, directory))


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """Returns the document of a step: format, step, metric, meta, arrays.

    Raises:
      Damaged: it is not there or was changed.
      CheckpointError: it cannot be read for now.
    """
    try:
        document = json.loads((path / _META / "metadata").read_text(encoding="utf-8"))
        content = manifest.unseal(document)
        return {key: content[key] for key in ("format", "step", "metric", "meta", "arrays")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if _passes(error):
            raise _for_now(path, str(error)) from error
        raise Damaged(f"its metadata cannot be read: {error}") from error


def read_step(path: pathlib.Path, abstract_state: Any, *, partial: bool = False) -> Restored:
    """Reads one step folder and checks every array; changes nothing on disk.

    Raises:
      Damaged: the step is not what was saved.
      CheckpointError: it was saved from another model, or cannot be read for now.
    """
    path = path.absolute()  # Orbax takes no other
    document = read_meta(path)
    wanted = manifest.flatten(abstract_state)
    stored = document["arrays"]
    difference = manifest.differences(stored, wanted)
    if difference is None and not partial:
        extra = next((name for name in stored if name not in wanted), None)
        difference = extra and f"'{extra}' is in the checkpoint and not here"
    if difference:
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {difference}. Use the configuration that "
            "it was saved with (config.yaml of its run)"
        )
    targets = {name: _target(leaf) for name, leaf in wanted.items()}
    arrays: dict[str, Any] = {}
    failed: list[Any] = []
    try:
        arrays = _read_arrays(path / _STATE, targets, partial)
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged file
        failed = [[_first_cause(error), _passes(error)]]
    failed = manifest.gather(failed)  # one process may miss a part that the others did not read
    for text, passes in failed:
        if passes:
            raise _for_now(path, text)
    if failed:
        raise Damaged(failed[0][0])
    found = manifest.damage(stored, arrays)
    if found:
        raise Damaged(found)
    return Restored(document["step"], manifest.unflatten(abstract_state, arrays), document["meta"])


def _passes(error: BaseException | None) -> bool:
    """Whether an error says nothing of the step: read again another time, it may be whole."""
    while error is not None:
        if isinstance(error, MemoryError) or any(word in str(error) for word in _PASSING_WORDS):
            return True
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False


def _for_now(path: pathlib.Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read for now: {why}. It stays as it is; see to that, then run the same "
        "command again"
    )


def _read_arrays(path: pathlib.Path, targets: dict[str, Any], partial: bool) -> dict[str, Any]:
    empty = {
        name: jax.device_put(np.zeros(one.shape, one.dtype), one.sharding)
        for name, one in targets.items()
        if not one.size
    }
    targets = {name: one for name, one in targets.items() if one.size}
    if not targets:
        return empty
    with ocp.Checkpointer(_state_handler()) as reader:
        arrays = reader.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=targets,
                restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
                partial_restore=partial,
            ),
        )
    return {**arrays, **empty}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    # Compression of weights costs time and saves nothing worth having.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Keep:
    """Orbax's preservation policy: asks our table, which also knows steps without a metric."""

    def __init__(self, kept):
        self._kept = kept

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
