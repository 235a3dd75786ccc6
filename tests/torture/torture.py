"""SIGKILLs of one run at moments from a seed, restarted by the same command each time.

At its end the run must equal, bit by bit, one that nobody disturbed: parameters, optimizer state,
metrics.jsonl. `python tests/torture/torture.py --kills 20 --seed 7`, or `make torture-resume`.

Each start says what it is doing in a file (SEQZOO_PHASE_FILE); a kill waits for a phase and then a
random moment longer. Whether a kill fell into the writing of a checkpoint is read from the disk:
Orbax leaves a temporary folder behind.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

# Small and quick, with both mixers, dropout and an average of the weights; many saves.
OVERRIDES = (
    "task=masked_answers", "data=mqar", "model=mamba_attention", "model.d_model=16",
    "data.vocab_size=32", "data.seq_len=16", "data.num_kv_pairs=2", "data.valid_samples=256",
    "data.test_samples=256", "model.dropout=0.1", "trainer.steps=3000",
    "trainer.global_batch_size=16", "trainer.grad_accum_steps=2", "trainer.save_every=25",
    "trainer.eval_every=60", "trainer.log_every=7", "trainer.ema_decay=0.9",
    "trainer.stop_at_target=false", "logger.progress=none",
)  # fmt: skip

# Phase to kill in -> (longest wait after it began, in seconds; which occurrence of it, from, to).
PHASES = {"compile": (0.5, 1, 1), "save": (0.06, 2, 6), "eval": (0.02, 1, 3), "train": (2.0, 1, 1)}
LEAST = {"save": 6, "compile": 2, "eval": 2}
LEAST_RESUMED = 15
_PATIENCE = 120.0


@dataclasses.dataclass
class Kill:
    """What a kill hit."""

    wanted: str
    hit: tuple[str, ...]  # a checkpoint may be written while something else goes on
    resumed_from: int
    reached: int

    def __str__(self) -> str:
        return (
            f"aimed at {self.wanted:<8} hit {'+'.join(self.hit):<13} started from step "
            f"{self.resumed_from:>5}, reached {self.reached:>5}"
        )


class Torture:
    """One run under attack.

    Args:
        folder: where everything is written.
        seed: of the moments.
        overrides: of the run.
        env: environment of the children.
    """

    def __init__(
        self, folder: pathlib.Path, seed: int, overrides=OVERRIDES, env: dict | None = None
    ):
        self.folder, self.overrides = folder, tuple(overrides)
        self._random = random.Random(seed)
        self._env = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
        self._env["SEQZOO_CACHE"] = str(folder / "cache")
        self.kills: list[Kill] = []

    def unbroken(self) -> pathlib.Path:
        """Runs without kills; returns the run folder. Compiles everything afresh."""
        child = self._start("unbroken", cache=self.folder / "cache-of-unbroken")
        assert child.wait() == 0, "the unbroken run failed"
        return self._run_folder("unbroken")

    def broken(self, plan: list[str], extra: int = 40) -> pathlib.Path:
        """Runs with the kills of a plan, and as many more as the least numbers need."""
        wanted = collections.Counter(plan)
        plan = list(plan)
        while plan or (missing := self._missing(wanted)) is not None:
            if not plan:
                assert extra > 0, f"too many kills missed what they aimed at: {self.kills}"
                extra -= 1
                plan.append(missing)
            if not self._kill(plan.pop(0)):
                break  # it came to its end before the moment came
        assert self._start("broken").wait() == 0, "the broken run did not come to its end"
        return self._run_folder("broken")

    def hits(self) -> collections.Counter:
        """How many kills fell into each phase."""
        return collections.Counter(phase for kill in self.kills for phase in kill.hit)

    def _missing(self, wanted: collections.Counter) -> str | None:
        hit = self.hits()
        return next((p for p in LEAST if hit[p] < min(LEAST[p], wanted[p])), None)

    def _kill(self, phase: str) -> bool:
        """Starts the run and kills it; returns whether it lived when the moment came."""
        longest, first, last = PHASES[phase]
        wait, nth = self._random.uniform(0, longest), self._random.randint(first, last)
        # To be caught compiling, a start must have something to compile.
        cache = None
        if phase == "compile":
            cache = self.folder / f"cache-{len(self.kills)}"
        child = self._start("broken", cache=cache)
        seen = self._wait_for(child, phase, nth)
        time.sleep(wait)
        alive = child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        if not alive or not seen:
            assert child.returncode in (0, -signal.SIGKILL), f"a start failed: {child.returncode}"
            return False
        phases = self._phases()
        writing = list(self._run_folder("broken").glob("checkpoints/*orbax-checkpoint-tmp*"))
        started = next((step for name, step in phases if name in ("compile", "train")), 0)
        # The phase "save" ends when the state is copied; the files say how long writing goes on.
        doing = "train" if phases[-1][0] == "save" else phases[-1][0]
        hit = {doing} | ({"save"} if writing else set())
        kill = Kill(phase, tuple(sorted(hit)), started, max(step for _, step in phases))
        self.kills.append(kill)
        print(f"kill {len(self.kills):>3}: {kill}", flush=True)
        return True

    def _start(self, root: str, cache: pathlib.Path | None = None) -> subprocess.Popen:
        phases = self.folder / "phases"
        phases.unlink(missing_ok=True)
        env = {**self._env, "SEQZOO_PHASE_FILE": str(phases)}
        if cache is not None:
            env["SEQZOO_CACHE"] = str(cache)
        command = [sys.executable, "-m", "seqzoo.cli.main", "train", *self.overrides]
        return subprocess.Popen(
            [*command, "--runs", str(self.folder / root)], env=env, stdout=subprocess.DEVNULL
        )

    def _phases(self) -> list[tuple[str, int]]:
        """What the child has said: (phase, step)."""
        file = self.folder / "phases"
        *lines, _ = (file.read_text() if file.exists() else "").split("\n")
        words = [line.split() for line in lines]
        return [(name, int(step)) for _, name, step, _ in words]

    def _wait_for(self, child: subprocess.Popen, phase: str, nth: int) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while [name for name, _ in self._phases()].count(phase) < nth:
            if child.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"no phase {phase} in {_PATIENCE} s"
            time.sleep(0.001)
        return True

    def _run_folder(self, root: str) -> pathlib.Path:
        found = [
            path.parent
            for path in (self.folder / root).glob("*/*/config.yaml")
            if not path.parent.is_symlink()
        ]
        assert len(found) == 1, f"the same command made {len(found)} folders"
        return found[0]


def differences(one: pathlib.Path, other: pathlib.Path, *, last_only: bool = False) -> list[str]:
    """Returns how two finished runs differ: metrics, and every array of their last checkpoints.

    With `last_only` those of the last step alone: a run that was asked to stop saved where it was,
    so that other steps before the last are kept.
    """
    import jax
    import numpy as np

    from seqzoo.train import checkpoint

    found = []
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    steps = [checkpoint.list_steps(path / "checkpoints") for path in (one, other)]
    if last_only:
        steps = [kept[-1:] for kept in steps]
    if steps[0] != steps[1]:
        return [*found, f"steps kept: {steps}"]
    for step in steps[0]:
        arrays = []
        for path in (one, other):
            place = path / "checkpoints" / str(step)
            stored = checkpoint.read_meta(place)["arrays"]
            wanted = {
                name: jax.ShapeDtypeStruct(tuple(a["shape"]), np.dtype(a["dtype"]))
                for name, a in stored.items()
            }
            restored = checkpoint.read_step(place, wanted).state
            arrays.append({name: np.asarray(a).tobytes() for name, a in restored.items()})
        if arrays[0].keys() != arrays[1].keys():
            found.append(f"step {step}: names of arrays")
        found += [f"step {step}: {n}" for n, a in arrays[0].items() if arrays[1].get(n) != a]
    return found


def plan_of(kills: int, seed: int) -> list[str]:
    """Phases to kill in: the least number of each, the rest while training, shuffled."""
    aimed = [phase for phase, least in LEAST.items() for _ in range(least)]
    plan = (aimed + ["train"] * kills)[:kills]
    random.Random(seed).shuffle(plan)
    if "save" in plan[3:]:  # a few kills come before the first checkpoint, most of them after it
        plan.insert(2, plan.pop(plan.index("save", 3)))
    return plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("overrides", nargs="*", default=list(OVERRIDES), metavar="key=value")
    args = parser.parse_args()
    print(f"--kills {args.kills} --seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        torture = Torture(pathlib.Path(name), args.seed, args.overrides)
        whole = torture.unbroken()
        broken = torture.broken(plan_of(args.kills, args.seed))
        found = differences(whole, broken)
    hit = torture.hits()
    resumed = sum(kill.resumed_from > 0 for kill in torture.kills)
    print(f"{len(torture.kills)} kills: {dict(hit)}; {resumed} starts went on from a step above 0")
    print(f"different: {', '.join(found)}" if found else "bitwise equal to the unbroken run")
    enough = args.kills < 20 or (
        resumed >= LEAST_RESUMED and all(hit[phase] >= n for phase, n in LEAST.items())
    )
    if not enough:
        print("too few kills of some kind: take another seed")
    return 1 if found or not enough else 0


if __name__ == "__main__":
    sys.exit(main())
