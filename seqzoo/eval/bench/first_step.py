"""From the command to the first training step: fresh processes, without and with the cache."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

OVERRIDES = (
    "model=mamba_small",
    "model.n_layers=24",
    "model.d_model=64",
    "trainer.steps=1",
    "trainer.log_every=1",
    "logger.progress=none",
)
_MOST_SECONDS = 600


def seconds_to_first_step(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """Starts `seqzoo train` in an empty folder and waits for the first row of metrics.jsonl."""
    folder.mkdir()
    command = [sys.executable, "-m", "seqzoo.cli.main", "train", *OVERRIDES]
    env = {**os.environ, "SEQZOO_CACHE": str(cache)}
    env.pop("XLA_FLAGS", None)
    started = time.perf_counter()
    with open(folder / "stderr.txt", "w+") as errors:
        child = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            while time.perf_counter() - started < _MOST_SECONDS:
                rows = [p for p in folder.glob("runs/*/*/metrics.jsonl") if p.stat().st_size]
                if rows:
                    return time.perf_counter() - started
                if child.poll():
                    errors.seek(0)
                    raise RuntimeError(
                        f"seqzoo train ended with {child.returncode}: {errors.read()}"
                    )
                time.sleep(0.02)
            raise RuntimeError(f"no step after {_MOST_SECONDS} s")
        finally:
            child.kill()
            child.wait()


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: seconds to the first step, uncached and cached."""
    del quick
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cold = seconds_to_first_step(folder / "cold", folder / "cache")
        warm = seconds_to_first_step(folder / "warm", folder / "cache")
    return [
        {
            "bench": "first_step",
            "case": f"24 layers of width 64, {case}",
            "seconds": round(seconds, 1),
            "to reach": goal,
        }
        for case, seconds, goal in (("no cache", cold, "<= 20"), ("cached", warm, "<= 8"))
    ]
