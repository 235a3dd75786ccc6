"""CIFAR-10's binary version, written by hand: colours, grey, splits, files that are not right."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from seqzoo.data import CIFAR10, pipeline
from seqzoo.errors import ConfigError, DataError

N = 4  # pictures per file


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6 * N, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, 6), strict=True):
        part.tofile(tmp_path / name)
    return tmp_path, records


def rows_of(data, split):
    (batch,) = pipeline.eval_batches(data, split, batch_size=len(data.source(split)))
    return batch


def test_colours_are_normalised_numbers_a_pixel_per_place(cifar):
    folder, records = cifar
    data = CIFAR10(str(folder), official=False)
    assert [len(data.source(split)) for split in ("train", "valid", "test")] == [18, 2, 4]
    batch = rows_of(data, "test")
    assert batch["inputs"].shape == (4, 1024, 3) and batch["inputs"].dtype == np.float32
    planes = records[-4:, 1:].reshape(4, 3, 1024) / 255
    for channel, (mean, std) in enumerate([(0.4914, 0.247), (0.4822, 0.243), (0.4465, 0.261)]):
        expected = (planes[:, channel] - mean) / std
        np.testing.assert_allclose(batch["inputs"][..., channel], expected, atol=1e-5)
    np.testing.assert_array_equal(batch["label"], records[-4:, 0])


def test_grey_is_what_the_image_library_makes(cifar):
    folder, records = cifar
    data = CIFAR10(str(folder), colour="grey", input_dim=None, official=False)
    tokens = rows_of(data, "test")["tokens"]
    assert tokens.dtype == np.int32
    for row, record in zip(tokens, records[-4:], strict=True):
        picture = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(
            row, np.asarray(Image.fromarray(picture).convert("L")).ravel()
        )
    numbers = rows_of(dataclasses.replace(data, input_dim=1), "test")["inputs"][..., 0]
    np.testing.assert_allclose(numbers, (tokens / 255 - 122.6 / 255) / (61 / 255), atol=1e-5)


def test_colours_as_tokens_and_all_rows_once(cifar):
    folder, records = cifar
    data = CIFAR10(str(folder), input_dim=None, seq_len=3072, official=False)
    pixels = records[:20, 1:].reshape(20, 3, 1024).transpose(0, 2, 1).reshape(20, -1)
    seen = []
    for split in ("train", "valid"):
        batch = rows_of(data, split)
        where = (batch["tokens"][:, None] == pixels[None]).all(2).argmax(1)
        np.testing.assert_array_equal(batch["tokens"], pixels[where])
        np.testing.assert_array_equal(batch["label"], records[where, 0])
        seen += where.tolist()
    assert sorted(seen) == list(range(20))


def test_fingerprints_follow_the_content(cifar):
    folder, records = cifar
    data = CIFAR10(str(folder), official=False)
    before = data.fingerprint()
    assert dataclasses.replace(data, valid_fraction=0.2).fingerprint() != before
    assert dataclasses.replace(data).fingerprint() == before
    records[-1, 5] ^= 1
    records[-N:].tofile(folder / "test_batch.bin")
    assert dataclasses.replace(data).fingerprint() != before


def test_files_that_are_not_right(cifar):
    folder, records = cifar

    def refused(message, official=False):
        with pytest.raises(DataError, match=message):
            CIFAR10(str(folder), official=official).source("test")

    refused("data_batch_1.bin has 12,292 bytes where 30,730,000 are published", official=True)
    (folder / "data_batch_3.bin").write_bytes(records[:1].tobytes()[:-1])
    refused("data_batch_3.bin has 3,072 bytes, no whole number of records of 3073")
    (folder / "data_batch_3.bin").write_bytes(bytes([200]) * 3073)
    refused("data_batch_3.bin has a label 200")
    (folder / "data_batch_3.bin").unlink()
    refused("there is no data_batch_3.bin in it; .*Get CIFAR-10.*cifar-10-binary.tar.gz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(colour="gray"), "data.colour=gray"),
        (dict(input_dim=1), "data.input_dim=1; it must be 3"),
        (dict(colour="grey", input_dim=3), "data.input_dim=3; it must be 1"),
        (dict(input_dim=None), "with data.colour=rgb and data.input_dim=null it must be 3072"),
        (dict(seq_len=784), "data.seq_len=784"),
        (dict(valid_fraction=1.0), "data.valid_fraction=1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CIFAR10("anywhere", **settings)
