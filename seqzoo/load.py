"""`run = seqzoo.load("runs/mqar/latest")`: a trained model from its run folder.

Everything comes from the folder: config.yaml, read as data from outside, and a checkpoint. The
module can be called: it would otherwise stand in the place of the function of that name.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.schema import without_unknown_settings
from seqzoo.config.trust import load_untrusted
from seqzoo.data.source import Dataset
from seqzoo.errors import CheckpointError, ConfigError
from seqzoo.tasks.task import Task
from seqzoo.train import checkpoint
from seqzoo.train.run_files import read_metrics
from seqzoo.train.setup import Setup, setup
from seqzoo.train.state import Structure, merge, structure_of


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, read.

    Attributes:
        path: its folder.
        step: the step that was read.
        config: the resolved configuration, plain; settings of training that this version of seqzoo
            does not know are left out.
        structure: the model without its arrays.
        params: its parameters (their moving average where the run kept one).
        rest: whatever else it holds.
    """

    path: pathlib.Path
    step: int
    config: Mapping[str, Any]
    structure: Structure
    params: Any
    rest: Any

    @functools.cached_property
    def model(self) -> Any:
        """The model: `run.model(tokens)` gives logits."""
        return merge(self.structure.graphdef, self.params, self.rest)

    @functools.cached_property
    def setup(self) -> Setup:
        """Task, data and all else, on the device that holds the parameters; for `evaluate`."""
        # Where the run was trained does not matter here.
        return setup(dict(self.config) | {"mesh": {}}, devices=jax.local_devices()[:1])

    @property
    def task(self) -> Task:
        """What was asked of the model."""
        return self.setup.task

    @property
    def data(self) -> Dataset:
        """Where its rows come from."""
        return self.setup.data

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.path)


def load(path: str | os.PathLike, step: int | str = "best", trust: str | Iterable[str] = ()) -> Run:
    """Reads a run folder; works wherever the run was trained, and changes nothing in it.

    Args:
        path: the run folder.
        step: "best" (the newest where no step was evaluated), "last", or a number.
        trust: packages beside ours whose classes config.yaml may name.

    Raises:
        ConfigError: the folder is none, or its configuration names what is not trusted.
        CheckpointError: there is no such step, or it is damaged.
    """
    folder = pathlib.Path(path).resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{path} is no run folder: it has no config.yaml")
    config = without_unknown_settings(load_untrusted(folder / "config.yaml", trust))
    structure = structure_of(functools.partial(build, config["model"]))
    arrays = {
        "params": nnx.to_pure_dict(structure.params),
        "rest": nnx.to_pure_dict(structure.rest),
    }
    place = checkpoint.find_step(folder / "checkpoints", step)
    try:
        stored = checkpoint.read_meta(place)["arrays"]
        if any(name.startswith("ema/") for name in stored):
            arrays["ema"] = arrays.pop("params")
        restored = checkpoint.read_step(place, arrays, partial=True)
    except checkpoint.Damaged as error:
        others = [n for n in checkpoint.list_steps(place.parent) if n != int(place.name)]
        raise CheckpointError(
            f"{place} is damaged: {error}. Other steps there: {others or 'none'}"
        ) from error
    state = restored.state
    weights = state["ema"] if "ema" in state else state["params"]
    return Run(folder, restored.step, config, structure, weights, state["rest"])


class _Callable(types.ModuleType):
    __call__ = staticmethod(load)


sys.modules[__name__].__class__ = _Callable
