"""enwik8: the first 100,000,000 bytes of an English Wikipedia of 2006, the next byte of each.

The usual cut: 90,000,000 bytes to train on, 5,000,000 to choose by, 5,000,000 to report on, in the
order of the file. Bits per byte are nats / ln 2: a token is a byte, nothing is left out.
"""

import dataclasses
import functools

import numpy as np

from seqzoo.data import files
from seqzoo.data.files import Origin
from seqzoo.data.source import Source, Split, fingerprint_of, known_split
from seqzoo.data.stdlib import BYTE_VALUES, check_bytes
from seqzoo.data.windows import Windows
from seqzoo.errors import DataError

_VERSION = 1
_BYTES = 100_000_000
_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
_CUTS = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}
_ORIGIN = Origin(
    "enwik8 (Large Text Compression Benchmark, Mahoney)",
    f"enwik8.zip, and unpack it: {_BYTES:,} bytes, md5 {_MD5}",
    "its file enwik8",
)


@dataclasses.dataclass(frozen=True)
class Enwik8:
    """Next byte.

    Attributes:
      path: the file enwik8, unpacked.
      vocab_size: at least 256, the values of a byte.
      seq_len: bytes per row.
      eval_seq_len: bytes per row of held-out text; null = seq_len. Each row starts without history,
        so longer rows score better.
      official: the file must have the published size and checksum; false = any file, cut likewise.
      seed: of order and cuts, apart from trainer.seed.
    """

    path: str
    vocab_size: int = BYTE_VALUES
    seq_len: int = 2048
    eval_seq_len: int | None = None
    official: bool = True
    seed: int = 0

    group_names = ()
    bytes_per_token = 1.0
    asks_everywhere = True

    def __post_init__(self) -> None:
        check_bytes(self.vocab_size, self.seq_len, self.eval_seq_len)

    def source(self, split: Split) -> Source:
        part = self._parts[known_split(split)]
        length = self.seq_len if split == "train" else self.eval_seq_len or self.seq_len

        def read(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
            return part[offset], part[offset + 1], None

        return Windows(read, len(part) - 1, length, split, self.seed, segments=False)

    def fingerprint(self) -> str:
        settings = files.settings_of(self)
        settings["content"] = files.digest_of(self._parts.values())
        return fingerprint_of("enwik8", _VERSION, settings)

    # Read once: what the run began with is what it goes on with.
    @functools.cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        file = _ORIGIN.file(self.path)
        if self.official:
            _ORIGIN.check_size(file, _BYTES)
            _ORIGIN.check_md5(file, _MD5)
        content = np.fromfile(file, np.uint8)
        n = len(content)
        parts = {split: content[round(n * a) : round(n * b)] for split, (a, b) in _CUTS.items()}
        if min(map(len, parts.values())) < 2:
            raise DataError(f"{file} has {n} bytes, too few to hold anything out")
        return parts
