"""Text as bytes: packing, cuts, held-out windows, the standard library, files amiss."""

import dataclasses
import sys

import numpy as np
import pytest

from seqzoo.data import IGNORE, StdlibText, Text, pipeline
from seqzoo.data.stdlib import read_library
from seqzoo.data.stdlib_list import family_of
from seqzoo.data.windows import Packed, Windows
from seqzoo.errors import ConfigError, DataError


def windows(documents, seq_len, split="test"):
    packed = Packed.of(documents)
    return Windows(packed.read, packed.size, seq_len, split, seed=0, segments=True)


def test_packing_by_hand():
    batch = windows([b"abc", b"de"], 4).batch(np.arange(2))
    a, b, c, d, e = b"abcde"
    np.testing.assert_array_equal(batch["tokens"], [[0, a, b, c], [0, d, e, 0]])
    np.testing.assert_array_equal(batch["targets"], [[a, b, c, 0], [d, e, 0, IGNORE]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = windows([b"abc", b"de"], 7).batch(np.arange(1))
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 2, 2, 2]])
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("seq_len", [2, 5, 64, 1000])
def test_held_out_windows_cover_every_byte_once(seq_len):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 255, n).astype(np.uint8).tobytes() for n in (1, 7, 100, 33)]
    source = windows(documents, seq_len)
    batch = source.batch(np.arange(len(source)))
    asked = batch["targets"] != IGNORE
    assert batch["targets"][asked].astype(np.uint8).tobytes() == b"\0".join((*documents, b""))
    assert (batch["segment_ids"][~asked] == 0).all() and (batch["segment_ids"][asked] > 0).all()


def test_an_epoch_is_one_cut_of_the_text_and_the_next_another():
    text = np.arange(1, 251, dtype=np.uint8).tobytes()  # a byte is its own offset
    source = windows([text], 16, "train")
    count = len(source)
    starts = []
    for epoch in range(4):
        index = source.order(np.arange(count) + epoch * count)
        first = source.batch(index)["tokens"][:, 0]
        np.testing.assert_array_equal(np.diff(np.sort(first)), np.full(count - 1, 16))
        assert (np.diff(first) < 0).any()  # not in the order of the text
        starts.append(first.min())
    assert len(set(starts)) > 1


def test_the_shortest_text_that_fits_and_one_that_does_not():
    batch = windows([b"abc"], 4, "train").batch(np.array([0, 1, 7]))
    np.testing.assert_array_equal(batch["tokens"], [[0, *b"abc"]] * 3)
    with pytest.raises(DataError, match="holds 4 tokens, fewer than data.seq_len=5"):
        windows([b"abc"], 5, "train")


def test_one_file_is_cut_in_three(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 101)))
    data = Text(path=str(file), valid_fraction=0.1, test_fraction=0.2, seq_len=8, eval_seq_len=32)
    parts = [b"".join(data.documents(split)) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [70, 10, 20] and b"".join(parts) == file.read_bytes()
    (batch,) = pipeline.eval_batches(data, "test", batch_size=4)
    assert batch["tokens"].shape == (4, 32) and (batch["targets"] != IGNORE).sum() == 21
    assert data.source("train").batch(np.arange(2))["tokens"].shape == (2, 8)
    assert "segment_ids" not in dataclasses.replace(data, segment_ids=False).source("test").batch(
        np.arange(1)
    )


def folder_of(tmp_path, count=12):
    for n in range(count):
        place = tmp_path / f"part{n % 3}"
        place.mkdir(exist_ok=True)
        (place / f"{n}.txt").write_bytes(bytes([65 + n]) * 100)
    (tmp_path / "note.md").write_text("ignored when only .txt is taken")
    (tmp_path / ".hidden.txt").write_text("never taken")
    (tmp_path / "empty.txt").write_text("")
    return str(tmp_path)


def test_a_folder_is_split_by_file(tmp_path):
    data = Text(path=folder_of(tmp_path), extensions=["txt"], test_fraction=0.2)
    splits = {split: data.documents(split) for split in ("train", "valid", "test")}
    assert {split: len(files) for split, files in splits.items()} == {
        "train": 8,
        "valid": 1,
        "test": 3,
    }
    assert len(set().union(*splits.values())) == 12
    everything = Text(path=str(tmp_path)).documents
    assert sum(len(everything(split)) for split in splits) == 13


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path):
    (tmp_path / "one").mkdir()
    path = folder_of(tmp_path / "one")
    data = Text(path=path, extensions=[".txt"])
    (tmp_path / "one").rename(tmp_path / "two")
    moved = dataclasses.replace(data, path=str(tmp_path / "two"))
    assert moved.fingerprint() == Text(**dataclasses.asdict(moved)).fingerprint()
    (tmp_path / "two").rename(tmp_path / "one")
    assert data.fingerprint() == moved.fingerprint()
    assert dataclasses.replace(data, seq_len=128).fingerprint() != data.fingerprint()
    (tmp_path / "one" / "part0" / "0.txt").write_text("changed")
    # What the run began with is what it goes on with; a new run sees the new content.
    assert data.fingerprint() == moved.fingerprint()
    assert Text(path=path, extensions=[".txt"]).fingerprint() != data.fingerprint()


