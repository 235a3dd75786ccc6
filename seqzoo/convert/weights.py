"""Reads a folder as Hugging Face writes it: config.json and safetensors, never a pickle."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from seqzoo.errors import ConfigError, DataError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_folder(path: str) -> pathlib.Path:
    """Returns the folder of a checkpoint.

    Raises:
        ConfigError: there is none, or what is there is a pickle.
    """
    found = pathlib.Path(path).expanduser()
    if found.suffix in _PICKLES and not found.is_dir():
        raise _refused(found)
    if found.is_file():
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and {SINGLE}")
    if not found.is_dir():
        raise ConfigError(f"{path}: there is no such folder; nothing is downloaded here")
    return found


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns config.json.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} holds no config.json: it is no checkpoint of transformers")
    return _json(file)


class Weights(Mapping[str, np.ndarray]):
    """The arrays of a folder by name, each read from its file when it is asked for.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files it names.

    Raises:
        ConfigError: there are only pickles, or nothing.
        DataError: a file is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self._where = {name: folder / file for name, file in _files(folder).items()}
        self._open: dict[pathlib.Path, Any] = {}
        for file in dict.fromkeys(self._where.values()):
            with _readable(file):
                self._open[file] = safetensors.safe_open(str(file), framework="np")
        for name, file in self._where.items():
            if name not in self._open[file].keys():  # noqa: SIM118 (no mapping)
                raise DataError(f"{file} lacks '{name}', which {INDEX} says is there")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._where[name]
        with _readable(file):
            return self._open[file].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _files(folder: pathlib.Path) -> dict[str, str]:
    """Name of each array -> name of the file that holds it."""
    if (folder / INDEX).is_file():
        table = _json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise DataError(f"{folder / INDEX} holds no weight_map of names to files")
        for file in sorted(set(table.values())):
            if pathlib.PurePath(file).name != file:
                raise DataError(f"{folder / INDEX} names {file!r}, which is no file of its folder")
            if not (folder / file).is_file():
                raise DataError(f"{folder} lacks {file}, which {INDEX} names; fetch it as well")
        return table
    if (folder / SINGLE).is_file():
        with _readable(folder / SINGLE), safetensors.safe_open(folder / SINGLE, "np") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    for pickle in sorted(p for p in folder.iterdir() if p.suffix in _PICKLES):
        raise _refused(pickle)
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _refused(pickle: pathlib.Path) -> ConfigError:
    return ConfigError(
        f"{pickle} is a pickle: reading one runs whatever code it holds, so seqzoo reads none. "
        f"Take the {SINGLE} of the same model, or have transformers write one where you trust the "
        "file: MambaForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object")
    return content


@contextlib.contextmanager
def _readable(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
