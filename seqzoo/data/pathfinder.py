"""Do two dots lie on one path? Pathfinder and Path-X of the Long Range Arena, image by image.

Source of the protocol: state-spaces/s4, src/dataloaders/lra.py: the hardest level alone, 80 / 10 /
10 % at random, grey pixels as (x - 0.5) / 0.5. Metadata are lines of text in files named .npy.
Differs from source: which rows are held out (ours by a permutation of our own, seed 42 as there).
"""

import dataclasses
import functools
import hashlib
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.source import SPLITS, Batch, Source, Split, at_least, fingerprint_of, known_split
from seqzoo.data.stored import PIXEL_VALUES, Stored, check_pixels, pixel_rows, split_rows
from seqzoo.data.text import check_fractions
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
_LEVELS = ("curv_contour_length_14", "curv_contour_length_9", "curv_baseline")
_IMAGES = 200_000
# Empty in the published archive, at 32 x 32.
_EMPTY = {(32, "curv_baseline/imgs/0/sample_172.png")}
_FOLDER, _FILE, _LABEL = 0, 1, 3  # words of a line of metadata


@dataclasses.dataclass(frozen=True)
class Pathfinder:
    """Is there a path between the two dots?

    Attributes:
      path: the folder pathfinder32 (64, 128, 256) of the release.
      level: which of its folders: curv_contour_length_14, the hardest, is the task's.
      vocab_size: at least 256, the values of a pixel.
      input_dim: 1 = normalised numbers; null = tokens 0 to 255.
      n_classes: 2: 1 = there is one.
      seq_len: pixels of an image: 1024 = Pathfinder, 16384 = Path-X.
      valid_fraction: share of the images to choose by.
      test_fraction: share to report on.
      split_seed: which they are.
      official: there must be 200,000 images; false = any number.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    level: str = _LEVELS[0]
    vocab_size: int = PIXEL_VALUES
    input_dim: int | None = 1
    n_classes: int = 2
    seq_len: int = 1024
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 42
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        if self.level not in _LEVELS:
            raise ConfigError(f"data.level={self.level}; it must be one of {', '.join(_LEVELS)}")
        check_pixels(self.vocab_size, self.input_dim, 1)
        check_fractions(self.valid_fraction, self.test_fraction)
        at_least("n_classes", self.n_classes, 2)
        if self.seq_len < 1 or self._side**2 != self.seq_len:
            raise ConfigError(
                f"data.seq_len={self.seq_len}; it must be a square, as 32 x 32 = 1024"
            )

    def source(self, split: Split) -> Source:
        return Stored(self._batch, self._rows[known_split(split)], self.seed)

    def fingerprint(self) -> str:
        """Knows the list of images and their labels; not what is in each of them."""
        settings = files.settings_of(self)
        names, labels = self._listed
        listed = hashlib.sha256("\n".join(names).encode()).hexdigest()
        settings["content"] = [listed, files.digest_of([labels])]
        return fingerprint_of("pathfinder", _VERSION, settings)

    @property
    def _side(self) -> int:
        return round(self.seq_len**0.5)

    @property
    def _origin(self) -> Origin:
        return Origin(
            "the Long Range Arena (Google Research)",
            "lra_release.gz (release 1.0), and unpack it",
            f"its folder pathfinder{self._side} with {self.level}/imgs and {self.level}/metadata",
        )

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _listed(self) -> tuple[list[str], np.ndarray]:
        metadata = self._origin.folder(self.path, f"{self.level}/metadata")
        names, labels = [], []
        for file in sorted(metadata.glob("*.npy"), key=_number):
            for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1):
                words = line.split()
                if len(words) <= _LABEL or words[_LABEL] not in ("0", "1"):
                    raise self._origin.damaged(
                        file, f"has a line {number} that is not folder, file, number, label, ..."
                    )
                name = f"{self.level}/{words[_FOLDER]}/{words[_FILE]}"
                if (self._side, name) not in _EMPTY:
                    names.append(name)
                    labels.append(int(words[_LABEL]))
        self._origin.check_some(metadata, "list of images", len(names))
        if self.official:
            empty = sum(side == self._side and name.startswith(self.level) for side, name in _EMPTY)
            self._origin.check_count(f"{metadata}, images", len(names), _IMAGES - empty)
        return names, np.array(labels, np.int32)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        n = len(self._listed[0])
        valid, test = int(n * self.valid_fraction), int(n * self.test_fraction)
        parts = split_rows(n, (n - valid - test, valid), self.split_seed)
        if not all(map(len, parts)):
            raise DataError(f"data.path={self.path}: {n} images are too few for three splits")
        return dict(zip(SPLITS, parts, strict=True))

    def _batch(self, rows: np.ndarray) -> Batch:
        names, labels = self._listed
        pixels = np.stack([self._image(names[row]) for row in rows])
        scaled = pixel_rows(pixels[..., None], self.input_dim, 0.5, 0.5)
        return {**scaled, "label": labels[rows]}

    def _image(self, name: str) -> np.ndarray:
        folder = pathlib.Path(self.path).expanduser()
        file = self._origin.find(folder, name)
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            what = "is empty" if not file.stat().st_size else f"is no readable image ({error})"
            raise self._origin.damaged(file, what) from error
        if pixels.size != self.seq_len:
            raise DataError(
                f"{file} has {pixels.shape[0]} x {pixels.shape[1]} pixels; data.seq_len="
                f"{self.seq_len} must be {pixels.size}"
            )
        return pixels.reshape(-1)


def _number(file: pathlib.Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdigit() else -1, file.stem)
