"""MNIST's format, written by hand: pixels, orders, splits, and files that are not right."""

import dataclasses
import gzip
import struct

import numpy as np
import pytest

from seqzoo.data import IdxImages, pipeline
from seqzoo.data.idx_images import bit_reversal
from seqzoo.errors import ConfigError, DataError

SIDE = 4
SMALL = dict(seq_len=SIDE * SIDE, official=False)


def write(folder, part, images, labels, packed):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        content += array.astype(np.uint8).tobytes()
        file = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def mnist(request, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (35, SIDE, SIDE)), rng.integers(0, 10, 35)
    write(tmp_path, "train", images[:30], labels[:30], request.param)
    write(tmp_path, "t10k", images[30:], labels[30:], request.param)
    return tmp_path, images.reshape(35, -1), labels


def rows_of(data, split):
    (batch,) = pipeline.eval_batches(data, split, batch_size=len(data.source(split)))
    return batch


def test_images_are_numbers_or_tokens_in_three_splits(mnist):
    folder, images, labels = mnist
    data = IdxImages(str(folder), **SMALL)
    assert [len(data.source(split)) for split in ("train", "valid", "test")] == [27, 3, 5]
    test = rows_of(data, "test")
    assert test["inputs"].shape == (5, 16, 1) and test["inputs"].dtype == np.float32
    np.testing.assert_allclose(test["inputs"][..., 0], images[30:] / 255, rtol=1e-6)
    np.testing.assert_array_equal(test["label"], labels[30:])
    tokens = dataclasses.replace(data, input_dim=None)
    seen = []
    for split in ("train", "valid"):
        batch = rows_of(tokens, split)
        assert batch["tokens"].dtype == np.int32
        where = (batch["tokens"][:, None] == images[None, :30]).all(2).argmax(1)
        np.testing.assert_array_equal(batch["tokens"], images[where])
        np.testing.assert_array_equal(batch["label"], labels[where])
        seen += where.tolist()
    assert sorted(seen) == list(range(30))
    other = dataclasses.replace(tokens, split_seed=1)
    assert (rows_of(other, "valid")["tokens"] != rows_of(tokens, "valid")["tokens"]).any()


def test_permutations_are_the_same_for_every_image(mnist):
    folder, images, _ = mnist
    data = IdxImages(str(folder), input_dim=None, permutation="random", **SMALL)
    order = np.random.RandomState(92916).permutation(16)
    np.testing.assert_array_equal(rows_of(data, "test")["tokens"], images[30:, order])
    data = dataclasses.replace(data, permutation="bit_reversal")
    order = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    np.testing.assert_array_equal(rows_of(data, "test")["tokens"], images[30:, order])
    np.testing.assert_array_equal(bit_reversal(6), [0, 4, 2, 1, 5, 3])
    assert sorted(bit_reversal(784)) == list(range(784))


def test_an_epoch_has_every_image_once(mnist):
    folder, _, labels = mnist
    data = IdxImages(str(folder), **SMALL)
    steps = list(pipeline.batches(data, "train", global_batch_size=9, stop_step=6))
    epochs = [
        np.concatenate([b["inputs"][:, :, 0] for _, b in part]) for part in (steps[:3], steps[3:])
    ]
    assert len(np.unique(epochs[0], axis=0)) == len(np.unique(epochs[1], axis=0)) == 27
    assert (epochs[0] != epochs[1]).any()


def test_fingerprints_follow_content_and_settings(mnist):
    folder, images, labels = mnist
    data = IdxImages(str(folder), **SMALL)
    before = data.fingerprint()
    assert hash(data) == hash(dataclasses.replace(data))
    assert dataclasses.replace(data, permutation="random").fingerprint() != before
    for file in folder.iterdir():
        file.unlink()
    write(folder, "train", images[:30].reshape(30, SIDE, SIDE), labels[:30], True)
    write(folder, "t10k", images[30:].reshape(5, SIDE, SIDE), labels[30:], False)
    assert dataclasses.replace(data).fingerprint() == before
    write(folder, "t10k", 255 - images[30:].reshape(5, SIDE, SIDE), labels[30:], False)
    assert dataclasses.replace(data).fingerprint() != before


def test_files_that_are_not_right(mnist):
    folder, images, labels = mnist
    packed = (folder / "t10k-labels-idx1-ubyte.gz").exists()
    file = folder / f"t10k-labels-idx1-ubyte{'.gz' if packed else ''}"

    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            IdxImages(str(folder), **{**SMALL, **settings}).source("train")

    published = "has the md5 sum .* where f68b3" if packed else "where 47,040,016 are published"
    refused(f"train-images-idx3-ubyte.* {published}.*data.official=false", official=True)
    fashion = "where 8d4fb7e6c68d591d4c3dfef9ec88bf0d" if packed else "Get Fashion-MNIST"
    refused(fashion, official=True, name="fashion_mnist")
    refused("images of 4 x 4 pixels; data.seq_len=784 must be 16", seq_len=784)
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    refused("cannot be unpacked" if packed else "holds 3 bytes behind a header that says 5")
    write(folder, "t10k", images[30:].reshape(5, SIDE, SIDE), labels[30:32], packed)
    refused("has 5 images, .* 2 labels: they do not belong together")
    write(folder, "t10k", images[30:].reshape(5, SIDE, SIDE), labels[30:] + 10, packed)
    refused("t10k-labels-idx1-ubyte.* has a label 1")
    file.write_bytes(gzip.compress(b"hello world") if packed else b"hello world")
    refused("begins with 68 65 6c 6c where 00 00 08 01 is expected")
    file.unlink()
    refused("there is no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in it")


def test_a_folder_that_is_not_there_says_what_to_get(tmp_path):
    data = IdxImages(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="nothing is not there") as error:
        data.source("train")
    for part in ("Get MNIST", "train-images-idx3-ubyte.gz", "data.path must be the folder"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="kmnist"), "data.name=kmnist; it must be mnist or fashion_mnist"),
        (dict(permutation="yes"), "data.permutation=yes"),
        (dict(input_dim=3), "data.input_dim=3; it must be 1"),
        (dict(vocab_size=255), "data.vocab_size=255"),
        (dict(valid_fraction=0.0), "data.valid_fraction=0.0"),
        (dict(n_classes=2), "data.n_classes=2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        IdxImages("anywhere", **settings)
