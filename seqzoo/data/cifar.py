"""CIFAR-10 from its binary version, an image as a sequence of pixels: sCIFAR, and LRA's Image task.

Source of the protocol: state-spaces/s4, src/dataloaders/basic.py (numbers, 45,000 / 5,000 / 10,000
images) and google-research/long-range-arena (grey pixels as tokens 0 to 255). Grey is made as the
Pillow library makes it: (19595 R + 38470 G + 7471 B + 32768) // 65536.
Differs from source: which 5,000 are held out (ours by a permutation of our own, seed 42 as there).
"""

import dataclasses
import functools

import numpy as np

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.source import Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import (
    PIXEL_VALUES,
    Stored,
    check_pixels,
    check_share,
    pixel_rows,
    split_rows,
)
from seqzoo.errors import ConfigError

_VERSION = 1
_CLASSES = 10
_PIXELS = 32 * 32
_RECORD = 1 + 3 * _PIXELS  # the label, then all of red, of green, of blue
_BYTES = 10_000 * _RECORD
_FILES = {
    "train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
    "test": ("test_batch.bin",),
}
_ORIGIN = Origin(
    "CIFAR-10 (Krizhevsky), binary version",
    "cifar-10-binary.tar.gz, md5 c32a1d4ab5d03f1284b67883e8d87530, and unpack it",
    "its folder cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin and test_batch.bin",
)
_CHANNELS = {"rgb": 3, "grey": 1}
_MEAN = {"rgb": np.array([0.4914, 0.4822, 0.4465]), "grey": 122.6 / 255}
_STD = {"rgb": np.array([0.247, 0.243, 0.261]), "grey": 61.0 / 255}


@dataclasses.dataclass(frozen=True)
class CIFAR10:
    """Which of ten things is on the picture.

    Attributes:
      path: the folder cifar-10-batches-bin.
      colour: rgb or grey.
      vocab_size: at least 256, the values of a pixel.
      input_dim: 3 (rgb) or 1 (grey) = normalised numbers; null = tokens 0 to 255.
      n_classes: 10, kinds of images.
      seq_len: 1024; of rgb as tokens 3072, the three values of a pixel one after the other.
      valid_fraction: share of the training images to choose by.
      split_seed: which of them.
      official: files must have the published sizes; false = any of this format.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    colour: str = "rgb"
    vocab_size: int = PIXEL_VALUES
    input_dim: int | None = 3
    n_classes: int = _CLASSES
    seq_len: int = _PIXELS
    valid_fraction: float = 0.1
    split_seed: int = 42
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        if self.colour not in _CHANNELS:
            raise ConfigError(f"data.colour={self.colour}; it must be rgb or grey")
        channels = _CHANNELS[self.colour]
        check_pixels(self.vocab_size, self.input_dim, channels)
        check_share("valid_fraction", self.valid_fraction)
        at_least("n_classes", self.n_classes, _CLASSES)
        length = _PIXELS * (channels if self.input_dim is None else 1)
        if self.seq_len != length:
            raise ConfigError(
                f"data.seq_len={self.seq_len}; with data.colour={self.colour} and data.input_dim="
                f"{'null' if self.input_dim is None else self.input_dim} it must be {length}"
            )

    def source(self, split: Split) -> Source:
        return Stored(self._batch, self._rows[known_split(split)], self.seed)

    def fingerprint(self) -> str:
        settings = files.settings_of(self)
        settings["content"] = files.digest_of(self._records.values())
        return fingerprint_of("cifar10", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _records(self) -> dict[str, np.ndarray]:
        return {
            part: np.concatenate([self._read(name) for name in names])
            for part, names in _FILES.items()
        }

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        n, n_test = (len(self._records[part]) for part in _FILES)
        train, valid = split_rows(n, (n - round(n * self.valid_fraction),), self.split_seed)
        return {"train": train, "valid": valid, "test": n + np.arange(n_test)}

    def _batch(self, rows: np.ndarray) -> Batch:
        n = len(self._records["train"])
        is_test = len(rows) > 0 and rows[0] >= n  # rows of one split come together
        records = self._records["test"][rows - n] if is_test else self._records["train"][rows]
        pixels = records[:, 1:].reshape(-1, 3, _PIXELS).transpose(0, 2, 1)
        if self.colour == "grey":
            pixels = grey(pixels)
        scaled = pixel_rows(pixels, self.input_dim, _MEAN[self.colour], _STD[self.colour])
        return {**scaled, "label": records[:, 0].astype(np.int32)}

    def _read(self, name: str) -> np.ndarray:
        file = _ORIGIN.find(_ORIGIN.folder(self.path), name)
        if self.official:
            _ORIGIN.check_size(file, _BYTES)
        content = np.fromfile(file, np.uint8)
        if not len(content) or len(content) % _RECORD:
            raise _ORIGIN.damaged(
                file, f"has {len(content):,} bytes, no whole number of records of {_RECORD}"
            )
        records = content.reshape(-1, _RECORD)
        if records[:, 0].max() >= self.n_classes:
            raise _ORIGIN.damaged(file, f"has a label {records[:, 0].max()}")
        return records


def grey(pixels: np.ndarray) -> np.ndarray:
    """Makes uint8 [b t 1] of red, green and blue, uint8 [b t 3]."""
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 32768) >> 16).astype(np.uint8)[..., None]
