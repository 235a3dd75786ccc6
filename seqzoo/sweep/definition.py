"""What a study is: written into its folder and into its storage, and compared when it is named."""

import dataclasses
import hashlib
import json
import pathlib
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.errors import ConfigError, suggest
from seqzoo.sweep import storage
from seqzoo.sweep.settings import LauncherSettings, Settings, SweepSettings
from seqzoo.sweep.space import Space
from seqzoo.train.identity import experiment_name, plain
from seqzoo.train.run_files import read_json, write_json

FILE = "study.json"
# Settings that may change under a study: they say how much and where, not what.
_FREE = ("name", "n_trials", "max_failures", "storage", "patience_minutes")
_VECTORIZE = ("vectorize", "vectorize_by", "vectorize_most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """A study.

    Attributes:
        name: in its storage, and of its folder.
        hash: of what is searched and how; a study whose hash differs is another one.
        words: of every trial and of the space, as typed.
        space: what is searched, parameter to values, as typed.
        sweep: the settings.
        launcher: where its creator ran.
        config_dir: a user's own groups.
        storage: URL without password; None = the journal.
        metric: what trials are scored by.
        mode: max or min.
        eval_every: of its trials, for pruners.
        threads: CPU threads of every worker.
        created: when.
        place: of this folder; trials go on where their checkpoints are.
    """

    name: str
    hash: str
    words: list[str]
    space: dict[str, str]
    sweep: SweepSettings
    launcher: LauncherSettings
    config_dir: str | None
    storage: str | None
    metric: str
    mode: str
    eval_every: int
    threads: int
    created: str
    place: str

    def write(self, folder: pathlib.Path) -> None:
        """Writes study.json."""
        write_json(folder / FILE, dataclasses.asdict(self))

    def shared(self) -> dict[str, Any]:
        """What goes into the storage, for workers that do not see the folder."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "place"}

    @property
    def worst(self) -> float:
        """The value of a trial that diverged."""
        return float("-inf") if self.mode == "max" else float("inf")


def define(
    settings: Settings, space: Space, *, config_dir: str | None, url: str | None, threads: int
) -> Definition:
    """Makes the definition of a new study; composes what its trials may be.

    Raises:
        ConfigError: a word or a value is wrong.
    """
    hashes = space.check()
    config = compose(space.words(next(space.probes())), config_dir=config_dir)
    task = build(plain(config)["task"])
    fixed = {k: v for k, v in dataclasses.asdict(settings.sweep).items() if k not in _FREE}
    if settings.sweep.pruner == "none":
        fixed = {k: v for k, v in fixed.items() if not k.startswith("pruner_")}
    if not settings.sweep.vectorize:
        fixed = {k: v for k, v in fixed.items() if k not in _VECTORIZE}
    _check_searched(settings.sweep, space)
    text = json.dumps([space.description, fixed, hashes], sort_keys=True)
    hashed = hashlib.sha256(text.encode()).hexdigest()[:10]
    experiment = experiment_name(config, settings.words)
    return Definition(
        name=settings.sweep.name or f"{experiment}-{hashed[:6]}",
        hash=hashed,
        words=list(space.texts),
        space=space.shown,
        sweep=settings.sweep,
        launcher=settings.launcher,
        config_dir=None if config_dir is None else str(pathlib.Path(config_dir).resolve()),
        storage=None if url is None else storage.shown(url),
        metric=task.metric,
        mode=task.mode,
        eval_every=config["trainer"]["eval_every"],
        threads=threads,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        place=uuid.uuid4().hex[:12],
    )


def _check_searched(sweep: SweepSettings, space: Space) -> None:
    """Refuses to vectorise what no word searches."""
    searched = {one.word.setting for one in space.parameters}
    if sweep.seeds > 1:
        searched.add("trainer.seed")
    for key in sweep.vectorize:
        if key not in searched:
            example = "0,1,2 (or sweep.seeds=3)" if key == "trainer.seed" else "A,B"
            raise ConfigError(
                f"sweep.vectorize holds {key}, which is not searched"
                f"{suggest(key, searched)}; searched are {', '.join(sorted(searched)) or 'none'}. "
                f"Give it values, as in {key}={example}, or take it out of the list"
            )


def read(folder: pathlib.Path) -> Definition:
    """Reads study.json.

    Raises:
        ConfigError: the folder is no study.
    """
    found = read_json(folder / FILE) if folder.is_dir() else {}
    if not found:
        raise ConfigError(
            f"{folder} is no study: it has no {FILE}; 'seqzoo sweep' makes one under runs/sweeps/"
        )
    return from_plain(found)


def from_plain(found: Mapping[str, Any], **more: Any) -> Definition:
    """A definition as it was written."""
    sections = {
        "sweep": SweepSettings(**found["sweep"]),
        "launcher": LauncherSettings(**found["launcher"]),
    }
    return Definition(**{**found, **sections, **more})


def check_same(old: Definition, new: Definition) -> None:
    """Refuses to call another search by the name of this one.

    Raises:
        ConfigError: says what changed.
    """
    if old.hash == new.hash:
        return
    changed = [
        f"{name} was {old.space.get(name, 'not searched')}, is {new.space.get(name, 'not')}"
        for name in sorted(old.space.keys() | new.space.keys())
        if old.space.get(name) != new.space.get(name)
    ]
    before, now = dataclasses.asdict(old.sweep), dataclasses.asdict(new.sweep)
    changed += [
        f"sweep.{name} was {before[name]}, is {now[name]}"
        for name in before
        if name not in _FREE and before[name] != now[name]
    ]
    gone, come = set(old.words) - set(new.words), set(new.words) - set(old.words)
    if not changed and (gone or come):
        changed = [
            f"the settings of its trials: was {' '.join(sorted(gone)) or 'nothing more'}, is "
            f"{' '.join(sorted(come)) or 'nothing more'}"
        ]
    if not changed:
        changed = [f"config files or defaults behind the same words changed since {old.created}"]
        if old.config_dir != new.config_dir:
            changed += [
                f"--config-dir was {old.config_dir or 'not given'}, is "
                f"{new.config_dir or 'not given'}"
            ]
    raise ConfigError(
        f"the study '{old.name}' searches something else: {'; '.join(changed)}. Take back what "
        "changed, or give the new search a name of its own: sweep.name=NAME"
    )
