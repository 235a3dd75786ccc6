"""`seqzoo sweep`: many runs, searched for, that survive whatever happens to them."""

import argparse
import os
import pathlib
import sys

from seqzoo.cli.common import add_config_arguments, print_json, print_table
from seqzoo.errors import ConfigError

EPILOG = """examples:
  seqzoo sweep mixer=mamba,based 'optimizer.lr=tag(log,interval(1e-4,1e-2))' sweep.n_trials=24
  seqzoo sweep sweep=grid optimizer.lr=1e-3,3e-3,1e-2 sweep.seeds=5 sweep.name=rates
  seqzoo sweep sweep=grid optimizer.lr=1e-3,3e-3,1e-2 sweep.seeds=5 \\
    'sweep.vectorize=[optimizer.lr,trainer.seed]'                 15 runs as one program
  seqzoo sweep mixer=mamba,based 'model.mixers.mamba.d_state=8,16' sweep.pruner=halving
  seqzoo sweep optimizer=adamw,lion 'optimizer.b1=0.8,0.95 if optimizer=adamw'
  seqzoo sweep ... launcher=slurm launcher.nodes=2 --dry-run      the script, submitted without it
  seqzoo sweep ... sweep.storage=postgresql://me@host/studies     workers on many machines

  seqzoo sweep status STUDY      its trials; exit 0 done, 1 failures, 75 not done
  seqzoo sweep stop STUDY        workers everywhere save and leave
  seqzoo sweep resume STUDY      go on here; failed trials as well
  seqzoo sweep --worker STUDY    one more worker, in this terminal, on this machine
  seqzoo report STUDY            tables and plots

STUDY is a folder, runs/sweeps/NAME, or its NAME. The same command again goes on: n_trials is a
total. Exit codes: 0 done, 1 too many failures or no storage, 2 bad words, 75 stopped and saved.
"""

