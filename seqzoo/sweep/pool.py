"""The workers of this machine: one process per device, begun again if it dies.

The pool only starts and watches: the study is in its storage, so that killing the pool, or a
worker, or all of them, loses nothing.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from seqzoo.errors import LockedError
from seqzoo.sweep import devices, worker
from seqzoo.sweep.locks import held
from seqzoo.sweep.settings import LauncherSettings
from seqzoo.sweep.study import Study

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_LOOK_SECONDS = 0.5
_REPEAT_SECONDS = 15.0  # between two requests to stop
_MOST_DEATHS = 50  # of workers of one place before it stays empty
_STOPPED = 75


class Pool:
    """Workers on the devices of this machine.

    Args:
        study: what they work on.
        launcher: how many, and how.
        say: gets what the user should read.
        watch: called often, to draw.
    """

    def __init__(
        self,
        study: Study,
        launcher: LauncherSettings,
        *,
        say: Callable[[str], None] = print,
        watch: Callable[[], None] = lambda: None,
    ):
        self._study, self._say, self._watch = study, say, watch
        self._slots = devices.slots(launcher)
        self._logs = study.path / "workers"
        self._workers: dict[int, subprocess.Popen] = {}
        self._deaths = [0] * len(self._slots)
        self._codes: list[int] = []
        self._asked = ""
        self._asked_at = 0.0

    def run(self) -> int:
        """Works until the study is done or somebody says stop; returns the exit code.

        Raises:
            LockedError: this machine works on the study already.
        """
        here = self._study.path / "claims" / f"pool-{socket.gethostname()}"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(here))
            except LockedError as error:
                raise LockedError(
                    f"this machine works on the study '{self._study.definition.name}' already; "
                    f"'seqzoo sweep status {self._study.path}' shows it, 'stop' ends it"
                ) from error
            stack.callback(self._end)
            self._logs.mkdir(exist_ok=True)
            with _hearing(self._hear):
                for number in range(len(self._slots)):
                    self._start(number)
                while self._workers:
                    time.sleep(_LOOK_SECONDS)
                    self._look()
                    self._pass_on()
                    self._watch()
        return self._code()

    def _start(self, number: int) -> None:
        env = {**os.environ, **self._slots[number], worker.PARENT: str(os.getpid())}
        env["NPROC"] = str(self._study.definition.threads)
        env["SEQZOO_DISTRIBUTED"] = "0"
        command = [sys.executable, "-m", "seqzoo.cli.main", "sweep", "--worker"]
        log = self._logs / f"{socket.gethostname()}-{number}.log"
        with log.open("ab") as out:
            # A session of its own: Ctrl-C is for the pool, which lets workers save.
            self._workers[number] = subprocess.Popen(
                [*command, str(self._study.path)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _look(self) -> None:
        """Begins again what died; what ended by itself stays away."""
        for number, child in list(self._workers.items()):
            code = child.poll()
            if code is None:
                continue
            del self._workers[number]
            if code in (0, 1, 2, _STOPPED) or self._asked:
                self._codes.append(code)
                continue
            self._deaths[number] += 1
            how = f"by signal {-code}" if code < 0 else f"with exit {code}"
            if self._deaths[number] > _MOST_DEATHS:
                self._say(f"worker {number} died {how} for the {_MOST_DEATHS}th time; it stays off")
                self._codes.append(1)
                continue
            self._say(f"worker {number} died {how}; another one goes on")
            self._start(number)

    def _hear(self, number: int, frame: object) -> None:
        self._asked = signal.Signals(number).name

    def _pass_on(self) -> None:
        if self._asked and time.monotonic() - self._asked_at > _REPEAT_SECONDS:
            if not self._asked_at:
                self._say(f"{self._asked}: the workers save and leave")
            self._asked_at = time.monotonic()
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for child in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def _end(self) -> None:
        """Whatever went wrong here: workers save and leave."""
        self._signal(signal.SIGTERM)
        for child in self._workers.values():
            child.wait()

    def _code(self) -> int:
        errors = [code for code in self._codes if code not in (0, _STOPPED)]
        if errors:
            self._study.patience.seconds = 0.0  # the workers had theirs, if it was the storage
        if self._study.too_many_failures():
            return 1
        if self._study.finished():
            return 0
        if errors:
            self._say(f"workers ended with errors; {self._logs} has what they said")
        return errors[0] if errors else _STOPPED


@contextlib.contextmanager
def _hearing(handler: Callable[[int, Any], None]):
    earlier = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, one in earlier.items():
            signal.signal(number, one if one is not None else signal.SIG_DFL)
