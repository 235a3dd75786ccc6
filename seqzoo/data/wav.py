"""Sound files: one channel of 16 bits, the whole of it or its beginning."""

import pathlib
import wave

import numpy as np

from seqzoo.data.files import Origin

_BYTES = 2  # per sample


def read_wav(origin: Origin, file: pathlib.Path, rate: int, most: int) -> tuple[np.ndarray, int]:
    """Reads a .wav file.

    Args:
      origin: where it comes from, for the message if it cannot be read.
      file: the file.
      rate: samples a second that it must have.
      most: samples to read; 0 = none, only how many there are.

    Returns:
      samples int16 [t], and how many the file has.
    """
    try:
        with wave.open(str(file), "rb") as clip:
            kind = (clip.getnchannels(), clip.getsampwidth(), clip.getframerate())
            total = clip.getnframes()
            content = clip.readframes(most)
    except (OSError, EOFError, wave.Error) as error:
        raise origin.damaged(file, f"is no readable wav file ({error})") from error
    if kind != (1, _BYTES, rate):
        raise origin.damaged(
            file,
            f"has {kind[0]} channels of {kind[1]} bytes at {kind[2]} Hz where 1 channel of "
            f"{_BYTES} bytes at {rate} Hz is expected",
        )
    if len(content) != _BYTES * min(total, most):
        raise origin.damaged(file, f"ends before the {total:,} samples that it says it has")
    return np.frombuffer(content, "<i2"), total
