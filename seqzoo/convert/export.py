"""A run's model as a folder that Hugging Face transformers, and `seqzoo import`, read."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from seqzoo.config.build import build
from seqzoo.config.signature import with_defaults
from seqzoo.config.trust import load_untrusted
from seqzoo.convert.checkpoint import FORMATS
from seqzoo.convert.mapping import Format, Settings, to_theirs
from seqzoo.convert.weights import INDEX, SINGLE
from seqzoo.errors import CheckpointError, ConfigError, suggest
from seqzoo.load import load
from seqzoo.models.language_model import LanguageModel
from seqzoo.nn.stack import Run

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
DTYPES = ("float32", "bfloat16")

# What an imported run knows of its tokens. Without it null, or the defaults of transformers, which
# mean nothing here, would end texts.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Settings that say nothing of what a trained model computes: how it started, what it was trained
# with, what it is computed in and by. Every other one must survive the way there and back.
_FREE = {
    "_partial_",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "dt_scale",
    "dropout",
    "dtype",
    "embed_decay",
    "embed_dropout",
    "embed_std",
    "implementation",
    "init_std",
    "max_positions",  # counts with learned positions alone, which are compared
    "n_residuals",
    "pad_vocab_multiple",
    "remat",
    "residual_dtype",
}


class Described(NamedTuple):
    """A model of ours in another format.

    Attributes:
        format: which one.
        values: its config.json.
        plan: how our arrays are stacked.
    """

    format: Format
    values: dict[str, Any]
    plan: Sequence[Run]


class Exported(NamedTuple):
    """What was written: the files, which step, as what."""

    files: list[pathlib.Path]
    step: int
    format: Format


def export_run(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    step: int | str = "best",
    dtype: str = "float32",
    format: str | None = None,
    force: bool = False,
    trust: Iterable[str] = (),
) -> Exported:
    """Writes model.safetensors and config.json of a run; it writes both or, failing, neither.

    Args:
        path: the run folder.
        folder: where to; it is made where there is none.
        step: "best", "last", or a number.
        dtype: of the weights in the file: "float32" loses nothing, "bfloat16" rounds.
        format: refuse a model that is not of this one; None = as the model is.
        force: replace files that are there.
        trust: packages beside ours whose classes config.yaml may name.

    Raises:
        ConfigError: the model has no such form, or a file is there already.
        CheckpointError: the step cannot be read, or the files cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    run_folder, folder = pathlib.Path(path), pathlib.Path(folder).expanduser()
    config = load_untrusted(run_folder / "config.yaml", trust)
    source = _source(run_folder)
    seq_len = source.get("max_position_embeddings", config["data"].get("seq_len"))
    try:
        described = describe(config["model"], format, seq_len=seq_len)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}. {_otherwise(run_folder)}") from error
    tokenizer = run_folder / TOKENIZER
    names = [SINGLE, CONFIG] + [TOKENIZER] * tokenizer.is_file()
    _may_write(folder, names, force)

    run = load(run_folder, step, trust)
    arrays = to_theirs(
        flatten_dict(run.params),
        described.plan,
        described.format.leaves,
        vocab_size=config["model"]["vocab_size"],
    )
    # The library writes memory as it lies: a view that is turned round must be copied first.
    arrays = {
        name: np.ascontiguousarray(array, dtype=jnp.dtype(dtype)) for name, array in arrays.items()
    }
    tokens = {key: source.get(key) for key in _TOKENS}
    values = described.values | tokens | {"torch_dtype": dtype}
    with _all_or_none(folder, names) as files:
        save_file(arrays, files[SINGLE], metadata={"format": "pt"})
        files[CONFIG].write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
        shutil.copymode(files[CONFIG], files[SINGLE])  # the library's is for its owner alone
        if TOKENIZER in files:
            shutil.copyfile(tokenizer, files[TOKENIZER])
    return Exported([folder / name for name in names], run.step, described.format)


