"""Where studies lie: folders below that of runs, and addresses of storages."""

import os
import pathlib

from seqzoo.errors import ConfigError
from seqzoo.sweep import definition as definitions
from seqzoo.sweep import storage
from seqzoo.sweep.definition import Definition

FOLDER = "sweeps"  # below the folder of runs


def find(name: str, root: str | os.PathLike = "runs") -> pathlib.Path:
    """The folder of a study: a path, or its name below `root`.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    below = pathlib.Path(root) / FOLDER
    for path in (pathlib.Path(name), below / name):
        if (path / definitions.FILE).is_file():
            return path.resolve()
    there = sorted(file.parent.name for file in below.glob(f"*/{definitions.FILE}"))
    raise ConfigError(
        f"there is no study {name}; below {below} there are {', '.join(there) or 'none'}"
    )


def absolute(url: str | None) -> str | None:
    """A file of SQLite is the same one for every worker, wherever it was started."""
    if url is None:
        return None
    storage.check_url(url)
    head, slashes, name = url.partition(":///")
    if head.startswith("sqlite") and slashes and name and not name.startswith(("/", ":")):
        return f"{head}:///{pathlib.Path(name).resolve()}"
    return url


def with_password(definition: Definition, url: str | None) -> str | None:
    """The address of a study's storage: with its password, where the environment has it."""
    if url is not None or definition.storage is None:
        return url
    told = absolute(os.environ.get(storage.VARIABLE))
    return told if told and storage.shown(told) == definition.storage else definition.storage