def test_files_that_are_not_right(tmp_path):
    missing = Text(path=str(tmp_path / "nothing.txt"))
    with pytest.raises(DataError, match="nothing.txt: there is no such file or folder"):
        missing.fingerprint()
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="empty.txt is empty"):
        Text(path=str(tmp_path / "empty.txt")).source("train")
    with pytest.raises(DataError, match="holds no file .* that ends in .md"):
        Text(path=str(tmp_path), extensions=[".md"]).source("train")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(DataError, match="not UTF-8: byte 3 is 0xe9.*data.encoding=bytes"):
        Text(path=str(tmp_path / "latin.txt")).source("train")
    assert Text(path=str(tmp_path / "latin.txt"), encoding="bytes", seq_len=16).source("train")
    (tmp_path / "tiny.txt").write_text("abc")
    with pytest.raises(DataError, match="3 bytes are too few"):
        Text(path=str(tmp_path / "tiny.txt")).source("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vocab_size=255), "data.vocab_size=255 is too small for bytes"),
        (dict(seq_len=1), "data.seq_len=1"),
        (dict(eval_seq_len=0), "data.eval_seq_len=0"),
        (dict(encoding="latin-1"), "data.encoding=latin-1"),
        (dict(valid_fraction=0.6, test_fraction=0.5), "together below 1"),
        (dict(test_fraction=0.0), "data.test_fraction=0.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Text(path="anywhere", **settings)


def test_the_standard_library():
    data = StdlibText(seq_len=64, eval_seq_len=512)
    found = {split: sum(map(len, data.documents(split))) for split in ("train", "valid", "test")}
    fingerprint = data.fingerprint()
    if sys.version_info[:3] == (3, 11, 7):
        # The list was written by this Python: all of it is here.
        assert found == {"train": 8_426_041, "valid": 499_247, "test": 1_101_205}
        assert fingerprint.count("-") == 2
    else:
        assert min(found.values()) > 0 and fingerprint.endswith("of657")
    assert fingerprint != StdlibText(seq_len=64).fingerprint()
    batch = data.source("train").batch(np.arange(3))
    assert batch["tokens"].shape == (3, 64)
    source = data.source("test")
    asked = 0
    for batch in pipeline.eval_batches(data, "test", batch_size=64):
        asked += (batch["targets"] != IGNORE).sum()
    assert asked == found["test"] + len(data.documents("test"))
    assert len(source) == -(-asked // 512)


def test_held_out_modules_share_no_passages_with_those_trained_on():
    library = read_library()
    families = {split: {family_of(name) for name in files} for split, files in library.items()}
    assert not families["train"] & families["test"]
    assert not families["train"] & families["valid"]
    assert not families["valid"] & families["test"]

    def passages(split):
        for content in library[split].values():
            lines = [line.strip() for line in content.split(b"\n") if len(line.strip()) > 3]
            yield from (b"\n".join(lines[n : n + 4]) for n in range(len(lines) - 3))

    known = set(passages("train"))
    for split in ("valid", "test"):
        held_out = list(passages(split))
        assert sum(passage in known for passage in held_out) < 0.005 * len(held_out)


def test_a_library_without_source_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("seqzoo.data.stdlib.library_folder", lambda: tmp_path)
    read_library.cache_clear()
    try:
        with pytest.raises(DataError, match="data=text data.path="):
            StdlibText().source("train")
    finally:
        monkeypatch.undo()
        read_library.cache_clear()
