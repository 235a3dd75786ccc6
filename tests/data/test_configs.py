"""configs/data and configs/task: each builds, explains its keys, and repeats the defaults."""

import dataclasses
import importlib
import pathlib

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from seqzoo.config.build import build
from seqzoo.data import SPLITS
from seqzoo.data.source import Dataset
from seqzoo.errors import DataError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted([*(CONFIGS / "data").glob("*.yaml"), *(CONFIGS / "task").glob("*.yaml")])
# Presets: another size of a class whose defaults stand in the file of its own name.
PRESETS = {"mqar_zoology", "mqar_based", "fashion_mnist", "lra_image"}
# Readers of public data sets, each tested with files in its format that its own test writes.
PUBLIC = {file.stem for file in FILES if "official:" in file.read_text()}
# Filled in from the data.
GIVEN = {"groups", "most_asked", "answers_in_input"}


def target_of(node):
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_config_names_every_key_with_its_default_and_its_meaning(file):
    text = file.read_text()
    node = yaml.safe_load(text)
    fields = {field.name: field for field in dataclasses.fields(target_of(node))}
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 100
    assert list(node) == ["_target_", *(name for name in fields if name not in GIVEN)]
    for line in text.splitlines():
        if line and line[0].isalpha():
            assert line.startswith("_target_") or "#" in line, f"{line} says nothing of its meaning"
    for name, field in fields.items():
        if name in GIVEN or file.stem in PRESETS:
            continue
        if field.default is dataclasses.MISSING:
            assert node[name] == "???" or "_target_" in node[name]
        else:
            plain = list(field.default) if isinstance(field.default, tuple) else field.default
            assert node[name] == plain, name


def data_files(public):
    found = [f for f in FILES if f.parent.name == "data" and (f.stem in PUBLIC) == public]
    return pytest.mark.parametrize("file", found, ids=lambda file: file.stem)


@data_files(public=True)
def test_a_public_data_set_that_is_not_there_says_what_to_get(file, tmp_path):
    node = yaml.safe_load(file.read_text()) | {"path": str(tmp_path / "nothing")}
    data = build(node)
    assert isinstance(data, Dataset)
    hash(data)
    with pytest.raises(DataError, match=r"nothing.*looked for at .*\. Get .*; data.path must be"):
        data.source("train")


@data_files(public=False)
def test_a_data_config_builds_and_gives_rows(file, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 400)
    root = {"data": yaml.safe_load(file.read_text())}
    for node in (root["data"], root["data"].get("text", {})):  # one data set may hold another
        if "path" in node:
            node["path"] = str(tmp_path / "a.bin")
            node.update({"encoding": "bytes"} if "encoding" in node else {"vocab_size": 2**16})
    data = build(OmegaConf.to_container(OmegaConf.create(root), resolve=True)["data"])
    assert isinstance(data, Dataset)
    hash(data)
    for split in SPLITS:
        batch = data.source(split).batch(np.arange(2))
        assert batch["tokens"].min() >= 0 and batch["tokens"].max() < data.vocab_size
        if "label" in batch:
            assert batch["label"].shape == (2,) and batch["label"].max() < data.n_classes
        else:
            assert batch["tokens"].shape == batch["targets"].shape
            assert batch["targets"].max() < data.vocab_size
        if "group" in batch:
            assert batch["group"].max() < len(data.group_names)
