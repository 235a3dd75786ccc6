"""The first rows of every generator and split, by hash: data must not change unnoticed.

A change here is a change of every experiment: raise the generator's _VERSION with it.
"""

import hashlib

import numpy as np
import pytest

from seqzoo.data import (
    MQAR,
    SPLITS,
    AssociativeRecall,
    InductionHeads,
    MQARSegments,
    SelectiveCopying,
    Text,
    Tokens,
)

ROWS = 8


def generators(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(n * n % 251 for n in range(4000)))
    np.save(tmp_path / "a.npy", np.arange(4000) ** 2 % 997)
    return {
        "mqar": MQAR(),
        "mqar_big": MQAR(vocab_size=8192, seq_len=256, num_kv_pairs=64),
        "mqar_odd": MQAR(vocab_size=99, seq_len=70, num_kv_pairs=5, random_non_queries=False),
        "mqar_segments": MQARSegments(
            vocab_size=256, train=[[64, 4, 64], [128, 8, 64]], test=[[32, 8, 8]], block=8
        ),
        "selective_copying": SelectiveCopying(),
        "induction_heads": InductionHeads(test_lengths=[64, 128], test_samples=8),
        "associative_recall": AssociativeRecall(),
        "text": Text(path=str(tmp_path / "a.txt"), encoding="bytes", seq_len=64),
        "tokens": Tokens(
            vocab_size=997,
            path=str(tmp_path / "a.npy"),
            seq_len=64,
            valid_fraction=0.15,
            test_fraction=0.15,
        ),
    }


def digest(source):
    """Hashes the first rows of each span, and the first in the order of training."""
    parts = [np.arange(start, min(start + ROWS, stop)) for start, stop in source.spans]
    if len(parts) == 1 or source.block:
        parts.append(source.order(np.arange(ROWS)))
    total = hashlib.sha256()
    for index in parts:
        for name, values in sorted(source.batch(index).items()):
            total.update(f"{name} {values.shape} {values.dtype.str}".encode())
            total.update(np.ascontiguousarray(values))
    return total.hexdigest()[:16]


GOLDEN: dict[str, tuple[str, str, str, str]] = {
    # fingerprint, train, valid, test
    "mqar": ("mqar-v1-70ef5fbfd4f5", "02f917e2681bdde6", "b1d1c955046a6fd0", "d3cf55c9b31c23ea"),
    "mqar_big": (
        "mqar-v1-295cf03a9899",
        "45918806ca4daca7",
        "dabc787fc4068fea",
        "a4784dd3416211d5",
    ),
    "mqar_odd": (
        "mqar-v1-c474ee55926a",
        "402990e0ea42b5ed",
        "38cb0402f1503be2",
        "4772138d48b2d02c",
    ),
    "mqar_segments": (
        "mqar_segments-v1-0e0605e4b629",
        "b40cc47dff96c9f2",
        "e766febac1251c8f",
        "b428a8705345a9b4",
    ),
    "selective_copying": (
        "selective_copying-v1-424a6afd023b",
        "35a94ab44b25f673",
        "2ebd11fca2f25a21",
        "f8e73235b7689fe5",
    ),
    "induction_heads": (
        "induction_heads-v1-4dd0e5d9d60e",
        "8b7420128bdbfa91",
        "ac33d64a907b507d",
        "327e0fcdd5138a84",
    ),
    "associative_recall": (
        "associative_recall-v1-e5d4bcc314da",
        "2032751f19e6075b",
        "f0b35cc9fba6784b",
        "65ef958de86bf54d",
    ),
    "text": ("text-v1-a7dac4408fba", "4c2922210a801470", "a36acf1b86b16434", "19d4c7563baae9f7"),
    "tokens": (
        "tokens-v1-cf86da1270f8",
        "eca9f8b19f6fd01d",
        "c22a226ba4c23bff",
        "3bd6a2f8b48815d9",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_rows_are_those_of_the_table(name, tmp_path):
    data = generators(tmp_path)[name]
    found = (data.fingerprint(), *(digest(data.source(split)) for split in SPLITS))
    assert found == GOLDEN[name]


def test_the_table_is_complete(tmp_path):
    assert set(GOLDEN) == set(generators(tmp_path))
