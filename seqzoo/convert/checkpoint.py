"""A Hugging Face checkpoint folder as a model of ours: its node, and the parameters for it."""

import pathlib
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqzoo.config.build import build
from seqzoo.convert import hf_llama, hf_mamba
from seqzoo.convert.mapping import Format, Path, to_ours
from seqzoo.convert.weights import Weights, find_folder, read_config
from seqzoo.errors import ConfigError, suggest

FORMATS: dict[str, Format] = {one.model_type: one for one in (hf_mamba.FORMAT, hf_llama.FORMAT)}


class Checkpoint(NamedTuple):
    """What a folder holds.

    Attributes:
        folder: where it lies.
        format: how its names map to ours.
        node: the `model` node that config.json describes.
        weights: its arrays, each read when asked for; without a head that is tied, and without
            tables that follow from config.json.
    """

    folder: pathlib.Path
    format: Format
    node: dict[str, Any]
    weights: Mapping[str, np.ndarray]


def open_checkpoint(path: str) -> Checkpoint:
    """Reads config.json and opens the weights.

    Raises:
        ConfigError: it is of a kind that is not known here, a pickle, or contradicts itself.
        DataError: a file is missing or damaged.
    """
    folder = find_folder(path)
    values = read_config(folder)
    kind = values.get("model_type")
    if kind not in FORMATS:
        known = ", ".join(FORMATS)
        what = "has no model_type" if kind is None else f"has model_type={kind!r}"
        hint = suggest(str(kind), FORMATS)
        if kind is None and "ssm_cfg" in values:
            hint = "; it is of the mamba_ssm package: take the same model's '-hf' checkpoint"
        raise ConfigError(f"{folder / 'config.json'} {what}; known are {known}{hint}")
    form = FORMATS[kind]
    weights = Weights(folder)
    tied = values.get("tie_word_embeddings")
    if tied is None:  # transformers leaves the key out where it has the library's default
        tied = form.head not in weights
    if tied and form.head in weights:
        if not np.array_equal(weights[form.head], weights[form.embedding]):
            raise ConfigError(
                f"{folder / 'config.json'} says tie_word_embeddings, but '{form.head}' differs "
                f"from '{form.embedding}'; set it to false if both were trained"
            )
        weights = _Without(weights, {form.head})
    if form.computed and (computed := {n for n in weights if n.endswith(form.computed)}):
        weights = _Without(weights, computed)
    return Checkpoint(folder, form, form.node({**values, "tie_word_embeddings": tied}), weights)


def parameters(checkpoint: Checkpoint, *, dtype: str = "float32") -> dict[Path, np.ndarray]:
    """Returns the parameters of our model by path, as numpy arrays.

    Raises:
        ConfigError: an array is missing, left over, or of another shape.
    """
    shell = nnx.eval_shape(lambda: build(checkpoint.node, rngs=nnx.Rngs(0)))
    wanted = {
        path: variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(shell, nnx.Param))
    }
    leaves = checkpoint.format.leaves
    return to_ours(checkpoint.weights, wanted, shell.stack.plan, leaves, dtype=dtype)


def load_model(path: str, *, dtype: str = "float32") -> nnx.Module:
    """Builds our model from a checkpoint folder.

    Args:
        path: the folder.
        dtype: what to compute in; parameters are float32, or float64 with it.
    """
    checkpoint = open_checkpoint(path)
    found = parameters(checkpoint, dtype="float64" if dtype == "float64" else "float32")
    node = with_dtype(checkpoint.node, dtype)
    model = nnx.eval_shape(lambda: build(node, rngs=nnx.Rngs(0)))
    nnx.update(model, nnx.from_flat_state([(p, jnp.asarray(a)) for p, a in found.items()]))
    return model


def with_dtype(node: Any, dtype: str) -> Any:
    """Returns a model node that computes in `dtype` everywhere; float64 sets the residual too."""
    if not isinstance(node, Mapping):
        return node
    keys = ("dtype", "residual_dtype") if dtype == "float64" else ("dtype",)
    return {key: dtype if key in keys else with_dtype(value, dtype) for key, value in node.items()}


class _Without(Mapping[str, np.ndarray]):
    """A mapping with names of it left out; nothing is read before it is asked for."""

    def __init__(self, whole: Mapping[str, np.ndarray], names: Set[str]):
        self._whole, self._names = whole, names

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._names:
            raise KeyError(name)
        return self._whole[name]

    def __iter__(self):
        return (name for name in self._whole if name not in self._names)

    def __len__(self) -> int:
        return len(self._whole) - len(self._names)
