"""Runs in one program: how many times one run they take, and what jax.vmap loses on a CPU."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqzoo.allocator import keep_freed_memory
from seqzoo.config.compose import compose
from seqzoo.sweep.bench import TINY
from seqzoo.train import loop, programs, stacked
from seqzoo.train import mesh as meshes
from seqzoo.train.group import Job, train_group
from seqzoo.train.session import stream_of
from seqzoo.train.setup import initial_state, setup
from seqzoo.train.step import train_step

_DEFAULT = ("mesh.data=1",)  # the default MQAR experiment
_QUICK = (*TINY, "model.channel_mixer=null", "trainer.test_samples=0")
_RUN = ("trainer.stop_at_target=false", "logger.progress=none", "logger.tensorboard=false")


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: a step of one run and of a group; a whole run and a whole group."""
    words, n, rounds, steps = (_QUICK, 2, 3, 8) if quick else (_DEFAULT, 16, 8, 200)
    keep_freed_memory()
    rows = _step_rows(words, n, stacked.FORMS, rounds)
    if not quick:
        rows += _without_kept_memory(n, rounds)
    compiled = "" if quick else ", compiled before"
    seconds = whole(words, n, steps, attempts=1 if quick else 2)
    rows += [
        {"bench": "vectorize", "case": f"one run of {steps} steps{compiled}",
         "ms": round(1e3 * seconds["alone"]), "times one run": 1.0},
        {"bench": "vectorize", "case": f"{n} of them as a group{compiled}",
         "ms": round(1e3 * seconds["group"]),
         "times one run": round(seconds["group"] / seconds["alone"], 1)},
    ]  # fmt: skip
    return rows


def _step_rows(
    words: Sequence[str], n: int, forms: Sequence[str], rounds: int, note: str = ""
) -> list[dict[str, object]]:
    seconds = step_seconds(words, n, forms, rounds)
    rows: list[dict[str, object]] = []
    for name, took in seconds.items():
        case = "step of one run" if name == "one" else f"step of {n} runs by {name}"
        times = round(took / seconds["one"], 1)
        rows.append({"bench": "vectorize", "case": case + note, "ms": round(1e3 * took, 1),
                     "times one run": times})  # fmt: skip
    return rows


def step_seconds(
    words: Sequence[str], n: int, forms: Sequence[str], rounds: int
) -> dict[str, float]:
    """The best of some rounds, in turns: of a step of one run, and of a step of n."""
    one = setup(compose(list(words)))
    whole = NamedSharding(one.spec.mesh, PartitionSpec())
    _, host = next(stream_of(one, 0, 1))
    hyper, seed = one.hyper(0), np.uint32(0)
    batch = meshes.put_batch(host, meshes.batch_sharding(one.spec.mesh, one.spec.rules))
    state = initial_state(one)
    alone = programs.compiled(train_step(one.spec), state, batch, hyper, seed, name="step")
    arguments = jax.device_put(
        jax.tree.map(lambda a: np.stack([a] * n), (host, hyper, seed, np.bool_(True))), whole
    )
    states, steps = {}, {}
    for by in forms:
        states[by] = stacked.empty(one.spec, n)()
        for place in range(n):
            states[by] = stacked.put(states[by], state, np.int32(place))
        step = stacked.group_step(one.spec, by)
        steps[by] = programs.compiled(step, states[by], *arguments, name="step")
    best = dict.fromkeys(("one", *forms), float("inf"))
    for _ in range(rounds):
        for _ in range(n):  # as often as the others do it
            began = time.perf_counter()
            state, _ = alone(state, batch, hyper, seed)
            jax.block_until_ready(state)
            best["one"] = min(best["one"], time.perf_counter() - began)
        for by in forms:
            began = time.perf_counter()
            states[by], _ = steps[by](states[by], *arguments)
            jax.block_until_ready(states[by])
            best[by] = min(best[by], time.perf_counter() - began)
    return best


def whole(words: Sequence[str], n: int, steps: int, attempts: int = 2) -> dict[str, float]:
    """Seconds of one run and of a group of n, with evaluations, saves and tests; the second
    attempt compiles nothing."""
    lines = [[*words, *_RUN, f"trainer.steps={steps}", f"trainer.seed={i}"] for i in range(n)]
    jobs = [Job(compose(line), line) for line in lines]
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for attempt in map(str, range(attempts)):
            began = time.perf_counter()
            loop.train(jobs[0].config, overrides=lines[0], root=root / attempt / "alone")
            seconds["alone"] = time.perf_counter() - began
            began = time.perf_counter()
            for outcome in train_group(jobs, name="bench", root=root / attempt / "group"):
                if isinstance(outcome, Exception):
                    raise outcome
            seconds["group"] = time.perf_counter() - began
    return seconds


def _without_kept_memory(n: int, rounds: int) -> list[dict[str, object]]:
    """The same steps in a process whose freed memory goes back to the kernel (allocator.py)."""
    code = (
        "import json; from seqzoo.train import programs; programs.use_disk_cache();"
        "from seqzoo.sweep import bench_vectorize as b;"
        f"print(json.dumps(b._step_rows(b._DEFAULT, {n}, b.stacked.FORMS, {rounds},"
        "', freed memory given back')))"
    )
    # Any variable of malloc's keeps our settings away; this one is its default.
    env = {**os.environ, "MALLOC_TOP_PAD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])
