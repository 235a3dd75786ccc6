"""enwik8's cut, on a file of random bytes."""

import dataclasses

import numpy as np
import pytest

from seqzoo.data import IGNORE, Enwik8, enwik8, pipeline
from seqzoo.errors import ConfigError, DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "enwik8"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8).tobytes())
    return path


def test_splits_are_90_5_and_5_parts_of_the_file(file):
    data = Enwik8(str(file), seq_len=32, eval_seq_len=48, official=False)
    content = np.frombuffer(file.read_bytes(), np.uint8)
    for split, part in (("valid", content[1800:1900]), ("test", content[1900:])):
        batches = list(pipeline.eval_batches(data, split, batch_size=2))
        targets = np.concatenate([batch["targets"] for batch in batches])
        np.testing.assert_array_equal(targets[targets != IGNORE], part[1:])
        np.testing.assert_array_equal(batches[0]["tokens"][0], part[:48])
    step, batch = next(pipeline.batches(data, "train", global_batch_size=4))
    assert step == 0 and batch["tokens"].shape == (4, 32)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    windows = np.lib.stride_tricks.sliding_window_view(content[:1800], 32)
    assert all((windows == row).all(1).any() for row in batch["tokens"])
    assert data.bytes_per_token == 1.0


def test_fingerprints_follow_the_content(file):
    data = Enwik8(str(file), official=False)
    before = data.fingerprint()
    assert dataclasses.replace(data, seq_len=64).fingerprint() != before
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert dataclasses.replace(data).fingerprint() != before


def test_files_that_are_not_right(file, monkeypatch):
    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            Enwik8(str(file), **settings).source("train")

    refused("enwik8 has 2,000 bytes where 100,000,000 are published.*data.official=false")
    monkeypatch.setattr(enwik8, "_BYTES", 2000)
    refused("has the md5 sum .* where a1fa5ffddb56f4953e226637dabbb36a is published")
    file.write_bytes(b"short")
    refused("has 5 bytes, too few to hold anything out", official=False)
    file.unlink()
    refused("there is no such file.*enwik8.zip, and unpack it: 100,000,000 bytes, md5 a1fa5ffd")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="data.vocab_size=205 is too small for bytes"):
        Enwik8("anywhere", vocab_size=205)
    with pytest.raises(ConfigError, match="data.seq_len=1"):
        Enwik8("anywhere", seq_len=1)
