"""Pathfinder's folders, written by hand: metadata as text, images, files that are not right."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from seqzoo.data import Pathfinder, pipeline
from seqzoo.errors import ConfigError, DataError

LEVEL = "curv_contour_length_14"
SMALL = dict(seq_len=64, official=False)


@pytest.fixture
def folder(tmp_path):
    """20 images of 8 x 8 in two folders, as the release has them."""
    rng = np.random.default_rng(0)
    (tmp_path / LEVEL / "metadata").mkdir(parents=True)
    for part in (0, 1):
        images, lines = tmp_path / LEVEL / "imgs" / str(part), []
        images.mkdir(parents=True)
        for number in range(10):
            picture = rng.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(picture).save(images / f"sample_{number}.png")
            lines.append(f"imgs/{part} sample_{number}.png {number} {number % 2} 1.8 14 3 2")
        (tmp_path / LEVEL / "metadata" / f"{part}.npy").write_text("\n".join(lines) + "\n")
    return tmp_path


def pixels_of(folder, part, number):
    return np.asarray(Image.open(folder / LEVEL / f"imgs/{part}/sample_{number}.png")).ravel()


def test_images_are_numbers_or_tokens_in_three_splits(folder):
    data = Pathfinder(str(folder), input_dim=None, **SMALL)
    images = np.stack([pixels_of(folder, n // 10, n % 10) for n in range(20)])
    seen = []
    for split, size in (("train", 16), ("valid", 2), ("test", 2)):
        (batch,) = pipeline.eval_batches(data, split, batch_size=size)
        assert batch["tokens"].shape == (size, 64) and batch["tokens"].dtype == np.int32
        where = (batch["tokens"][:, None] == images[None]).all(2).argmax(1)
        np.testing.assert_array_equal(batch["tokens"], images[where])
        np.testing.assert_array_equal(batch["label"], where % 2)
        seen += where.tolist()
    assert sorted(seen) == list(range(20))
    numbers = dataclasses.replace(data, input_dim=1).source("test").batch(np.arange(2))["inputs"]
    tokens = data.source("test").batch(np.arange(2))["tokens"]
    np.testing.assert_allclose(numbers[..., 0], (tokens / 255 - 0.5) / 0.5, atol=1e-6)
    assert numbers.dtype == np.float32


def test_the_one_empty_image_of_the_release_is_left_out(tmp_path):
    images, metadata = tmp_path / "curv_baseline/imgs/0", tmp_path / "curv_baseline/metadata"
    images.mkdir(parents=True)
    metadata.mkdir()
    names = [f"sample_{n}.png" for n in range(168, 178)]
    lines = [f"imgs/0 {name} 0 1" for name in names]
    (metadata / "0.npy").write_text("\n".join(lines))
    for name in names:
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(images / name)
    (images / "sample_172.png").write_bytes(b"")
    settings = dict(level="curv_baseline", valid_fraction=0.2, test_fraction=0.2, official=False)
    data = Pathfinder(str(tmp_path), **settings)
    sizes = [len(data.source(split)) for split in ("train", "valid", "test")]
    assert sizes == [7, 1, 1]
    assert data.source("train").batch(np.arange(7))["inputs"].shape == (7, 1024, 1)


def test_fingerprints_follow_the_list(folder):
    data = Pathfinder(str(folder), **SMALL)
    before = data.fingerprint()
    assert dataclasses.replace(data, split_seed=1).fingerprint() != before
    file = folder / LEVEL / "metadata/0.npy"
    file.write_text(file.read_text().replace(".png 0 0", ".png 0 1"))
    assert dataclasses.replace(data).fingerprint() != before


def test_files_that_are_not_right(folder):
    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            source = Pathfinder(str(folder), **{**SMALL, **settings}).source("train")
            source.batch(np.arange(len(source)))

    refused("metadata, images: 20 found where 200,000 are published", official=True)
    refused("has 8 x 8 pixels; data.seq_len=1024 must be 64", seq_len=1024)
    for number in range(10):  # wherever they are dealt, some are for training
        (folder / LEVEL / f"imgs/0/sample_{number}.png").write_bytes(b"")
    refused(r"sample_\d.png is empty; it is damaged")
    for number in range(10):
        (folder / LEVEL / f"imgs/0/sample_{number}.png").write_bytes(b"no image")
    refused(r"sample_\d.png is no readable image")
    for number in range(10):
        (folder / LEVEL / f"imgs/0/sample_{number}.png").unlink()
    refused(r"there is no curv_contour_length_14/imgs/0/sample_\d.png in it")
    (folder / LEVEL / "metadata/0.npy").write_text("imgs/0 sample_0.png 0\n")
    refused("0.npy has a line 1 that is not folder, file, number, label")
    (folder / LEVEL / "metadata/0.npy").unlink()
    (folder / LEVEL / "metadata/1.npy").write_text("imgs/1 sample_0.png 0 1\n")
    refused("1 images are too few for three splits")
    (folder / LEVEL / "metadata/1.npy").unlink()
    refused("metadata has no list of images")
    refused("its folder curv_baseline/metadata is not there.*pathfinder8", level="curv_baseline")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(level="hard"), "data.level=hard"),
        (dict(seq_len=1000), "data.seq_len=1000; it must be a square"),
        (dict(input_dim=3), "data.input_dim=3"),
        (dict(test_fraction=0.0), "data.test_fraction=0.0"),
        (dict(n_classes=1), "data.n_classes=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Pathfinder("anywhere", **settings)
