"""What a learned model must beat: counting and compressing text, guessing at recall and labels.

python -m seqzoo.eval.baselines data=stdlib_text
python -m seqzoo.eval.baselines data=text data.path=FILE
python -m seqzoo.eval.baselines data=mqar data.num_kv_pairs=8
python -m seqzoo.eval.baselines data=listops
python -m seqzoo.eval.baselines data=masked_stdlib_text
"""

import argparse
import gzip
import lzma
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.data.listops import ListOps
from seqzoo.data.masked import Masked
from seqzoo.data.mqar import MQAR
from seqzoo.data.source import ENDLESS, IGNORE, Dataset, Split
from seqzoo.errors import ConfigError, SeqzooError
from seqzoo.eval.count_model import CountModel
from seqzoo.eval.masked_count_model import masked_baselines

Row = dict[str, Any]

_DICTIONARY_BYTES = 2**27  # of xz: as much as it may look back over the training text
_ROWS = 500  # of recall or with labels, judged at a time


class Documents(Protocol):
    """A data set of bytes."""

    def documents(self, split: Split) -> tuple[bytes, ...]: ...


def text_baselines(data: Documents, split: Split = "test", *, order: int = 6) -> list[Row]:
    """Scores held-out text by means that learn nothing but counts and repetitions.

    All are bits per byte of the same sum: the bytes of the split, with one more symbol for the end
    of each document, as the tokens of seqzoo.data.stdlib and seqzoo.data.text are.

    Args:
      data: where the documents come from.
      split: which of them to score.
      order: bytes of context of the count model.

    Returns:
      Rows with baseline, bits_per_byte and seconds.
    """
    train, held_out = data.documents("train"), data.documents(split)
    joined = b"".join(document + b"\0" for document in held_out)
    known = b"".join(document + b"\0" for document in train)

    def count() -> float:
        return float(CountModel(train, order).bits(held_out).sum())

    ways: dict[str, Callable[[], float]] = {
        "gzip -9": lambda: 8 * len(gzip.compress(joined, 9, mtime=0)),
        f"order-{order} count model of the training text": count,
        "xz -9e": lambda: 8 * _xz(joined),
        "xz -9e behind the training text": lambda: 8 * (_xz(known + joined) - _xz(known)),
    }
    return [_timed(name, bits, len(joined)) for name, bits in ways.items()]


def recall_baselines(data: MQAR, split: Split = "test", *, samples: int = 3000) -> list[Row]:
    """Scores MQAR by rules instead of learning, on rows of the data set itself.

    Where noise fills a row, a token of noise may equal a key, and what follows it then looks like
    another value of that key. A rule that tells occurrences of a key apart by nothing but what
    follows them (a value, by its number) has to choose among these: the noise ceiling.

    Args:
      data: an MQAR data set.
      split: which rows.
      samples: how many of them at most.

    Returns:
      Rows with baseline and accuracy: the mean over rows of the fraction of answers right.
    """
    source = data.source(split)
    total = min(samples, len(source))
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, total, _ROWS):
        batch = source.batch(np.arange(start, min(start + _ROWS, total)))
        for name, right in _recall_rules(batch["tokens"], batch["targets"], data).items():
            found.setdefault(name, []).append(right)
    return [
        {"baseline": name, "accuracy": float(np.concatenate(parts).mean())}
        for name, parts in found.items()
    ]


