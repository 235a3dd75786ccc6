"""MNIST and Fashion-MNIST from their IDX files, an image as a sequence of pixels.

Source of the protocol: state-spaces/s4, src/dataloaders/basic.py: 54,000 / 6,000 / 10,000 images,
pixels divided by 255 and no more; permuted by bit reversal, or at random as other works have it.
Differs from source: which 6,000 are held out (ours by a permutation of our own, seed 42 as there).
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.idx import read_idx
from seqzoo.data.source import Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import (
    PIXEL_VALUES,
    Stored,
    check_pixels,
    check_share,
    pixel_rows,
    split_rows,
)
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
_CLASSES = 10
_TITLES = {
    "mnist": "MNIST (LeCun, Cortes, Burges)",
    "fashion_mnist": "Fashion-MNIST (Zalando Research)",
}
# Of the packed files, as published; images and labels of train, then of t10k.
_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
# Of the files unpacked.
_BYTES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}


@dataclasses.dataclass(frozen=True)
class IdxImages:
    """Which digit, or which piece of clothing.

    Attributes:
      path: the folder of the four IDX files, packed (.gz) or not.
      name: mnist or fashion_mnist; says which checksums are published.
      vocab_size: at least 256, the values of a pixel.
      input_dim: 1 = pixels as numbers from 0 to 1; null = as tokens 0 to 255.
      n_classes: 10, kinds of images.
      seq_len: pixels of an image.
      permutation: null = row after row; random = the same random order for all images; or
        bit_reversal.
      permutation_seed: of the random order.
      valid_fraction: share of the training images to choose by.
      split_seed: which of them.
      official: files must have the published sizes and checksums; false = any of this format.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    name: str = "mnist"
    vocab_size: int = PIXEL_VALUES
    input_dim: int | None = 1
    n_classes: int = _CLASSES
    seq_len: int = 784
    permutation: str | None = None
    permutation_seed: int = 92916
    valid_fraction: float = 0.1
    split_seed: int = 42
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        if self.name not in _TITLES:
            raise ConfigError(f"data.name={self.name}; it must be {' or '.join(_TITLES)}")
        if self.permutation not in (None, "random", "bit_reversal"):
            raise ConfigError(
                f"data.permutation={self.permutation}; it must be null, random or bit_reversal"
            )
        check_pixels(self.vocab_size, self.input_dim, 1)
        check_share("valid_fraction", self.valid_fraction)
        at_least("n_classes", self.n_classes, _CLASSES)
        at_least("seq_len", self.seq_len, 1)

    def source(self, split: Split) -> Source:
        return Stored(self._batch, self._rows[known_split(split)], self.seed)

    def fingerprint(self) -> str:
        settings = files.settings_of(self)
        settings["content"] = files.digest_of([self._content.pixels, self._content.labels])
        return fingerprint_of("idx_images", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _content(self) -> "_Content":
        (train, train_labels), (test, test_labels) = self._pair("train"), self._pair("t10k")
        return _Content(
            np.concatenate([train, test]), np.concatenate([train_labels, test_labels]), len(train)
        )

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        n, total = self._content.n_train, len(self._content.labels)
        train, valid = split_rows(n, (n - round(n * self.valid_fraction),), self.split_seed)
        return {"train": train, "valid": valid, "test": np.arange(n, total)}

    @functools.cached_property
    def _places(self) -> np.ndarray | slice:
        if self.permutation is None:
            return slice(None)
        if self.permutation == "random":
            # A frozen generator of numpy: the same order on every machine, and as others have it.
            return np.random.RandomState(self.permutation_seed).permutation(self.seq_len)
        return bit_reversal(self.seq_len)

    def _batch(self, rows: np.ndarray) -> Batch:
        chosen = self._content.pixels[rows][:, self._places, None]
        label = self._content.labels[rows]
        return {**pixel_rows(chosen, self.input_dim, 0.0, 1.0), "label": label}

    @property
    def _origin(self) -> Origin:
        return Origin(
            _TITLES[self.name],
            ", ".join(f"{name}.gz" for name in _BYTES),
            "the folder that holds these four files, packed or not",
        )

    def _pair(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        file, pixels = self._read(f"{part}-images-idx3-ubyte", 3)
        if pixels[0].size != self.seq_len:
            raise DataError(
                f"{file}: images of {pixels.shape[1]} x {pixels.shape[2]} pixels; data.seq_len="
                f"{self.seq_len} must be {pixels[0].size}"
            )
        labels_file, labels = self._read(f"{part}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels):
            raise DataError(
                f"{file} has {len(pixels):,} images, {labels_file} {len(labels):,} labels: they do "
                f"not belong together. {self._origin.get}"
            )
        if labels.max() >= self.n_classes:
            raise self._origin.damaged(labels_file, f"has a label {labels.max()}")
        return pixels.reshape(len(pixels), -1), labels.astype(np.int32)

    def _read(self, name: str, dimensions: int) -> tuple[pathlib.Path, np.ndarray]:
        origin = self._origin
        file = origin.find(origin.folder(self.path), name, f"{name}.gz")
        if self.official and file.suffix == ".gz":
            origin.check_md5(file, _MD5[self.name][name])
        elif self.official:
            origin.check_size(file, _BYTES[name])
        return file, read_idx(origin, file, dimensions)


class _Content(NamedTuple):
    pixels: np.ndarray  # uint8 [n t], of training, then of the test
    labels: np.ndarray  # int32 [n]
    n_train: int


def bit_reversal(n: int) -> np.ndarray:
    """Returns the numbers 0 .. n - 1 in the order of their bits read backwards."""
    width = max(1, (n - 1).bit_length())
    number, backwards = np.arange(1 << width), np.zeros(1 << width, np.int64)
    for bit in range(width):
        backwards |= ((number >> bit) & 1) << (width - 1 - bit)
    return backwards[backwards < n]
