"""From the command to the first training step: fresh processes, without and with the cache."""

import json
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
    "trainer.steps=2",
    "trainer.eval_every=1000000",
    "trainer.save_every=1000000",
    "trainer.log_every=1",
)


def seconds_to_first_step(folder: pathlib.Path, cache: pathlib.Path, seed: int) -> float:
    """Starts `seqzoo train` and waits for the first row of metrics.jsonl."""
    command = [sys.executable, "-m", "seqzoo.cli.main", "train", *OVERRIDES, f"trainer.seed={seed}"]
    env = {**os.environ, "SEQZOO_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    started = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while True:
            for metrics in (folder / "runs").glob(f"*/*seed={seed}*/metrics.jsonl"):
                lines = metrics.read_text().splitlines()
                if lines and json.loads(lines[0]):
                    return time.perf_counter() - started
            if child.poll() is not None and child.returncode != 0:
                raise RuntimeError(
                    f"seqzoo train ended with {child.returncode}: {child.stderr.read()}"
                )
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: seconds to the first step, uncached and cached."""
    del quick
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cold = seconds_to_first_step(folder, folder / "cache", seed=1)
        warm = seconds_to_first_step(folder, folder / "cache", seed=2)
    return [
        {
            "bench": "first_step",
            "case": "24 layers, no cache",
            "seconds": round(cold, 1),
            "to reach": "<= 20",
        },
        {
            "bench": "first_step",
            "case": "24 layers, cached",
            "seconds": round(warm, 1),
            "to reach": "<= 8",
        },
    ]
