"""Spoken words as sound, 16,000 samples a second: Speech Commands v0.02, ten words or all 35.

Source of the protocol: state-spaces/s4, src/dataloaders/datasets/sc.py, as LSSL and S4 have it: ten
words, clips of exactly 16,000 samples, 70 / 15 / 15 % by class; or 35 words, the published lists,
shorter clips filled up with zeros. Sound is normalised by mean and deviation of the training split.
Differs from source: which clips are held out of the ten words (ours by a permutation of our own);
nothing is added to the deviation.
"""

import dataclasses
import functools
import hashlib
import pathlib

import numpy as np

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.source import (
    SPLITS,
    Batch,
    Source,
    Split,
    at_least,
    fingerprint_of,
    known_split,
)
from seqzoo.data.stored import Stored, split_rows
from seqzoo.data.wav import read_wav
from seqzoo.errors import ConfigError, DataError

_VERSION = 1
_TEN = "yes no up down left right on off stop go"
_ALL = (
    "bed cat down five forward go house left marvin no on right sheila tree up visual yes backward "
    "bird dog eight follow four happy learn nine off one seven six stop three two wow zero"
)
_WORDS = {10: tuple(_TEN.split()), 35: tuple(_ALL.split())}
_CLIPS = {10: {"all": 34_975}, 35: {"train": 84_843, "valid": 9_981, "test": 11_005}}
_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
_SHARES = (0.7, 0.15)  # of the ten words; the rest is for the test
_RATE = 16_000
_FULL_SCALE = 2.0**15
_ORIGIN = Origin(
    "Speech Commands v0.02 (Google, Warden 2018)",
    "speech_commands_v0.02.tar.gz, sha256 "
    "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58, and unpack it into a folder",
    "that folder, with a folder per word, validation_list.txt and testing_list.txt",
)


