"""A run folder made from a foreign checkpoint: eval, generate and load take it like any other."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from omegaconf import OmegaConf

from seqzoo.config import schema
from seqzoo.config.compose import compose
from seqzoo.convert.checkpoint import Checkpoint, open_checkpoint, parameters, with_dtype
from seqzoo.data.source import Dataset
from seqzoo.errors import ConfigError, DataError
from seqzoo.train.checkpoint import Checkpointer
from seqzoo.train.folder import RunFolder
from seqzoo.train.setup import setup

# Where the imported model's own tokens would come from: nothing, until somebody says.
_NO_DATA = "TOKENS.npy"


def import_run(
    path: str,
    name: str,
    overrides: Sequence[str] = (),
    *,
    dtype: str = "float32",
    root: str | pathlib.Path = "runs",
    force: bool = False,
) -> pathlib.Path:
    """Writes a run folder with the model and the weights of a checkpoint folder.

    Args:
        path: a folder as Hugging Face transformers writes it.
        name: the folder above the run.
        overrides: data and task of the run, as ``["data=tokens", "data.path=pile.npy"]``.
        dtype: what layers compute in; parameters are float32.
        root: the folder of all runs.
        force: import again where it was imported before.

    Returns:
        The run folder.

    Raises:
        ConfigError: the checkpoint or an override is not what can be imported.
    """
    source = open_checkpoint(path)
    config = config_of(source, name, overrides, dtype)
    arrays = parameters(source)
    prepared = setup(config)
    fingerprint = _fingerprint(prepared.data)
    opened = RunFolder.open(config, overrides, root=root, force=force, data_fingerprint=fingerprint)
    with opened as folder:
        if folder.finished():
            raise ConfigError(f"{folder.path} was imported before; --force imports it again")
        _save(folder, config, arrays, fingerprint)
        shutil.copyfile(source.folder / "config.json", folder.path / "source_config.json")
        if (source.folder / "tokenizer.json").is_file():
            shutil.copyfile(source.folder / "tokenizer.json", folder.path / "tokenizer.json")
        folder.log(
            f"imported from {source.folder.name}, a checkpoint of {source.format.model_type}"
        )
        metric = {"name": prepared.task.metric, "value": None, "target": None}
        folder.write_status(state="finished", step=0, metric=metric)
        return folder.path


def config_of(
    source: Checkpoint, name: str, overrides: Sequence[str], dtype: str
) -> dict[str, Any]:
    """The configuration of the run: the checkpoint's model, and data and task as chosen.

    Raises:
        ConfigError: an override is wrong, or changes the model.
    """
    for word in overrides:
        if word.lstrip("+~").startswith("model"):
            raise ConfigError(f"{word}: the model is what config.json says; --dtype is the choice")
    node = with_dtype(source.node, dtype)
    words = [f"name={name}", *overrides]
    chosen = {word.partition("=")[0] for word in overrides}
    if "task" not in chosen:
        words = ["task=next_token", *words]
    if "data" not in chosen:
        path = [] if "data.path" in chosen else [f"data.path={_NO_DATA}"]
        words = ["data=tokens", f"data.vocab_size={node['vocab_size']}", *path, *words]
    composed = compose([*words, f"model.vocab_size={node['vocab_size']}"])
    config = OmegaConf.to_container(composed, resolve=True)
    return schema.check(config | {"model": node})


def _save(folder: RunFolder, config: dict[str, Any], arrays: dict, fingerprint: str | None) -> None:
    """Writes step 0: parameters alone, there being no optimizer yet."""
    checkpoints = Checkpointer(folder.checkpoints, metric_mode="min", asynchronous=False)
    params = unflatten_dict({path: jnp.asarray(array) for path, array in arrays.items()})
    meta = {
        "data": {"next_sample": 0, "fingerprint": fingerprint},
        "metric": {"name": config["task"].get("metric"), "mode": "min"},
        "config": config,
    }
    try:
        checkpoints.save(0, {"params": params, "rest": {}}, meta)
    finally:
        checkpoints.close()


def _fingerprint(data: Dataset) -> str | None:
    try:
        return data.fingerprint()
    except DataError:  # no data was named
        return None