def describe(
    node: Mapping[str, Any], format: str | None = None, *, seq_len: int | None = None
) -> Described:
    """Finds the format that a `model` node has, and its config.json.

    Args:
        node: of the configuration of a run.
        format: the only one that is wanted; None = any.
        seq_len: the longest row that the model was made for.

    Raises:
        ConfigError: it has none; the text names what stands against it.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"there is no format '{format}'{suggest(format, FORMATS)}; known are "
            + ", ".join(FORMATS)
        )
    model = nnx.eval_shape(lambda: build(node, rngs=nnx.Rngs(0)))
    form = None
    if type(model) is LanguageModel and len(set(model.stack.layers)) == 1:
        block = model.stack.runs[0][0]
        parts = (_name(block.mixer), _name(block.channel_mixer))
        form = next((f for f in FORMATS.values() if (f.mixer, f.channel_mixer) == parts), None)
    if form is None or format not in (None, form.model_type):
        raise ConfigError(f"{_what(node)} is no {format or ' and no '.join(FORMATS)}")

    mixer = model.stack.layers[0]
    ours = _flat(node, mixer)
    values = form.values(
        Settings(with_defaults(node), with_defaults(node["mixers"][mixer]), block, seq_len)
    )
    values = {"model_type": form.model_type, "architectures": [form.architecture], **values}
    theirs = form.node(values)
    for key, value in _flat(theirs, theirs["pattern"][0]).items():
        # None and "auto" are what a constructor works out by itself; `values` asked its result.
        if key.rpartition(".")[2] not in _FREE and ours.get(key) not in (value, None, "auto"):
            shown = key.replace("mixers.", f"mixers.{mixer}.")
            raise ConfigError(
                f"{_what(node)} has model.{shown}={_text(ours[key])}; "
                f"a {form.model_type} has {_text(value)}"
            )
    return Described(form, values, model.stack.plan)


def _flat(node: Mapping[str, Any], mixer: str) -> dict[str, Any]:
    """The settings of a model by key, those of the mixer in all of its layers as ``mixers.key``."""
    found = with_defaults(node)
    mixers, channel_mixer = found.pop("mixers"), found.pop("channel_mixer") or {}
    del found["pattern"], found["_target_"]
    for key, part in (("mixers", mixers[mixer]), ("channel_mixer", channel_mixer)):
        if part:
            inside = with_defaults(part)
            del inside["_target_"]
            found |= {f"{key}.{name}": value for name, value in inside.items()}
    return found


def _name(module: Any) -> str | None:
    return None if module is None else f"{type(module).__module__}.{type(module).__qualname__}"


def _what(node: Mapping[str, Any]) -> str:
    """``the LanguageModel of 4 layers, pattern [mamba,attention] with SwiGLU,``."""
    channel_mixer = node.get("channel_mixer")
    beside = f" with {_last(channel_mixer['_target_'])}" if channel_mixer else ""
    layers, pattern = node.get("n_layers"), ",".join(node.get("pattern", ()))
    return f"the {_last(node['_target_'])} of {layers} layers, pattern [{pattern}]{beside},"


def _last(target: str) -> str:
    return target.rpartition(".")[2]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _otherwise(run_folder: pathlib.Path) -> str:
    """What can be exported, and what to do with the rest."""
    forms = [
        f"{form.model_type} (every layer {_last(form.mixer)}, "
        + (f"then {_last(form.channel_mixer)})" if form.channel_mixer else "no MLP)")
        for form in FORMATS.values()
    ]
    return (
        f"What can be exported: language models, {' and '.join(forms)}, before each an RMSNorm. "
        f"Of any other take the checkpoint itself: {run_folder / 'checkpoints'}/STEP/state is "
        f"Orbax, and seqzoo.load({str(run_folder)!r}).params are its arrays by name"
    )


def _source(run_folder: pathlib.Path) -> dict[str, Any]:
    """The config.json that an imported run came from; else nothing."""
    try:
        found = json.loads((run_folder / "source_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _may_write(folder: pathlib.Path, names: Sequence[str], force: bool) -> None:
    """Refuses what would be lost, and what would be read in place of the new files."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name one, or one that does not exist yet")
    if (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} holds {INDEX}: a checkpoint in parts, which would be read in place of "
            f"{SINGLE}. Name another folder"
        )
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise ConfigError(f"{folder} holds {' and '.join(there)} already; --force replaces that")


@contextlib.contextmanager
def _all_or_none(
    folder: pathlib.Path, names: Sequence[str]
) -> Iterator[Mapping[str, pathlib.Path]]:
    """Gives a file to write for each name; they take their names at the end, or are removed.

    Raises:
        CheckpointError: one could not be written.
    """
    made = not folder.exists()
    beside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield beside
        for file in beside.values():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        for name, file in beside.items():
            os.replace(file, folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    finally:
        for file in beside.values():
            file.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
