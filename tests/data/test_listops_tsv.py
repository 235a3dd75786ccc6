"""The published tables of ListOps, written by hand in their binary form."""

import dataclasses

import numpy as np
import pytest

from seqzoo.data import ListOps, ListOpsTSV, pipeline
from seqzoo.data.listops_trees import SYMBOLS
from seqzoo.errors import ConfigError, DataError

FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
TREES = [
    ("( ( ( ( [MAX 3 ) 4 ) 1 ) ] )", "[MAX 3 4 1 X", 4),
    ("( ( ( [SM ( ( ( [MIN 9 ) 8 ) ] ) ) 7 ) ] )", "[SM [MIN 9 8 X 7 X", 5),
    ("( ( ( [MED 0 ) 5 ) ] )", "[MED 0 5 X", 2),
]


@pytest.fixture
def folder(tmp_path):
    for split, name in FILES.items():
        rows = TREES if split == "train" else TREES[:2]
        lines = ["Source\tTarget", *(f"{tree}\t{value}" for tree, _, value in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_parentheses_go_and_brackets_are_renamed(folder):
    data = ListOpsTSV(str(folder), seq_len=12, official=False)
    (batch,) = pipeline.eval_batches(data, "train", batch_size=4)
    assert batch["tokens"].dtype == batch["segment_ids"].dtype == batch["label"].dtype == np.int32
    for row, (_, words, value) in enumerate(TREES):
        length = batch["segment_ids"][row].sum()
        found = [SYMBOLS[token] for token in batch["tokens"][row, :length]]
        assert found == [*words.split(), "<eos>"] and batch["label"][row] == value
        assert not batch["tokens"][row, length:].any()
    assert batch["label"][3] == -100
    assert (SYMBOLS.index("<pad>"), data.vocab_size) == (0, 18)


def test_the_generator_speaks_the_same_language(folder):
    made = ListOps(min_length=3, max_length=10, max_depth=3, seq_len=12)
    assert (made.vocab_size, made.append_eos) == (18, ListOpsTSV(str(folder)).append_eos)
    row = made.source("train").batch(np.arange(1))
    words = [SYMBOLS[t] for t in row["tokens"][0] if t > 2]
    tree = " ".join("]" if word == "X" else word for word in words)
    (folder / "basic_test.tsv").write_text(f"Source\tTarget\n{tree}\t{row['label'][0]}\n")
    read = ListOpsTSV(str(folder), seq_len=12, official=False).source("test").batch(np.arange(1))
    for name in row:
        np.testing.assert_array_equal(read[name], row[name])


def test_long_trees_are_cut(folder):
    data = ListOpsTSV(str(folder), seq_len=4, append_eos=False, official=False)
    batch = data.source("test").batch(np.arange(2))
    assert [SYMBOLS[token] for token in batch["tokens"][1]] == ["[SM", "[MIN", "9", "8"]


def test_fingerprints_follow_the_content(folder):
    data = ListOpsTSV(str(folder), official=False)
    before = data.fingerprint()
    assert dataclasses.replace(data, append_eos=False).fingerprint() != before
    (folder / "basic_val.tsv").write_text(f"Source\tTarget\n{TREES[2][0]}\t2\n")
    assert dataclasses.replace(data).fingerprint() != before


def test_files_that_are_not_right(folder):
    def refused(message, split="train", official=False):
        with pytest.raises(DataError, match=message):
            ListOpsTSV(str(folder), official=official).source(split)

    refused("basic_train.tsv, rows: 3 found where 96,000 are published", official=True)
    refused("basic_val.tsv, rows: 2 found where 2,000 are published", "valid", official=True)
    file = folder / "basic_train.tsv"
    for content, message in {
        "": "does not begin with the line Source",
        "Source\tTarget\n": "has no rows",
        "Source\tTarget\n( ( [MAX 3 ) ] )\t12\n": "has a line 2 whose value is no digit",
        "Source\tTarget\n( ( [MAX 3 ) ] )": "has a line 2 whose value is no digit",
        "Source\tTarget\n1\t1\n( ( [AVG 3 ) ] )\t3\n": "has a line 3 that is no tree of ListOps",
        "Source\tTarget\n\t3\n": "has a line 2 that is no tree of ListOps",
    }.items():
        file.write_text(content)
        refused(message)
    file.unlink()
    refused("there is no basic_train.tsv in it.*lra_release.gz.*listops-1000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vocab_size=15), "data.vocab_size=15"),
        (dict(n_classes=2), "data.n_classes=2"),
        (dict(seq_len=1), "data.seq_len=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ListOpsTSV("anywhere", **settings)
