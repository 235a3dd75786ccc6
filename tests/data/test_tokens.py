"""Token arrays: .npy and .bin, ranges, cuts, documents, files that change under a run."""

import dataclasses
import os

import numpy as np
import pytest

from seqzoo.data import IGNORE, Tokens, pipeline, tokens
from seqzoo.errors import ConfigError, DataError


@pytest.fixture
def array(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    values.tofile(tmp_path / "a.bin")
    return tmp_path, values


def test_npy_and_bin_hold_the_same_rows(array):
    folder, values = array
    npy = Tokens(vocab_size=1000, path=str(folder / "a.npy"), seq_len=32)
    raw = Tokens(vocab_size=1000, path=str(folder / "a.bin"), seq_len=32)
    for split in ("train", "valid", "test"):
        one, other = (data.source(split).batch(np.arange(1)) for data in (npy, raw))
        for name in ("tokens", "targets"):
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == np.int32
    train = npy.source("train")
    batch = train.batch(train.order(np.arange(len(train))))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    windows = np.lib.stride_tricks.sliding_window_view(values[:4900].astype(int), 33)
    for row, last in zip(batch["tokens"][:3], batch["targets"][:3, -1], strict=True):
        assert (windows == [*row, last]).all(1).sum() == 1


def test_held_out_targets_are_every_token_but_the_first(array):
    folder, values = array
    data = Tokens(
        vocab_size=1000, path=str(folder / "a.npy"), seq_len=8, eval_seq_len=100, test_fraction=0.1
    )
    found = [
        batch["targets"][batch["targets"] != IGNORE]
        for batch in pipeline.eval_batches(data, "test", batch_size=2)
    ]
    np.testing.assert_array_equal(np.concatenate(found), values[4501:])


def test_three_arrays(array):
    folder, values = array
    for split, part in (("train", values[:3000]), ("valid", values[3000:]), ("test", values[:50])):
        np.save(folder / f"{split}.npy", part)
    paths = {split: str(folder / f"{split}.npy") for split in ("train", "valid", "test")}
    data = Tokens(vocab_size=1000, paths=paths, seq_len=16)
    assert hash(data) == hash(dataclasses.replace(data))
    batch = data.source("test").batch(np.arange(1))
    np.testing.assert_array_equal(batch["tokens"][0], values[:16])
    assert data.source("valid").size == 1999


def test_an_end_token_keeps_documents_apart(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 6, 0, 7, 0, 8, 9, 3] * 10, np.int64))
    data = Tokens(
        vocab_size=10,
        path=str(tmp_path / "a.npy"),
        seq_len=6,
        end_token=0,
        valid_fraction=0.1,
        test_fraction=0.1,
    )
    batch = data.source("valid").batch(np.arange(2))
    np.testing.assert_array_equal(batch["tokens"][0], [5, 6, 0, 7, 0, 8])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 3], [1, 0, 0, 0, 0, 0]])


def test_fingerprints_follow_the_content(array):
    folder, values = array
    data = Tokens(vocab_size=1000, path=str(folder / "a.npy"))
    np.save(folder / "b.npy", values)
    assert dataclasses.replace(data, path=str(folder / "b.npy")).fingerprint() == data.fingerprint()
    np.save(folder / "b.npy", values[::-1])
    assert dataclasses.replace(data, path=str(folder / "b.npy")).fingerprint() != data.fingerprint()


def test_a_file_above_the_limit_is_sampled(array, monkeypatch):
    folder, values = array
    monkeypatch.setattr(tokens, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(tokens, "_SAMPLE_BYTES", 64)
    monkeypatch.setattr(tokens, "_SAMPLES", 4)
    data = Tokens(vocab_size=1000, path=str(folder / "a.npy"))
    values[-1] += 1  # the tail is always looked at
    np.save(folder / "b.npy", values)
    assert dataclasses.replace(data, path=str(folder / "b.npy")).fingerprint() != data.fingerprint()
    values[1000] = 60000  # not looked at, but found when it is read
    np.save(folder / "b.npy", values)
    broken = dataclasses.replace(data, path=str(folder / "b.npy"), seq_len=4000)
    with pytest.raises(DataError, match="token 60000, outside data.vocab_size=1000"):
        broken.source("train").batch(np.arange(1))


def test_a_file_that_changes_under_a_run_stops_it(array):
    folder, values = array
    data = Tokens(vocab_size=1000, path=str(folder / "a.npy"), seq_len=32)
    source = data.source("train")
    source.batch(np.arange(2))
    os.utime(folder / "a.npy", ns=(1, 1))
    with pytest.raises(DataError, match="a.npy changed since the run began"):
        source.batch(np.arange(2))
    with pytest.raises(DataError, match="changed since the run began"):
        next(pipeline.batches(data, "train", global_batch_size=2))
    os.remove(folder / "a.npy")
    with pytest.raises(DataError, match="changed since the run began"):
        source.batch(np.arange(2))


def test_files_that_are_not_right(array):
    folder, values = array

    def opened(name, **settings):
        return Tokens(**{"vocab_size": 1000, "path": str(folder / name), **settings}).source(
            "train"
        )

    with pytest.raises(DataError, match="there is no such file"):
        opened("nothing.npy")
    (folder / "empty.bin").write_bytes(b"")
    with pytest.raises(DataError, match="empty.bin is empty"):
        opened("empty.bin")
    np.save(folder / "none.npy", values[:0])
    with pytest.raises(DataError, match="none.npy is empty"):
        opened("none.npy")
    (folder / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes, no whole number of uint16 tokens"):
        opened("odd.bin")
    (folder / "cut.npy").write_bytes((folder / "a.npy").read_bytes()[:-100])
    with pytest.raises(DataError, match="cut.npy is no readable .npy array"):
        opened("cut.npy")
    np.save(folder / "float.npy", np.ones(10))
    with pytest.raises(DataError, match="array of float64"):
        opened("float.npy")
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="no readable .npy"):
        opened("objects.npy")
    (folder / "a.txt").write_text("1 2 3")
    with pytest.raises(DataError, match="read from .npy and .bin"):
        opened("a.txt")
    with pytest.raises(DataError, match="outside data.vocab_size=500"):
        opened("a.npy", vocab_size=500)
    np.save(folder / "negative.npy", np.array([3, -1] * 200))
    with pytest.raises(DataError, match="token -1"):
        opened("negative.npy")
    np.save(folder / "short.npy", np.arange(3))
    with pytest.raises(DataError, match="split has . tokens, which is nothing to predict"):
        opened("short.npy")
    with pytest.raises(DataError, match="fewer than data.seq_len=8192"):
        opened("a.npy", seq_len=8192)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "data.path or data.paths"),
        (dict(path="a.npy", paths={}), "data.path or data.paths"),
        (dict(paths={"train": "a"}), "it must have train, valid, test"),
        (dict(path="a.bin", dtype="float32"), "data.dtype=float32"),
        (dict(path="a.npy", vocab_size=0), "data.vocab_size=0"),
        (dict(path="a.npy", seq_len=0), "data.seq_len=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Tokens(**{"vocab_size": 10, **settings})