_VERBS = ("status", "stop", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs lie (runs)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--worker", metavar="STUDY", help="join a study with one worker")
    parser.add_argument(
        "--workers", metavar="STUDY", help="join a study with a worker per device of this machine"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="where STUDY lies, if its folder is not here"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of status")


def run(args: argparse.Namespace) -> int:
    words = args.overrides
    if args.worker or args.workers:
        return _join(args)
    if words and words[0] in _VERBS:
        if len(words) != 2:
            raise ConfigError(f"seqzoo sweep {words[0]} STUDY: one study, as in runs/sweeps/NAME")
        return {"status": _status, "stop": _stop, "resume": _resume}[words[0]](args, words[1])
    return _create(args)


def _create(args: argparse.Namespace) -> int:
    from seqzoo.sweep import devices, slurm
    from seqzoo.sweep.settings import split
    from seqzoo.sweep.study import Study

    settings = split(args.overrides, config_dir=args.config_dir)
    if settings.launcher.kind.startswith("submitit"):
        raise ConfigError(
            f"launcher={settings.launcher.kind} submits the runs of 'seqzoo train -m'; for a sweep "
            "take launcher=slurm"
        )
    if args.dry_run:
        return _show(settings, args)
    study = Study.create(
        settings,
        root=args.runs,
        config_dir=args.config_dir,
        threads=devices.threads(settings.launcher),
    )
    print(f"study {os.path.relpath(study.path)}", flush=True)
    study.resume()
    if settings.launcher.kind == "slurm" and not study.finished():
        print(f"submitted as job {slurm.submit(study, settings.launcher)}: {study.path}/sbatch.sh")
        return 0
    return _work(study, settings.launcher)


def _show(settings, args: argparse.Namespace) -> int:
    """What the command would do: the script of SLURM, or the trials."""
    from seqzoo.sweep import definition, sampler, slurm
    from seqzoo.sweep.places import FOLDER
    from seqzoo.sweep.space import Space

    space = Space(settings.words, config_dir=args.config_dir)
    points = sampler.points(space, settings.sweep)
    told = definition.define(settings, space, config_dir=args.config_dir, url=None, threads=1)
    path = pathlib.Path(args.runs).resolve() / FOLDER / told.name
    if settings.launcher.kind == "slurm":
        print(slurm.script(told.name, path, settings.launcher), end="")
        return 0
    print(f"study {path}")
    seeds = _number(settings.sweep.seeds, "seed")
    print(f"{_number(len(points), 'trial')}, {seeds} each, {settings.sweep.sampler}")
    words = [one.word for one in space.parameters] + [word for word in space.fixed if word.when]
    for word in words:
        print(f"  {word.text}")
    if settings.sweep.vectorize:
        from seqzoo.sweep.groups import parts

        counts = [len(one) * settings.sweep.seeds for one in parts(space, settings.sweep, points)]
        runs = ", ".join(map(str, counts[:20]))
        print(f"trained in {_number(len(counts), 'group')} of {runs} runs")
    if not any(points):
        print("   each by TPE, when it is its turn")
        return 0
    for number, point in enumerate(points[:20]):
        print(f"{number:>4}  {' '.join(space.own_words(point))}")
    if len(points) > 20:
        print("  ...")
    return 0


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _work(study, launcher) -> int:
    """Runs the workers of this machine under a table, and says what came of it."""
    from seqzoo.sweep.pool import Pool
    from seqzoo.sweep.table import LiveTable

    if study.finished():
        return _told(study)
    with LiveTable(study) as table:
        study.patience.say = table.say
        code = Pool(study, launcher, say=table.say, watch=table.draw).run()
    return _told(study, code)


def _told(study, code: int | None = None) -> int:
    from seqzoo.sweep import table

    rows = study.rows()
    print(table.line(study, rows))
    failed = table.failures(rows)
    if failed:
        print_table(failed)
        print(f"'seqzoo sweep resume {os.path.relpath(study.path)}' tries them again")
    if code is None:
        code = _code(study, rows)
    why = study.stopped()
    if code == 75:
        print(f"stopped{f' ({why})' if why else ''}; the same command goes on", file=sys.stderr)
    else:
        print(f"next:\n  seqzoo report {os.path.relpath(study.path)}")
    return code


def _code(study, rows) -> int:
    if study.too_many_failures():
        return 1
    return 0 if all(row.done or row.state == "failed" for row in rows) else 75


def _status(args: argparse.Namespace, name: str) -> int:
    from seqzoo.sweep import table

    study = _open(args, name)
    rows = study.rows()
    if args.format == "json":
        print_json(
            {
                "study": study.definition.name,
                "metric": study.definition.metric,
                "stopped": study.stopped() or None,
                "states": table.counts(rows),
                "trials": table.as_dicts(study, rows),
            }
        )
    else:
        print_table(table.as_dicts(study, rows))
        print(table.line(study, rows))
        if why := study.stopped():
            print(f"stopped: {why}")
    return _code(study, rows)


def _stop(args: argparse.Namespace, name: str) -> int:
    study = _open(args, name)
    study.stop("'seqzoo sweep stop'")
    print("its workers save and leave; 'seqzoo sweep resume' goes on")
    return 0


def _resume(args: argparse.Namespace, name: str) -> int:
    from seqzoo.sweep import slurm

    study = _open(args, name)
    study.resume()
    launcher = study.definition.launcher
    if launcher.kind == "slurm" and not study.finished():
        print(f"submitted as job {slurm.submit(study, launcher)}: {study.path}/sbatch.sh")
        return 0
    return _work(study, launcher)


def _join(args: argparse.Namespace) -> int:
    import dataclasses

    from seqzoo.sweep import worker
    from seqzoo.sweep.settings import split

    name = args.worker or args.workers
    strange = [word for word in args.overrides if not word.startswith("launcher.workers=")]
    if strange or (args.worker and args.overrides):
        raise ConfigError(
            f"'{(strange or args.overrides)[0]}': a worker takes everything from its study; with "
            "--workers only launcher.workers=N may be said"
        )
    study = _open(args, name)
    if args.worker:
        worker.prepare(study.definition.threads)
        return worker.work(study.path, size=_size)
    asked = split(args.overrides).launcher
    launcher = dataclasses.replace(study.definition.launcher, kind="local", workers=asked.workers)
    return _work(study, launcher)


def _size(path: pathlib.Path) -> dict[str, float] | None:
    """What the model of a run costs; None where that cannot be had."""
    from seqzoo.eval import records, report

    if not (path / "config.yaml").exists():  # it ended before it began
        return None
    size, _ = report.size_of(records.read(path))
    return None if size is None else size._asdict()


def _open(args: argparse.Namespace, name: str):
    from seqzoo.sweep.places import absolute, find
    from seqzoo.sweep.study import Study

    if args.storage:
        return Study.join(name, absolute(args.storage), root=args.runs)
    return Study.open(find(name, args.runs))