def label_baselines(
    data: Dataset, split: Split = "test", *, samples: int = 20_000, first_token: bool = False
) -> list[Row]:
    """Scores the commonest label: of all training rows, and of those with the same first token.

    Args:
      data: a data set with labels.
      split: which rows to score.
      samples: how many at most, of training and to score.
      first_token: also the rule that reads only the first token: in ListOps, the first operator.

    Returns:
      Rows with baseline and accuracy.
    """
    (label, first), (asked, read) = (_labels(data, s, samples) for s in ("train", split))
    commonest = np.bincount(label).argmax()
    rows = [{"baseline": "the commonest label", "accuracy": float((asked == commonest).mean())}]
    if first_token:
        counts = np.zeros((data.vocab_size, data.n_classes), np.int64)
        np.add.at(counts, (first, label), 1)
        # A first token that training never showed gets the commonest label.
        guess = np.where(counts.any(axis=1), counts.argmax(axis=1), commonest)
        right = float((guess[read] == asked).mean())
        rows.append({"baseline": "the commonest label behind the first token", "accuracy": right})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns rows as text, a column per key."""
    names = list(rows[0])
    cells = [names, *([_shown(name, row[name]) for name in names] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(names))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str]) -> int:
    """Prints the baselines of a data set that is named as on the command line of train."""
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.eval.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of seqzoo train")
    overrides = parser.parse_args(argv).overrides
    try:
        data = build(compose(overrides).data)
        if callable(getattr(data, "documents", None)):
            sizes = {s: sum(map(len, data.documents(s))) for s in ("train", "valid", "test")}
            print(", ".join(f"{split} {size:,} bytes" for split, size in sizes.items()))
            rows = text_baselines(data)
        elif isinstance(data, MQAR):
            rows = recall_baselines(data)
        elif isinstance(data, Masked) and hasattr(data.text, "documents"):
            rows = masked_baselines(data)
        elif hasattr(data, "n_classes"):
            rows = label_baselines(data, first_token=isinstance(data, ListOps))
        else:
            raise ConfigError(
                f"no baselines for {type(data).__name__}, only for text, MQAR and labelled rows"
            )
    except SeqzooError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{data.fingerprint()}, test split\n{table(rows)}")
    return 0


def _timed(name: str, bits: Callable[[], float], symbols: int) -> Row:
    started = time.perf_counter()
    per_byte = bits() / symbols
    return {
        "baseline": name,
        "bits_per_byte": per_byte,
        "seconds": time.perf_counter() - started,
    }


def _xz(content: bytes) -> int:
    """Bytes after LZMA at its best, without the file format's header."""
    method = {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": _DICTIONARY_BYTES,
    }
    return len(lzma.compress(content, format=lzma.FORMAT_RAW, filters=[method]))


def _labels(data: Dataset, split: Split, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and first tokens (0 where there are none) of at most so many rows, spread evenly."""
    source = data.source(split)
    total = min(samples, len(source))
    # Rows of an endless source are all alike: the first will do.
    stride = 1 if len(source) >= ENDLESS else len(source) // total
    labels, firsts = [], []
    for start in range(0, total, _ROWS):
        batch = source.batch(np.arange(start, min(start + _ROWS, total)) * stride)
        labels.append(batch["label"])
        tokens = batch["tokens"][:, 0] if "tokens" in batch else np.zeros_like(batch["label"])
        firsts.append(tokens)
    return np.concatenate(labels), np.concatenate(firsts)


def _recall_rules(tokens: np.ndarray, targets: np.ndarray, data: MQAR) -> dict[str, np.ndarray]:
    """Returns per rule the fraction of each row's answers that it is expected to get right, [b]."""
    b, length = tokens.shape
    pairs, half = data.num_kv_pairs, data.vocab_size // 2
    row, place = np.nonzero(targets != IGNORE)
    asked, answer = tokens[row, place], targets[row, place]
    # What follows each earlier occurrence of the key that is asked, if it is a value by its number.
    follows = tokens[row, 1:]
    earlier = np.arange(1, length)[None] < place[:, None]
    option = (tokens[row, :-1] == asked[:, None]) & earlier & (follows >= half)
    right = option & (follows == answer[:, None])
    latest = length - 2 - option[:, ::-1].argmax(1)
    context = tokens[:, 1 : 2 * pairs : 2][row]
    rules = {
        "noise ceiling: any value that followed the key": right.sum(1) / option.sum(1),
        "the value that followed the key last": right[np.arange(len(row)), latest],
        "guessing a value out of the context": (context == answer[:, None]).mean(1),
        "guessing a value": np.full(len(row), 1 / (data.vocab_size - half)),
    }
    return {
        name: np.bincount(row, weights=share, minlength=b) / pairs for name, share in rules.items()
    }


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
