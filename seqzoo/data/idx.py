"""IDX files, the format of MNIST: zeros, the type, how many sizes, the sizes, the numbers."""

import gzip
import pathlib
import zlib

import numpy as np

from seqzoo.data.files import Origin

_UNSIGNED_BYTES = 8  # the type that images and labels have


def read_idx(origin: Origin, file: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads a file of bytes, packed (.gz) or not.

    Args:
      origin: where it comes from, for the message if it cannot be read.
      file: the file.
      dimensions: how many sizes it must have.

    Returns:
      uint8, as many axes as that.
    """
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise origin.damaged(file, f"cannot be unpacked ({error})") from error
    header, expected = 4 + 4 * dimensions, bytes([0, 0, _UNSIGNED_BYTES, dimensions])
    if content[:4] != expected or len(content) < header:
        found = content[:4].hex(" ")
        raise origin.damaged(file, f"begins with {found} where {expected.hex(' ')} is expected")
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(np.int64)
    if len(content) - header != shape.prod() or not shape.prod():
        sizes = " x ".join(map(str, shape))
        raise origin.damaged(
            file, f"holds {len(content) - header:,} bytes behind a header that says {sizes}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
