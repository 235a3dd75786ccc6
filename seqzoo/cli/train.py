"""`seqzoo train`: compose, check, train; the same command again goes on."""

import argparse
import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from seqzoo.cli.common import add_config_arguments, add_trust_argument, print_table
from seqzoo.cli.runs import row
from seqzoo.config.compose import compose, expand
from seqzoo.errors import ConfigError, NotFiniteError, SeqzooError
from seqzoo.train.folder import apply_threads, begun
from seqzoo.train.run_files import read_status

EPILOG = """examples:
  seqzoo train                                        the default experiment, to its target
  seqzoo train model=mamba_small optimizer.lr=3e-3 trainer.seed=1
  seqzoo train model.pattern='[mamba,mamba,attention]' model.n_layers=6 model.d_model=128
  seqzoo train experiment=text_mamba trainer.steps=2000
  seqzoo train data=text data.path=~/books task=next_token model=mamba_small
  seqzoo train -m optimizer.lr=1e-3,3e-3 trainer.seed=1,2,3        six runs, one after the other
  seqzoo train -m mixer=mamba,based model.d_model=64               one mixer each, in every layer
  seqzoo train -m launcher=submitit_slurm launcher.partition=gpu optimizer.lr=1e-3,3e-3
  seqzoo train init_from=runs/mqar/RUN@best optimizer.lr=1e-4 'reset=[optimizer]'
  seqzoo train --config-dir mylab/configs model.pattern='[diagonal]'

The run's folder is found by what the run is: the same command again goes on where it stopped.
Ctrl-C saves at the next step and ends; once more ends at once.
Exit codes: 0 done, 1 error, 2 bad configuration or data, 3 NaN or Inf, 75 stopped and saved.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of a,b,c values"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs lie (runs)")
    parser.add_argument("--force", action="store_true", help="begin anew; the old run moves aside")
    parser.add_argument(
        "--strict", action="store_true", help="refuse to go on if code or versions changed"
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    if not args.multirun:
        config = compose(args.overrides, config_dir=args.config_dir)
        return _train(config, args.overrides, args)

    launching = [word for word in args.overrides if _is_launcher(word)]
    rest = [word for word in args.overrides if word not in launching]
    # All are composed, and their values and models built, before the first one runs: a typo in the
    # last must not cost a night.
    jobs = [(compose(words, config_dir=args.config_dir), words) for words in expand(rest)]
    from seqzoo.train.setup import check_model  # imports jax, and does not start it
    from seqzoo.train.values import check_values

    for check in (check_values, check_model):
        for config, _ in jobs:
            check(config)
    if launching:
        from seqzoo.sweep.settings import split  # reads what Optuna needs

        launcher = split(launching, config_dir=args.config_dir).launcher
        if launcher.kind != "local":
            return _submit([words for _, words in jobs], launcher, args)
    worst = 0
    try:
        for number, (config, words) in enumerate(jobs, 1):
            print(f"run {number} of {len(jobs)}: {' '.join(words)}", flush=True)
            try:
                code = _train(config, words, args)
            except NotFiniteError as error:  # a diverged run is a result; the others go on
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
            except SeqzooError as error:
                if number < len(jobs):
                    print(f"stopped before run {number + 1} of {len(jobs)}", file=sys.stderr)
                raise error
            worst = max(worst, code)
    finally:
        _show_all(jobs, args.runs)
    return worst


def _show_all(jobs: Sequence[tuple[DictConfig, list[str]]], root: str) -> None:
    """What the runs reached, whatever ended them, and the words in which they differ."""
    from seqzoo.train import processes

    paths = [begun(config, words, root=root) for config, words in jobs]
    if len(jobs) == 1 or not any(paths) or not processes.first():
        return
    shared = set.intersection(*(set(words) for _, words in jobs))
    rows: list[dict[str, Any]] = []
    for path, (_, words) in zip(paths, jobs, strict=True):
        own = dict(word.partition("=")[::2] for word in words if word not in shared)
        if path is None:
            rows.append({"state": "waiting", **own})
            continue
        found, tested = row(path, path.parents[1]), read_status(path).get("test") or {}
        name = found["metric"]
        reached = {} if name is None else {name: found["value"], "test": tested.get(name)}
        place = {"run": os.path.relpath(path)}
        rows.append({"state": found["state"], "step": found["step"], **reached, **own, **place})
    print()
    print_table(rows)


def _is_launcher(word: str) -> bool:
    key = word.partition("=")[0]
    if key == "hydra/launcher":
        raise ConfigError(f"{word}: here it is {word.removeprefix('hydra/')}")
    return key.lstrip("+") == "launcher" or key.lstrip("+").startswith("launcher.")


def _submit(lines: list[list[str]], launcher, args: argparse.Namespace) -> int:
    """Submits each run as a job; the same command later submits what is not finished."""
    from seqzoo.cli import submit

    if launcher.kind not in submit.KINDS:
        raise ConfigError(
            f"launcher={launcher.kind} belongs to 'seqzoo sweep'; 'seqzoo train -m' knows local, "
            f"{', '.join(submit.KINDS)}"
        )
    root = pathlib.Path(args.runs).resolve()
    options = ["--runs", str(root)]
    if args.config_dir:
        options += ["--config-dir", str(pathlib.Path(args.config_dir).resolve())]
    options += [f"--{name}" for name in ("force", "strict") if getattr(args, name)]
    options += [word for package in args.trust for word in ("--trust", package)]
    jobs = submit.submit(
        [["train", *words, *options] for words in lines], launcher, root / "submitit" / "%j"
    )
    for job, words in zip(jobs, lines, strict=True):
        print(f"job {job.job_id}: {' '.join(words)}")
    print(
        f"\nwhat they print: {os.path.relpath(root / 'submitit')}\n  seqzoo runs --runs {args.runs}"
    )
    return 0


def _train(config: DictConfig, overrides: list[str], args: argparse.Namespace) -> int:
    if not args.force:
        apply_threads(config, overrides, root=args.runs)  # before jax starts
    from seqzoo.train import processes
    from seqzoo.train.loop import train

    result = train(
        config, overrides=overrides, root=args.runs, force=args.force, strict=args.strict
    )
    if not processes.first():
        return 0
    if result.status == "finished":
        _report(result.path, args.trust)
    print(f"\n{dataclasses.replace(result, next=_with_options(result.next, args))}")
    return 0


def _with_options(commands: Sequence[str], args: argparse.Namespace) -> tuple[str, ...]:
    """The commands to try next, with the options that this one was given."""
    trust = [word for package in args.trust for word in ("--trust", package)]
    train = [*trust]
    if args.runs != "runs":
        train += ["--runs", args.runs]
    if args.config_dir:
        train += ["--config-dir", args.config_dir]
    given = [train if command.startswith("seqzoo train") else trust for command in commands]
    return tuple(
        " ".join([command, *map(shlex.quote, words)])
        for command, words in zip(commands, given, strict=True)
    )


def _report(path: pathlib.Path, trust: list[str]) -> None:
    """Makes the plots without being asked; a report that fails does not undo a run."""
    from seqzoo.eval.report import write_report

    try:
        page = write_report(path, trust=trust)
    except Exception as error:
        print(f"warning: no report: {error}; try seqzoo report {path}", file=sys.stderr)
    else:
        print(f"report: {os.path.relpath(page)}")
