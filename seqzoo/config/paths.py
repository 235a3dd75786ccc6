"""Where configuration files lie: ours, and a user's own folders beside them."""

import pathlib
from collections.abc import Iterable

from seqzoo.errors import ConfigError

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def shipped() -> pathlib.Path:
    """Returns the folder of our own configs: in the wheel, or beside the package in a checkout."""
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no configs beside {_PACKAGE}: this installation of seqzoo is incomplete")


def folders(config_dir: str | None = None) -> list[pathlib.Path]:
    """Returns the folders to search: ours, then the user's.

    Raises:
        ConfigError: the user's folder does not exist, or a file in it has the name of one of ours
            (it would be silently passed over).
    """
    ours = shipped()
    if config_dir is None:
        return [ours]
    theirs = pathlib.Path(config_dir).resolve()
    if not theirs.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
    for file in sorted(theirs.rglob("*.yaml")):
        if (ours / file.relative_to(theirs)).exists():
            raise ConfigError(
                f"{file} has the name of one of seqzoo's own files; give it another name"
            )
    return [ours, theirs]


def options(group: str, where: Iterable[pathlib.Path]) -> list[str]:
    """Returns what may be chosen in a group: ``options("model", ...)`` lists models."""
    found = {file.stem for folder in where for file in (folder / group).glob("*.yaml")}
    return sorted(found)


def is_group(name: str, where: Iterable[pathlib.Path]) -> bool:
    """Tells whether `name` is a group of files, such as model or mixer."""
    return any((folder / name).is_dir() for folder in where)
