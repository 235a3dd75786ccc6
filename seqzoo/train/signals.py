"""Being asked to stop: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end a run at its next step boundary."""

import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_HEARD = b"\nCtrl-C: ends at the next step and saves; once more ends at once\n"


class StopRequest:
    """Remembers a signal until the train loop comes to a step boundary.

    Make it after jax.distributed.initialize: that call installs its own handler for SIGTERM and
    would silently replace ours. Use it as a context manager; leaving it puts the earlier handlers
    back. Outside the main thread Python allows no handlers: then nobody is ever asked to stop.
    Ctrl-C that is ignored (a job in a script's background) stays so.

    Args:
      agree_every: with several processes, every how many steps they exchange their flags, so that
        all stop at the same step. One process looks at its own flag at every step.
    """

    def __init__(self, *, agree_every: int = 10):
        self.received: str | None = None
        self._agree_every = agree_every
        self._agreed = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._earlier.items():
            # None: the handler was not installed from Python and cannot be put back from it.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._earlier.clear()

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self.received == "SIGINT":
                raise KeyboardInterrupt
            os.write(2, _HEARD)  # a print may stand in the middle of another one
        self.received = signal.Signals(number).name

    def agree(self, step: int, save: bool = False) -> tuple[bool, bool]:
        """Returns (stop now, save now); the same answer on every process of the run.

        Args:
            step: the step boundary that all processes have come to.
            save: whether this process finds, by its own clock, that it is time to save.
        """
        stop = self.received is not None
        if jax.process_count() == 1:
            return stop, save
        if self._agreed or step % self._agree_every:
            return self._agreed, False
        flags = np.reshape(multihost_utils.process_allgather(np.array([stop, save])), (-1, 2))
        self._agreed = bool(flags[:, 0].any())
        return self._agreed, bool(flags[:, 1].any())
