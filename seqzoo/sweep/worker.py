"""A worker: one process that takes one trial after another until the study is done.

It pins its threads before jax starts, never joins other processes' jax.distributed, and leaves at
a step boundary when its study or its parent says so. A trial that it leaves is gone on with by
whoever comes next.
"""

import contextlib
import os
import pathlib
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from seqzoo.errors import LockedError, Preempted, SeqzooError
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.storage import AWAY, StorageError
from seqzoo.sweep.study import Stopped, Study
from seqzoo.train import environment

# The process that started a worker; without it the worker leaves.
PARENT = "SEQZOO_SWEEP_PARENT"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_SECONDS = 2.0
_LOOK_SECONDS = 1.0


def prepare(threads: int) -> None:
    """Sets what must stand before jax is imported."""
    os.environ["SEQZOO_DISTRIBUTED"] = "0"
    environment.set_threads(threads)


def work(
    path: str | os.PathLike,
    *,
    say: Callable[[str], None] = print,
    size: Callable[[pathlib.Path], Any] = lambda path: None,
) -> int:
    """Works on a study until it is done.

    Args:
        path: the study's folder.
        say: gets a line per trial.
        size: what the model of a run folder costs, for the report; called once jax may start.

    Returns:
        0: the study is done. Its failures are the business of whoever started it.

    Raises:
        Stopped: the study, the parent or a signal said so.
        StorageError: the storage is away for too long; what runs was saved.
    """
    study = Study.open(path, say=say)
    prepare(study.definition.threads)
    from seqzoo.sweep import trial, vectorize  # starts jax's import

    def take() -> list[Claimed]:
        if study.definition.sweep.vectorize:
            return vectorize.claim(study)
        claimed = study.claim()
        return [] if claimed is None else [claimed]

    def run(claims: list[Claimed]) -> str:
        if study.definition.sweep.vectorize:
            return vectorize.run(study, claims, size=size, say=say)
        return trial.run(study, claims[0], size=size)

    with _Ear(study.path) as ear:
        while True:
            ear.check()
            if why := study.stopped():
                raise Stopped(f"the study was stopped: {why}")
            claims = take()
            if claims:
                with contextlib.ExitStack() as stack:
                    for claimed in claims:
                        stack.enter_context(claimed)
                    _work_on(study, claims, run, say)
            elif study.finished():
                return 0
            else:
                time.sleep(_POLL_SECONDS)


def _work_on(
    study: Study,
    claims: list[Claimed],
    run: Callable[[list[Claimed]], str],
    say: Callable[[str], None],
) -> None:
    """Runs a trial, or those of a group; what goes wrong stays with them."""
    for claimed in claims:
        say(f"trial {claimed.number}: {' '.join(study.space.own_words(claimed.point))}")
    numbers = ", ".join(str(claimed.number) for claimed in claims)
    name = f"trial {numbers}" if len(claims) == 1 else f"trials {numbers}"
    try:
        told = run(claims)
    except Preempted as error:
        for claimed in claims:
            claimed.leave()
        raise Stopped(f"{name}: {error}") from error
    except StorageError:
        raise
    except LockedError as error:
        say(f"{name} waits: {error}")
        for claimed in claims:
            study.skip(claimed)
    except SeqzooError as error:
        _failed(claims, str(error), say)
    except Exception as error:
        traceback.print_exc()
        _failed(claims, f"{type(error).__name__}: {error}", say)
    else:
        say(f"{name}: {told}")


def _failed(claims: list[Claimed], error: str, say: Callable[[str], None]) -> None:
    for claimed in claims:
        if not claimed.told:  # of a group, others may have ended before
            say(f"trial {claimed.number} failed: {error}")
            claimed.fail(error)


class _Ear:
    """Hears that the worker is to leave: by signal, from its study, or by its parent's death.

    While a trial trains, the train loop has the handlers; whatever comes is passed on to it as a
    signal.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._parent = int(os.environ.get(PARENT, "0"))
        self._why = ""
        self._done = threading.Event()
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "_Ear":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._hear)
            self._thread = threading.Thread(target=self._look, name="sweep-ear", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        for number, handler in self._earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check(self) -> None:
        """Raises Stopped if something was heard."""
        if self._why:
            raise Stopped(self._why)

    def _hear(self, number: int, frame: object) -> None:
        self._why = f"stopped by {signal.Signals(number).name}"

    def _look(self) -> None:
        study: Study | None = None  # with a connection of its own
        while not self._done.wait(_LOOK_SECONDS):
            why = ""
            if self._parent and os.getppid() != self._parent:
                why = "the process that started it is gone"
            else:
                try:
                    study = study or Study.open(self._path, say=lambda text: None)
                    why = study.optuna.user_attrs.get("stop", "")
                except (*AWAY, SeqzooError):
                    study = None
            if why:
                self._why = why
                os.kill(os.getpid(), signal.SIGTERM)
                if self._done.wait(10):  # a signal at the very end of a run is lost
                    return
