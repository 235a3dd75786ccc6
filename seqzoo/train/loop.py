"""Training, from a configuration to a result; the same call again goes on where it stopped."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from omegaconf import DictConfig

from seqzoo.allocator import keep_freed_memory
from seqzoo.errors import ConfigError, NotFiniteError, Preempted, Pruned, SeqzooError
from seqzoo.train import branch as branches
from seqzoo.train import precision, processes, programs
from seqzoo.train.evaluate import Interrupted
from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks import Hook, make_hooks
from seqzoo.train.hooks.progress import Progress
from seqzoo.train.identity import plain
from seqzoo.train.result import Result, finished_before
from seqzoo.train.session import Session
from seqzoo.train.setup import Setup, build_data, check_data, setup
from seqzoo.train.signals import StopRequest
from seqzoo.train.values import check_values

_STATES: dict[type[BaseException], str] = {
    Preempted: "preempted",
    NotFiniteError: "not_finite",
    Pruned: "pruned",
    KeyboardInterrupt: "interrupted",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(
    config: DictConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    root: str | os.PathLike = "runs",
    force: bool = False,
    strict: bool = False,
    hooks: Sequence[Hook] = (),
) -> Result:
    """Trains, or goes on with a run; returns what was reached.

    Args:
        config: composed and checked (seqzoo.config.compose).
        overrides: what was typed: names the folder.
        root: the folder of all runs.
        force: begin anew; what is there moves aside.
        strict: refuse to go on if code or versions changed.
        hooks: look on beside those that the configuration asks for.

    Raises:
        Preempted: it was asked to stop, and saved.
        Pruned: a hook found that it is not worth going on.
        NotFiniteError: the loss or a gradient is not finite.
        ConfigError: something does not fit together; nothing was started.
        LockedError: another process works on this run.
        SeqzooError: anything else that the user can act on.
    """
    began = time.monotonic()
    keep_freed_memory()
    config = plain(config)
    data = build_data(config)
    fingerprint = data.fingerprint()
    place = RunFolder.locate(config, overrides, root=root, data_fingerprint=fingerprint)
    if not force and place.finished():
        return finished_before(place, config)
    check_values(config)
    processes.start()
    with StopRequest() as stop:  # after processes.start, which would take our handlers away
        warning = precision.prepare(config["trainer"], place.path, fresh=force)
        programs.use_disk_cache()
        run = setup(config, data=data)
        check_data(run)
        branch = branches.of(place, config, fresh=force)
        with open_folder(
            run,
            overrides,
            root,
            fingerprint=fingerprint,
            force=force,
            strict=strict,
            branch=branch,
        ) as folder:
            if folder.finished():  # by somebody else, a moment ago
                return finished_before(folder, config)
            progress = Progress(
                run.logger.progress, steps=run.trainer.steps, metric=run.task.metric, log=folder.log
            )
            for text in (*folder.warnings, warning):
                if text and processes.first():
                    progress.say(f"warning: {text}")
            session, tested = _run(run, folder, branch, progress, stop, hooks)
    return Result.of(run, folder, session, tested, time.monotonic() - began, overrides)


def _run(
    run: Setup,
    folder: RunFolder,
    branch: branches.Branch | None,
    progress: Progress,
    stop: StopRequest,
    more_hooks: Sequence[Hook],
) -> tuple[Session, dict[str, float]]:
    """From the open folder to the test, or to an error that is on record."""
    session = None
    try:
        hooks = [*make_hooks(run, folder), *more_hooks] if processes.first() else []
        session = Session(run, folder, progress=progress, hooks=hooks, stop=stop)
        session.begin(branch)
        steps = fit(session)
        while (tested := next(steps)) is None:
            session.advance()
        session.close()
        return session, tested
    except BaseException as error:
        known = known_as(error, session)
        leave(folder, session, known or error)
        if known is None:
            raise
        raise known from error


def fit(session: Session) -> Iterator[dict[str, float] | None]:
    """The loop of a run: at each step boundary stop, evaluate, save where due; at the end test.

    Yields:
        None where the next update is due, which whoever drives the loop begins (a run alone, or
        together with the others of its group); at the end what the test gave.

    Raises:
        Interrupted: it was asked to stop, and saved.
    """
    while True:
        stop, save = session.asked()
        if stop:
            break
        if session.must_evaluate:
            with contextlib.suppress(Interrupted):
                session.evaluate()
            continue
        if save or (session.done and not session.saved):
            session.save()
        if session.done:
            break
        yield None
    if stop and save:
        session.save()
    session.wait()
    if stop:
        raise Interrupted
    tested = session.test()
    session.write_status(state="finished", test=tested, test_step=session.tested)
    yield tested


def open_folder(
    run: Setup,
    overrides: Sequence[str],
    root: str | os.PathLike,
    *,
    fingerprint: str,
    force: bool = False,
    strict: bool = False,
    branch: branches.Branch | None = None,
    layout: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Opens the run folder, process 0 before the others; `layout` is what changes rounding."""
    if not processes.first():
        processes.barrier("run folder")
    try:
        folder = RunFolder.open(
            run.config,
            overrides,
            root=root,
            force=force,
            strict=strict,
            data_fingerprint=fingerprint,
            layout={
                "mesh": dict(run.spec.mesh.shape),
                "microbatches": run.spec.grad_accum_steps,
                **(layout or {}),
            },
            branch_step=None if branch is None else branch.step,
            process_index=jax.process_index(),
        )
    except OSError as error:
        raise known_as(error, None) or SeqzooError(
            f"the run folder cannot be written: {error}; --runs names another place"
        ) from error
    if processes.first():
        processes.barrier("run folder")
    return folder


def known_as(error: BaseException, session: Session | None) -> SeqzooError | None:
    """What the user must read, where the error itself does not say it."""
    if isinstance(error, Interrupted) and session is not None:
        kept = "saved" if session.saved else "there was nothing to save yet"
        return Preempted(
            f"stopped by {session.stop.received or 'a signal'} at step {session.step}, {kept}; the "
            "same command goes on"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return SeqzooError(
            f"the disk or the quota is full: {error}. What was saved stays; make room, then run "
            "the same command again"
        )
    if isinstance(error, jax.errors.JaxRuntimeError):
        return programs.out_of_memory(error, None if session is None else session.doing)
    return None


def leave(folder: RunFolder, session: Session | None, error: BaseException) -> None:
    """Says in status.json and train.log how the run ended, as far as that still works.

    A first start that ends by its configuration, before any update, leaves nothing behind.
    """
    state = next((name for kind, name in _STATES.items() if isinstance(error, kind)), "failed")
    with contextlib.suppress(Exception):
        if session is not None:
            session.close()
    untouched = session is None or not session.updated
    with contextlib.suppress(OSError):
        if isinstance(error, ConfigError) and untouched and folder.take_back():
            return
        folder.log(f"{state}: {error}")
        step = None if session is None else session.step
        folder.write_status(state=state, step=step, error=str(error))
