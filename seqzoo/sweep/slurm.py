"""The workers under SLURM: a script that one can read, and that requeues itself.

Whole nodes, one task per node that starts a worker per GPU. SLURM sends SIGUSR2 two minutes before
the time is up; the workers save and leave with 75, and the script puts itself into the queue again,
unless somebody stopped the study.
"""

import pathlib
import re
import shlex
import subprocess
import sys

from seqzoo.errors import SeqzooError
from seqzoo.sweep.settings import LauncherSettings
from seqzoo.sweep.study import Study

_SAVE_SECONDS = 120


def script(name: str, path: pathlib.Path, launcher: LauncherSettings) -> str:
    """The text for sbatch.

    Args:
        name: of the study.
        path: its folder, on a file system that the nodes share.
        launcher: its settings.
    """
    hours, minutes = divmod(launcher.minutes, 60)
    options = [
        f"--job-name={name}",
        f"--output={shlex.quote(f'{path}/slurm-%j.log')}",
        "--open-mode=append",
        f"--nodes={launcher.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        *([f"--gpus-per-node={launcher.gpus_per_node}"] if launcher.gpus_per_node else []),
        f"--time={hours}:{minutes:02d}:00",
        f"--signal=USR2@{_SAVE_SECONDS}",
        "--requeue",
        *([f"--partition={launcher.partition}"] if launcher.partition else []),
        *([f"--account={launcher.account}"] if launcher.account else []),
        *launcher.options,
    ]
    lines = [f"#SBATCH {option}" for option in options]
    workers = f" launcher.workers={launcher.workers}" if launcher.workers else ""
    return _SCRIPT.format(
        options="\n".join(lines),
        setup="\n".join(launcher.setup) or "# launcher.setup stands here",
        study=shlex.quote(str(path)),
        python=shlex.quote(sys.executable),
        workers=workers,
    )


def submit(study: Study, launcher: LauncherSettings) -> str:
    """Writes the script into the study's folder and submits it; returns the job's number.

    Raises:
        SeqzooError: sbatch is not there, or refuses.
    """
    file = study.path / "sbatch.sh"
    file.write_text(script(study.definition.name, study.path, launcher), encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SeqzooError(
            f"sbatch cannot be called ({error.strerror}): type this on a login node of SLURM, or "
            f"submit {file} there; launcher=local works here"
        ) from error
    if done.returncode:
        raise SeqzooError(f"sbatch refused {file}: {(done.stderr or done.stdout).strip()}")
    number = re.search(r"\d+", done.stdout)
    return number[0] if number else done.stdout.strip()


_SCRIPT = """\
#!/bin/bash
# Workers of the seqzoo study {study}.
{options}

{setup}

study={study}
# One task per node, with all its CPUs; each starts a worker for every GPU of its node.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \\
    {python} -m seqzoo.cli.main sweep --workers "$study"{workers}
code=$?

# 75: time is up or the job was preempted, and all was saved. Into the queue again, unless
# 'seqzoo sweep stop' said otherwise.
if [ "$code" -eq 75 ] && [ ! -e "$study/stop" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