@dataclasses.dataclass(frozen=True)
class SpeechCommands:
    """Which word is said?

    Attributes:
      path: the folder with a folder of .wav files per word.
      n_classes: 10 = SC10, ten words, clips of one second alone; 35 = SC35, all words, shorter
        clips filled up.
      vocab_size: of no matter, rows are sound.
      input_dim: 1, a number per sample.
      seq_len: samples of a clip in training: 16000.
      eval_stride: of valid and test every n-th sample alone: 2 = 8 kHz, a test without training.
      segment_ids: mark what was filled up as padding; false = it counts as silence, as published.
      mean: of the training split, in parts of full scale; null = measured, a look at all of it.
      std: see mean.
      split_seed: which clips of the ten words are held out.
      official: there must be as many clips as published; false = any number.
      seed: of the order of training, apart from trainer.seed.
    """

    path: str
    n_classes: int = 10
    vocab_size: int = 1
    input_dim: int = 1
    seq_len: int = _RATE
    eval_stride: int = 1
    segment_ids: bool = False
    mean: float | None = None
    std: float | None = None
    split_seed: int = 0
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = None

    def __post_init__(self) -> None:
        if self.n_classes not in _WORDS:
            raise ConfigError(f"data.n_classes={self.n_classes}; it must be 10 (SC10) or 35 (SC35)")
        if self.input_dim != 1:
            raise ConfigError(f"data.input_dim={self.input_dim}; sound is 1 number per sample")
        at_least("seq_len", self.seq_len, 1)
        at_least("eval_stride", self.eval_stride, 1)
        if (self.mean is None) != (self.std is None):
            raise ConfigError("data.mean and data.std: give both or none")
        if self.std is not None and not self.std > 0:
            raise ConfigError(f"data.std={self.std}; it must be above 0")

    def source(self, split: Split) -> Source:
        rows = self._rows[known_split(split)]
        stride = 1 if split == "train" else self.eval_stride
        return Stored(functools.partial(self._batch, stride=stride), rows, self.seed)

    def fingerprint(self) -> str:
        """Knows the list of clips and their splits; not the sound of each of them."""
        settings = files.settings_of(self)
        names = "\n".join(self._clips[0]).encode()
        settings["content"] = hashlib.sha256(names).hexdigest()
        settings["rows"] = files.digest_of(self._rows.values())
        return fingerprint_of("speech_commands", _VERSION, settings)

    # Looked through once: what the run began with is what it goes on with.
    @functools.cached_property
    def _clips(self) -> tuple[list[str], np.ndarray]:
        """Names of clips, WORD/FILE, and their labels."""
        names, labels = [], []
        for label, word in enumerate(_WORDS[self.n_classes]):
            folder = _ORIGIN.folder(self.path, word)
            found = [f"{word}/{file.name}" for file in sorted(folder.glob("*.wav"))]
            if self.n_classes == 10:
                found = [name for name in found if self._read(name, 0)[1] == self.seq_len]
            _ORIGIN.check_some(folder, f"clips (*.wav) of {self.seq_len} samples", len(found))
            names += found
            labels += [label] * len(found)
        return names, np.array(labels, np.int32)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        names, labels = self._clips
        rows = self._listed(names) if self.n_classes == 35 else self._stratified(labels)
        if self.official:
            counted = {"all": len(names), **{split: len(rows[split]) for split in SPLITS}}
            for part, published in _CLIPS[self.n_classes].items():
                _ORIGIN.check_count(
                    f"data.path={self.path}, clips ({part})", counted[part], published
                )
        for split in SPLITS:
            if not len(rows[split]):
                raise DataError(f"data.path={self.path}: no clips are left for {split}")
        return rows

    def _stratified(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for label in range(self.n_classes):
            of_class = np.flatnonzero(labels == label)
            sizes = tuple(round(len(of_class) * share) for share in _SHARES)
            dealt = split_rows(len(of_class), sizes, self.split_seed * _RATE + label)
            for split, part in zip(SPLITS, dealt, strict=True):
                parts[split].append(of_class[part])
        return {split: np.concatenate(part) for split, part in parts.items()}

    def _listed(self, names: list[str]) -> dict[str, np.ndarray]:
        folder, split_of = _ORIGIN.folder(self.path), {}
        for split, name in _LISTS.items():
            for line in _ORIGIN.find(folder, name).read_text("utf-8").split():
                split_of[line] = split
        where = np.array([SPLITS.index(split_of.get(name, "train")) for name in names])
        return {split: np.flatnonzero(where == n) for n, split in enumerate(SPLITS)}

    @functools.cached_property
    def _scale(self) -> tuple[float, float]:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        count, total, squares = 0, 0, 0  # whole numbers: the order of adding makes no difference
        for row in self._rows["train"]:
            sound = self._sound(self._clips[0][row]).astype(np.int64)
            count += self.seq_len
            total += int(sound.sum())
            squares += int((sound * sound).sum())
        mean = total / count
        return mean / _FULL_SCALE, max(squares / count - mean**2, 1.0) ** 0.5 / _FULL_SCALE

    def _batch(self, rows: np.ndarray, stride: int) -> Batch:
        names, labels = self._clips
        clips = [self._sound(names[row]) for row in rows]
        sound = np.zeros((len(rows), self.seq_len), np.float32)
        for row, clip in enumerate(clips):
            sound[row, : len(clip)] = clip
        mean, std = self._scale
        inputs = ((sound / _FULL_SCALE - mean) / std).astype(np.float32)[:, ::stride, None]
        batch = {"inputs": inputs, "label": labels[rows]}
        if self.segment_ids:
            length = np.array([len(clip) for clip in clips])
            inside = np.arange(self.seq_len) < length[:, None]
            batch["segment_ids"] = inside.astype(np.int32)[:, ::stride]
        return batch

    def _sound(self, name: str) -> np.ndarray:
        """Returns the samples of a clip, int16 [t], t at most seq_len."""
        return self._read(name, self.seq_len)[0]

    def _read(self, name: str, most: int) -> tuple[np.ndarray, int]:
        return read_wav(_ORIGIN, pathlib.Path(self.path).expanduser() / name, _RATE, most)
