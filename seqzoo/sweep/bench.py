"""Sweeps: what the framework takes beside training, and how long a large study reports."""

import json
import math
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from seqzoo.sweep import sampler
from seqzoo.sweep.settings import split
from seqzoo.sweep.study import Study

TINY = (
    "data.vocab_size=32", "data.seq_len=16", "data.num_kv_pairs=2", "data.valid_samples=32",
    "data.test_samples=32", "model=transformer_small", "model.d_model=16", "model.n_layers=1",
    "trainer.steps=20", "trainer.global_batch_size=16", "trainer.eval_every=10",
    "trainer.save_every=10", "task=masked_answers", "data=mqar", "mesh.data=1",
)  # fmt: skip
_SPACE = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "optimizer.weight_decay=0,0.1")


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: seconds per trial beside its steps; seconds for a report."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        beside = overhead(root, trials=4 if quick else 10)
        n = 100 if quick else 1000
        fill(root, n)
        seconds = report_seconds(root / "sweeps/large")
    return [
        {
            "bench": "sweep",
            "case": "a trial of 20 steps, beside the steps, after the first",
            "seconds": round(statistics.median(beside), 2),
            "largest": round(max(beside), 2),
            "to reach": "< 3",
        },
        {
            "bench": "sweep",
            "case": f"seqzoo report of {n:,} trials",
            "seconds": round(seconds, 2),
            "to reach": "< 5",
        },
    ]


def overhead(root: pathlib.Path, trials: int) -> list[float]:
    """Seconds of each trial but the first that were not steps: one worker, one after another."""
    words = [*TINY, *_SPACE, "sweep=random", f"sweep.n_trials={trials}", "sweep.name=small"]
    command = [sys.executable, "-m", "seqzoo.cli.main", "sweep", *words, "launcher.workers=1"]
    subprocess.run([*command, "--runs", str(root)], check=True, stdout=subprocess.DEVNULL)
    study = Study.open(root / "sweeps/small")
    ended = []
    for frozen in study.trials():
        steps = _step_seconds(study.path / frozen.user_attrs["runs"][0])
        ended.append((frozen.datetime_complete, steps))
    # From the end of one trial to the end of the next, less its steps.
    return [
        (now - before).total_seconds() - steps
        for (before, _), (now, steps) in zip(ended, ended[1:], strict=False)
    ]


def _step_seconds(path: pathlib.Path) -> float:
    total, before = 0.0, 0
    for line in (path / "timing.jsonl").read_text().splitlines():
        found = json.loads(line)
        total += found["step_seconds"] * (found["step"] - before)
        before = found["step"]
    return total


def fill(root: pathlib.Path, n: int) -> None:
    """A study of n trials that ended, with values from a formula and what workers write."""
    words = ["mixer=mamba,based,attention", *_SPACE, "model.mixers.mamba.d_state=8,16,32"]
    more = ["sweep=random", f"sweep.n_trials={n}", "sweep.seeds=3", "sweep.name=large"]
    study = Study.create(split([*words, *more]), root=root)
    draw = random.Random(0)
    for _ in range(n):
        trial = study.optuna.ask()
        point = study.space.choose(lambda one: sampler.suggest(trial, one))  # noqa: B023
        good = math.exp(-((math.log10(point["optimizer.lr"]) + 2.3) ** 2))
        values = [min(1.0, good * draw.uniform(0.9, 1.1)) for _ in range(3)]
        kept = 64 * int(point.get("model.mixers.mamba.d_state", 16))
        attrs = {
            "place": study.definition.place,
            "starts": 1,
            "runs": [],
            "architecture": point["mixer"],
            "values": [str(value) for value in values],
            "tests": values,
            "diverged": 0,
            "seconds": 60.0,
            "size": {"without_embeddings": 900, "state_recurrent": kept, "state_total": kept},
        }
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        for step in (100, 200, 300):
            trial.report(values[0] * step / 300, step)
        study.optuna.tell(trial, statistics.median(values))


def report_seconds(path: pathlib.Path) -> float:
    """The whole command in a process of its own."""
    command = [sys.executable, "-m", "seqzoo.cli.main", "report", str(path)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
