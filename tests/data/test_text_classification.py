"""Characters, the folders of reviews and the tables of papers, written by hand."""

import dataclasses
import os
from collections import Counter

import numpy as np
import pytest

from seqzoo.data import IMDB, Retrieval, pipeline
from seqzoo.data.characters import END_OF_TEXT, UNKNOWN, Characters
from seqzoo.errors import ConfigError, DataError

TEXTS = {
    "train/neg": ["bad bad film", "no"],
    "train/pos": ["good film, <br /> très bon", "ok"],
    "test/neg": ["awful!"],
    "test/pos": ["fine", "¿bon?"],
}
PAIRS = {
    "train": [("1.0", "b'abc'", "b'abca'"), ("0.0", "b'b'", "b'a\\n'"), ("1", "b'c'", "b'bb'")],
    "eval": [("0.0", "b'zzz'", "b'a'")],
    "test": [("1.0", "b'ab'", "b'" + "c" * 30 + "'"), ("0", "b'a'", "b'c'")],
}


@pytest.fixture
def reviews(tmp_path):
    for folder, texts in TEXTS.items():
        (tmp_path / folder).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}_7.txt").write_bytes(text.encode())
    return tmp_path


@pytest.fixture
def papers(tmp_path):
    for name, rows in PAIRS.items():
        lines = [f"{label}\t{n}\t{n + 9}\t{a}\t{b}" for n, (label, a, b) in enumerate(rows)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def rows_of(data, split):
    (batch,) = pipeline.eval_batches(data, split, batch_size=len(data.source(split)))
    return batch


def test_characters_are_numbered_by_how_common_they_are():
    characters = Characters.of(["banana", "bad \U0001f600", "é"], min_count=2)
    assert "".join(map(chr, characters.known)) == "abn"  # a 4, then b and n 2 each, by number
    assert characters.size == 6
    expected = [4, 3, 5, UNKNOWN, UNKNOWN, END_OF_TEXT]
    np.testing.assert_array_equal(characters.encode("bané\U0001f600", True), expected)
    np.testing.assert_array_equal(characters.encode("", False), [])
    with pytest.raises(DataError, match="6 different tokens, .*; set data.vocab_size=6"):
        characters.check(5, "here")


def test_reviews_are_characters_with_the_test_serving_for_choice(reviews):
    data = IMDB(str(reviews), seq_len=16, min_count=2, official=False)
    train, test = rows_of(data, "train"), rows_of(data, "test")
    np.testing.assert_array_equal(train["label"], [0, 0, 1, 1])
    np.testing.assert_array_equal(test["label"], [0, 1, 1])
    for name, array in rows_of(data, "valid").items():
        np.testing.assert_array_equal(array, test[name])
    texts = [text[:15] for part in ("train/neg", "train/pos") for text in TEXTS[part]]
    count = Counter("".join(texts))
    order = sorted((c for c, n in count.items() if n >= 2), key=lambda c: (-count[c], ord(c)))
    number = {c: 3 + n for n, c in enumerate(order)}
    for row, text in enumerate(texts):
        expected = [number.get(c, UNKNOWN) for c in text] + [END_OF_TEXT]
        assert train["segment_ids"][row].sum() == len(expected)
        np.testing.assert_array_equal(train["tokens"][row, : len(expected)], expected)
        assert not train["tokens"][row, len(expected) :].any()
    assert UNKNOWN in test["tokens"][0] and train["tokens"].dtype == np.int32


def test_reviews_to_choose_by_can_be_held_out_of_training(reviews):
    data = IMDB(str(reviews), seq_len=16, min_count=1, valid_fraction=0.25, official=False)
    assert [len(data.source(split)) for split in ("train", "valid", "test")] == [3, 1, 3]
    whole = dataclasses.replace(data, valid_fraction=0.0)
    parts = [rows_of(data, split)["tokens"] for split in ("train", "valid")]
    found = np.concatenate(parts)
    assert sorted(map(bytes, found)) == sorted(map(bytes, rows_of(whole, "train")["tokens"]))


def test_fingerprints_of_reviews_follow_the_content(reviews):
    data = IMDB(str(reviews), seq_len=16, min_count=1, official=False)
    before = data.fingerprint()
    assert dataclasses.replace(data, seq_len=8).fingerprint() != before
    (reviews / "test/pos/0_7.txt").write_text("fine?")
    assert dataclasses.replace(data).fingerprint() != before


def test_reviews_that_are_not_right(reviews):
    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            IMDB(str(reviews), **{"official": False, "min_count": 1, **settings}).source("train")

    refused("train/neg, texts: 2 found where 12,500 are published", official=True)
    refused("different tokens, more than data.vocab_size=9", vocab_size=9)
    (reviews / "test/pos/0_7.txt").write_bytes(b"fine \xff")
    refused("test/pos/0_7.txt is not UTF-8 at byte 5")
    for file in (reviews / "test/pos").iterdir():
        file.unlink()
    refused("test/pos has no texts")
    (reviews / "test/pos").rmdir()
    refused("its folder test/pos is not there; .*aclImdb_v1.tar.gz, md5 7c2ac02c")


def test_papers_are_two_texts_of_a_row(papers):
    data = Retrieval(str(papers), seq_len=10, official=False)
    train, test = rows_of(data, "train"), rows_of(data, "test")
    assert train["tokens"].shape == (3, 2, 10) and train["tokens"].dtype == np.int32
    np.testing.assert_array_equal(train["label"], [1, 0, 1])
    np.testing.assert_array_equal(test["label"], [1, 0])
    texts = [text[:9] for _, *pair in PAIRS["train"] for text in pair]
    count = Counter("".join(texts))
    order = sorted(count, key=lambda c: (-count[c], ord(c)))
    number = {c: 3 + n for n, c in enumerate(order)}
    for split, batch in (("train", train), ("test", test)):
        for row, (_, *pair) in enumerate(PAIRS[split]):
            for which, text in enumerate(pair):
                expected = [number[c] for c in text[:9]] + [END_OF_TEXT]
                assert batch["segment_ids"][row, which].sum() == len(expected)
                np.testing.assert_array_equal(
                    batch["tokens"][row, which], np.pad(expected, (0, 10 - len(expected)))
                )
    assert (rows_of(data, "valid")["tokens"][0, 0] == UNKNOWN).sum() == 3
    order = data.source("train").batch(np.array([2, 0]))
    np.testing.assert_array_equal(order["tokens"], train["tokens"][[2, 0]])


def test_fingerprints_of_papers_and_tables_that_change(papers):
    data = Retrieval(str(papers), seq_len=10, official=False)
    before, source = data.fingerprint(), data.source("train")
    assert dataclasses.replace(data, append_eos=False).fingerprint() != before
    file = papers / "new_aan_pairs.train.tsv"
    os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match="train.tsv changed since the run began"):
        source.batch(np.arange(1))
    file.write_text(file.read_text().replace("1.0\t", "0.0\t", 1))
    assert dataclasses.replace(data).fingerprint() != before


def test_tables_that_are_not_right(papers):
    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            Retrieval(str(papers), **{"official": False, **settings}).source("train")

    refused("train.tsv, rows: 3 found where 147,086 are published", official=True)
    refused("more than data.vocab_size=5", vocab_size=5)
    file = papers / "new_aan_pairs.train.tsv"
    for content, message in {
        "": "has no rows",
        "1.0\t1\t2\tone": "has a line 1 that is not label, two numbers and two texts",
        "1.0\t1\t2\ta\tb\n2.0\t1\t2\ta\tb": "has a line 2 that is not label",
    }.items():
        file.write_text(content)
        refused(message)
    file.unlink()
    refused("there is no new_aan_pairs.train.tsv in it.*lra_release.gz.*tsv_data")


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (IMDB, dict(vocab_size=2), "data.vocab_size=2"),
        (IMDB, dict(valid_fraction=1.0), "data.valid_fraction=1.0"),
        (IMDB, dict(n_classes=1), "data.n_classes=1"),
        (IMDB, dict(min_count=0), "data.min_count=0"),
        (Retrieval, dict(seq_len=1), "data.seq_len=1"),
        (Retrieval, dict(n_classes=1), "data.n_classes=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make("anywhere", **settings)
