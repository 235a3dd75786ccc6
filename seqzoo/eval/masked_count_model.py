"""Guessing hidden bytes by counts: what an encoder must beat to have learned more than neighbours.

The counts are of the training text, every byte with the true byte to its left and right; they are
smoothed as in seqzoo.eval.count_model. Where a neighbour is hidden too, the counts are told it all
the same, so they know more there than an encoder does.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from seqzoo.data.masked import Masked
from seqzoo.data.source import IGNORE, Split
from seqzoo.eval.count_model import SYMBOLS, WordModel

_ROWS = 512  # at a time


def masked_baselines(data: Masked, split: Split = "test") -> list[dict[str, object]]:
    """Scores the hidden bytes of a split.

    Args:
        data: masked text; tokens are bytes.
        split: which rows; all of them are scored.

    Returns:
        Rows with baseline, bits_per_masked_token and accuracy. The last one is also told what is
        shown at the place itself: what is no mask is the byte itself in as many cases as `data`
        says, and else any byte.
    """
    documents = data.text.documents("train")
    words = _words(documents)
    models = {
        "unigram": (WordModel(words & np.uint64(0xFF), 0), 0xFF),
        "left neighbour": (WordModel(words & np.uint64(0xFFFF), 1), 0xFFFF),
        "left and right neighbour": (WordModel(words, 2), 0xFFFFFF),
    }
    names = (*models, _SHOWN)
    bits, right, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), 0
    for context, target, shown in _asked(data, split):
        count += len(target)
        for name, (model, mask) in models.items():
            table = _table(model, context & np.uint64(mask))
            _add(name, table, target, bits, right)
        _add(_SHOWN, _told(table, shown, data), target, bits, right)
    return [
        {
            "baseline": name,
            "bits_per_masked_token": bits[name] / count,
            "accuracy": right[name] / count,
        }
        for name in names
    ]


_SHOWN = "left and right neighbour, and what is shown"


def _words(documents: Sequence[bytes]) -> np.ndarray:
    """Every byte of a text with its neighbours: right << 16 | left << 8 | byte, uint64.

    Between documents stands byte 0, as in the rows; it is counted too.
    """
    text = np.frombuffer(b"\0" + b"\0".join(documents) + b"\0", np.uint8).astype(np.uint64)
    left = np.concatenate([text[:1] * np.uint64(0), text[:-1]])
    right = np.concatenate([text[1:], text[:1] * np.uint64(0)])
    return (right << np.uint64(16)) | (left << np.uint64(8)) | text


def _asked(data: Masked, split: Split) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (context with byte 0, what stood there, what is shown) of hidden bytes, [n] each."""
    source = data.source(split)
    for start in range(0, len(source), _ROWS):
        index = np.arange(start, min(start + _ROWS, len(source)))
        hidden = source.batch(index)
        true = np.where(hidden["targets"] == IGNORE, hidden["tokens"], hidden["targets"])
        true = np.pad(true.astype(np.uint64), ((0, 0), (1, 1)))  # beyond a row: 0
        row, place = np.nonzero(hidden["targets"] != IGNORE)
        context = (true[row, place + 2] << np.uint64(16)) | (true[row, place] << np.uint64(8))
        yield context, hidden["targets"][row, place], hidden["tokens"][row, place]


def _table(model: WordModel, context: np.ndarray) -> np.ndarray:
    """The probability of each byte after each context, float64 [n 256]."""
    known, back = np.unique(context, return_inverse=True)
    words = known[:, None] | np.arange(SYMBOLS, dtype=np.uint64)
    return model.probabilities(words.ravel()).reshape(words.shape)[back]


def _told(table: np.ndarray, shown: np.ndarray, data: Masked) -> np.ndarray:
    """The same once what is shown is known, by Bayes' rule."""
    kept = 1 - data.mask_share - data.random_share
    likelihood = np.full(table.shape, data.random_share / data.text.vocab_size)
    visible = np.flatnonzero(shown != data.mask_token)
    likelihood[visible, shown[visible]] += kept
    likelihood[shown == data.mask_token] = 1.0
    joint = table * likelihood
    return joint / joint.sum(1, keepdims=True)


def _add(name, table, target, bits, right) -> None:
    bits[name] -= float(np.log2(table[np.arange(len(target)), target]).sum())
    right[name] += int((table.argmax(1) == target).sum())
