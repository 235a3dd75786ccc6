"""`seqzoo train -m launcher=submitit_slurm`: each run as a job, by submitit (an extra).

submitit pickles what it submits: an object of this module that holds words, nothing else. A run
that is told to stop saves and exits 75; then submitit puts the same words into the queue again, and
they go on where they stopped.
"""

import os
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

from seqzoo.errors import ConfigError, SeqzooError
from seqzoo.sweep.settings import LauncherSettings

KINDS = ("submitit_slurm", "submitit_local")
_SAVE_SECONDS = 120
_STOPPED = 75
_FOR_EVER = 1_000_000  # submitit gives up after so many times that the time was up


class Command:
    """A command line of seqzoo, as a job."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)

    def __call__(self) -> int:
        """Runs it; returns its exit code."""
        from seqzoo.cli.main import main  # in the job, not where it is submitted

        code = main(self.words)
        if code == _STOPPED:
            # The run had the handlers and has saved; now submitit's has its turn. It calls
            # `checkpoint`, requeues, and ends this process.
            name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
            signal.raise_signal(getattr(signal, f"SIG{name}"))
        if code not in (0, 3, _STOPPED):  # that a run diverged is a result
            raise SeqzooError(f"seqzoo {' '.join(self.words)} ended with exit {code}")
        return code

    def checkpoint(self) -> Any:
        """What submitit puts into the queue again: --force began it anew once."""
        words = [word for word in self.words if word != "--force"]
        return _submitit().helpers.DelayedSubmission(Command(words))


def submit(
    lines: Sequence[Sequence[str]], launcher: LauncherSettings, folder: pathlib.Path
) -> list[Any]:
    """Submits a job per command line; returns submitit's jobs.

    Args:
        lines: words of `seqzoo`.
        launcher: kind submitit_slurm or submitit_local, and what a job gets.
        folder: for scripts, pickles and what the jobs print; on SLURM the nodes share it.

    Raises:
        ConfigError: submitit is not installed.
        SeqzooError: SLURM is not here, or refuses.
    """
    submitit = _submitit()
    cluster = launcher.kind.removeprefix("submitit_")
    try:
        executor = submitit.AutoExecutor(
            folder=folder, cluster=cluster, slurm_max_num_timeout=_FOR_EVER
        )
        executor.update_parameters(**parameters(launcher))
        with executor.batch():
            return [executor.submit(Command(line)) for line in lines]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise SeqzooError(
            f"launcher={launcher.kind}: {error}. Type this on a login node of SLURM; "
            "launcher=local runs one after the other here"
        ) from error


def parameters(launcher: LauncherSettings) -> dict[str, Any]:
    """A job's share, in submitit's words."""
    found: dict[str, Any] = {
        "name": "seqzoo",
        "timeout_min": launcher.minutes,
        "nodes": launcher.nodes,
        "tasks_per_node": 1,
        "slurm_signal_delay_s": _SAVE_SECONDS,
        "slurm_partition": launcher.partition,
        "slurm_account": launcher.account,
        "slurm_setup": launcher.setup or None,
        "slurm_array_parallelism": launcher.workers,
        "slurm_additional_parameters": dict(_option(text) for text in launcher.options) or None,
        "gpus_per_node": launcher.gpus_per_node or None,
        "cpus_per_task": launcher.threads,
    }
    return {name: value for name, value in found.items() if value is not None}


def _option(text: str) -> tuple[str, Any]:
    """``--qos=long`` as submitit has it: ("qos", "long"); ``--exclusive``: ("exclusive", True)."""
    name, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not name:
        raise ConfigError(f"launcher.options has '{text}'; write '--qos=long' or '--exclusive'")
    return name.replace("-", "_"), value if equals else True


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "launcher=submitit_... needs the package submitit: pip install 'seqzoo[slurm]', or "
            "make install EXTRA=slurm; 'seqzoo sweep launcher=slurm' works without it"
        ) from error
    return submitit
