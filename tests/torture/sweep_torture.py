"""SIGKILLs of a sweep's workers and pool, and a restart of its database, at moments from a seed.

    make torture
    python tests/torture/sweep_torture.py --kills 10 --seed 7 [--sampler random] [--journal]

Grid and random points wait in the study from its creation: a broken sweep must end with the trials
and metrics of an unbroken one, bit by bit. TPE and pruners depend on what ended when: there no
trial may be lost or doubled, and each that came to its end must equal the same command run alone.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import postgres
from torture import differences

from seqzoo.errors import NotFiniteError
from seqzoo.sweep.study import Study

TRIALS, WORKERS = 24, 3
# Small enough to end in a few seconds, long enough to be killed in; many saves.
OVERRIDES = (
    "task=masked_answers", "data=mqar", "model=mamba_attention", "model.d_model=16",
    "data.vocab_size=32", "data.seq_len=16", "data.num_kv_pairs=2", "data.valid_samples=256",
    "data.test_samples=256", "model.dropout=0.1", "trainer.steps=240", "mesh.data=1",
    "trainer.global_batch_size=16", "trainer.save_every=40", "trainer.eval_every=60",
    "trainer.log_every=7", "logger.progress=none", "logger.tensorboard=false",
)  # fmt: skip
LOG = "optimizer.lr=tag(log,interval(1e-4,3e-2))"
SPACES = {
    "grid": ("optimizer.lr=1e-3,3e-3,1e-2,3e-2", "optimizer.weight_decay=0,0.1"),
    "random": (LOG, "optimizer.weight_decay=0,0.1", "data.seed=range(0,3)"),
    "tpe": (LOG, "optimizer.weight_decay=0,0.1", "data.seed=range(0,3)"),
    # A grid whose runs are trained by fours, in one program.
    "groups": ("optimizer.lr=1e-3,3e-3,1e-2,3e-2", "optimizer.weight_decay=0,0.1",
               "sweep.vectorize=[optimizer.lr,data.seed]", "sweep.vectorize_most=4"),
}  # fmt: skip
# A kill waits until its victim says that it does one of these, and a random moment longer.
PHASES = {"compile": 2.0, "train": 1.5, "save": 0.05, "eval": 0.05}
_POOL = 0.2  # so many of the kills hit the pool
_DOWN = 12.0  # seconds without a database
_RARE = 20.0  # seconds after which a kill takes whatever phase comes
_PATIENCE = 1800.0


@dataclasses.dataclass
class Attack:
    """What is done to a sweep, and what was done."""

    kills: int
    seed: int
    restart: postgres.Postgres | None = None
    done: list[str] = dataclasses.field(default_factory=list)


class Sweep:
    """One study, begun again by the same command as often as it takes.

    Args:
        root: the folder of runs.
        words: of the sweep.
        cache: of executables.
    """

    def __init__(self, root: pathlib.Path, words: list[str], cache: pathlib.Path):
        self.root, self.words = root, words
        self._env = {**os.environ, "JAX_PLATFORMS": "cpu", "SEQZOO_CACHE": str(cache)}
        self._phases = root.with_suffix(".phases")
        self._phases.touch()
        self._env["SEQZOO_PHASE_FILE"] = str(self._phases)
        self._pool: subprocess.Popen | None = None

    @property
    def study(self) -> Study:
        (path,) = (self.root / "sweeps").iterdir()
        return Study.open(path)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "seqzoo.cli.main", "sweep", *self.words]
        with open(self.root.with_suffix(".log"), "ab") as log:
            self._pool = subprocess.Popen(
                [*command, "--runs", str(self.root)], env=self._env, stdout=log, stderr=log
            )
        return self._pool

    def unbroken(self) -> Study:
        code = self.start().wait()
        assert code == 0, f"the unbroken sweep ended with {code}: see {self.root}.log"
        return self.study

    def broken(self, attack: Attack) -> Study:
        """Runs under attack, to its end."""
        moments = random.Random(attack.seed)
        end = time.monotonic() + _PATIENCE
        self.start()
        # The database goes away in the middle of the kills.
        restart_at = attack.kills // 2 if attack.restart else None
        for number in range(attack.kills):
            if number == restart_at:
                self._restart(attack)
            if not self._kill(attack, moments):
                attack.done.append(f"{number} kills: the sweep came to its end before")
                break
        while True:
            assert self._pool is not None and time.monotonic() < end, "it does not come to its end"
            code = self._pool.wait()
            if code == 0:
                return self.study
            attack.done.append(f"the pool ended with {code}")
            assert code in (75, -signal.SIGKILL), f"exit {code}: see {self.root}.log"
            self.start()

    def _kill(self, attack: Attack, moments: random.Random) -> bool:
        """Kills a worker, or now and then the pool, which the same command starts again."""
        assert self._pool is not None
        phase = moments.choice(list(PHASES))
        wait, hits_pool = moments.uniform(0, PHASES[phase]), moments.random() < _POOL
        victim = self._wait_for(phase)
        if victim is None:
            return False
        time.sleep(wait)
        if hits_pool:
            self._pool.kill()
            self._pool.wait()
            self.start()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        attack.done.append(f"{'pool' if hits_pool else 'worker'} in {phase}")
        print(f"  killed {attack.done[-1]}", flush=True)
        return True

    def _wait_for(self, phase: str) -> int | None:
        """A worker that begins a phase now; None = the sweep is over."""
        assert self._pool is not None
        said = self._phases.stat().st_size
        began = time.monotonic()
        while time.monotonic() - began < _PATIENCE:
            if self._pool.poll() is not None:
                return None
            rare = time.monotonic() - began > _RARE  # workers that live long compile no more
            with open(self._phases, encoding="utf-8") as file:
                file.seek(said)
                *lines, _ = file.read().split("\n")
            for line in lines:
                pid, name, *_ = line.split()
                if (name == phase or rare) and int(pid) in children(self._pool.pid):
                    return int(pid)
            time.sleep(0.005)
        raise AssertionError(f"no worker came to {phase}: see {self.root}.log")

    def _restart(self, attack: Attack) -> None:
        assert attack.restart is not None
        attack.restart.stop()
        print(f"  the database is away for {_DOWN:.0f} s", flush=True)
        time.sleep(_DOWN)
        attack.restart.start()
        attack.done.append("database")


def children(pid: int) -> list[int]:
    """The processes that this one started and that live."""
    try:
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def check_whole(study: Study, trials: int) -> list[str]:
    """What was lost or doubled."""
    found = []
    rows = study.rows()
    if [row.attrs["point"] for row in rows] != list(range(trials)):
        found.append(f"trials: {[row.number for row in rows]}")
    found += [f"trial {row.number} is {row.state}" for row in rows if not row.done]
    runs = [name for row in rows for name in row.attrs.get("runs", [])]
    doubled = [name for name, count in collections.Counter(runs).items() if count > 1]
    # Equal points of a finite space share their run; here none is equal.
    found += [f"two trials have the run {name}" for name in doubled]
    there = {
        str(file.parent.relative_to(study.path))
        for file in study.path.glob("*/*/status.json")
        if not file.parent.is_symlink()
    }
    found += [f"a run of no trial: {name}" for name in sorted(there - set(runs))]
    return found


def compare(one: Study, other: Study) -> list[str]:
    """How two studies of equal points differ: values, metrics.jsonl, every array."""
    found = []
    for left, right in zip(one.rows(), other.rows(), strict=True):
        if (left.point, left.value) != (right.point, right.value):
            found.append(f"trial {left.number}: {left.point} {left.value} and {right.value}")
        for a, b in zip(left.attrs["runs"], right.attrs["runs"], strict=True):
            different = differences(one.path / a, other.path / b, last_only=True)
            found += [f"trial {left.number}: {text}" for text in different]
    return found


def compare_alone(study: Study, root: pathlib.Path) -> list[str]:
    """How finished trials differ from the same commands run alone, in this process."""
    from seqzoo.config.compose import compose
    from seqzoo.train import loop

    found = []
    for row in study.rows():
        if row.state != "finished":
            continue
        words = study.space.words(row.point)
        try:
            alone = loop.train(compose(words), overrides=words, root=root)
        except NotFiniteError:
            found.append(f"trial {row.number}: alone it diverges")
            continue
        if alone.value != row.value:
            found.append(f"trial {row.number}: {row.value}, alone {alone.value}")
        inside = study.path / row.attrs["runs"][0]
        different = differences(inside, alone.path, last_only=True)
        found += [f"trial {row.number}: {text}" for text in different]
    return found


def torture(
    folder: pathlib.Path,
    sampler: str,
    *,
    kills: int,
    seed: int,
    server: postgres.Postgres | None,
    trials: int = TRIALS,
    overrides: tuple[str, ...] = OVERRIDES,
) -> list[str]:
    """Runs one broken sweep and what it is held against; returns what is wrong."""
    drawn = "grid" if sampler == "groups" else sampler
    words = [*overrides, *SPACES[sampler], f"sweep.sampler={drawn}", f"sweep.name={sampler}"]
    if drawn == "grid":
        words += [f"data.seed=range(0,{trials // 8})"]  # as many points as there are trials
    else:
        words += [f"sweep.n_trials={trials}"]
    words += [f"launcher.workers={WORKERS}", "launcher.threads=1", "sweep.patience_minutes=2"]
    if sampler == "tpe":
        words += ["sweep.pruner=median", "sweep.pruner_min_step=120"]
    place = [f"sweep.storage={server.url}"] if server else []
    attack = Attack(kills, seed, server)
    print(f"{sampler}: broken", flush=True)
    broken = Sweep(folder / f"{sampler}-broken", [*words, *place], folder / "cache").broken(attack)
    found = check_whole(broken, trials)
    starts = sum(row.attrs.get("starts", 0) for row in broken.rows())
    print(f"{sampler}: {'; '.join(attack.done)}")
    states = collections.Counter(row.state for row in broken.rows())
    print(f"{sampler}: {dict(states)}, {starts} starts of {trials} trials", flush=True)
    if sampler == "tpe":
        return found + compare_alone(broken, folder / "alone")
    print(f"{sampler}: unbroken", flush=True)
    whole = Sweep(folder / f"{sampler}-unbroken", words, folder / "cache").unbroken()
    return found + check_whole(whole, trials) + compare(broken, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sampler", choices=SPACES, action="append")
    parser.add_argument("--journal", action="store_true", help="no database, so no restart of it")
    parser.add_argument("--keep", metavar="DIR", help="write there and leave it")
    args = parser.parse_args()
    # Here as well the thread count of the workers, before jax starts.
    os.environ["NPROC"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"--kills {args.kills} --trials {args.trials} --seed {args.seed}", flush=True)
    why = None if args.journal else postgres.missing()
    if why:
        print(f"{why}; or --journal, which leaves the restart of the database out")
        return 2
    wrong = []
    with contextlib.ExitStack() as stack:
        server = None if args.journal else stack.enter_context(postgres.Postgres())
        name = args.keep or stack.enter_context(tempfile.TemporaryDirectory())
        folder = pathlib.Path(name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SEQZOO_CACHE"] = str(folder / "cache")
        for sampler in args.sampler or SPACES:
            wrong += torture(
                folder,
                sampler,
                kills=args.kills,
                seed=args.seed,
                server=server,
                trials=args.trials,
            )
    print("\n".join(wrong) if wrong else "nothing lost, nothing doubled, bitwise equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
