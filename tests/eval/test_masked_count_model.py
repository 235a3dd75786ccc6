"""The count model of hidden bytes: against counting by hand, and against a source that is known."""

import dataclasses

import numpy as np
import pytest
from omegaconf import OmegaConf

from seqzoo.data import IGNORE, Masked, Text
from seqzoo.eval import baselines, masked_count_model
from seqzoo.eval.count_model import WordModel
from seqzoo.eval.masked_count_model import masked_baselines


@pytest.fixture
def text_of(tmp_path):
    def make(content: bytes, **keywords):
        (tmp_path / "a.bin").write_bytes(content)
        shares = dict(valid_fraction=0.1, test_fraction=0.2)
        text = Text(path=str(tmp_path / "a.bin"), encoding="bytes", seq_len=64, **shares)
        return Masked(text, seq_len=64, **keywords)

    return make


def by_name(rows):
    return {row["baseline"]: row for row in rows}


def test_neighbours_tell_what_a_middle_is(text_of):
    """x is a function of both neighbours, of neither alone: l + r mod 4."""
    rng = np.random.default_rng(0)
    # Rows of l, x, r, separator; the text is 97 + number.
    l, r = rng.integers(0, 4, (2, 12_000))
    content = np.stack([l, 8 + (l + r) % 4, 16 + r, np.full_like(l, 24)], 1) + 97
    data = text_of(content.astype(np.uint8).tobytes(), mask_share=1.0, random_share=0.0)
    rows = masked_baselines(data)
    found = {row["baseline"]: row["bits_per_masked_token"] for row in rows}
    # Two bits for x and none with both neighbours; l and r each two bits, or what x leaves of them.
    assert found["unigram"] == pytest.approx(2 + 3 / 4 * 2, rel=0.03)
    assert found["left neighbour"] == pytest.approx((2 + 2 + 2 + 0) / 4, rel=0.03)
    assert found["left and right neighbour"] == pytest.approx((2 + 0 + 2 + 0) / 4, rel=0.05)
    # All that is chosen is shown as a mask: what is shown tells nothing.
    told = found["left and right neighbour, and what is shown"]
    assert told == pytest.approx(found["left and right neighbour"], rel=1e-12)


def test_what_is_shown_is_used_by_bayes_rule(text_of):
    """A byte that is shown is the true one in 10 of 20 cases, where all 256 are as likely."""
    even, shown = np.full((2, 256), 1 / 256), np.array([256, 7])
    found = masked_count_model._told(even, shown, text_of(b"any text " * 50))
    p = 0.5 + 0.5 / 256
    np.testing.assert_allclose(found[0], even[0])
    np.testing.assert_allclose(found[1, [7, 8]], [p, (1 - p) / 255])
    # Noise that was counted costs a little more than noise that is known to be even.
    content = np.random.default_rng(1).integers(1, 256, 40_000).astype(np.uint8).tobytes()
    rows = by_name(masked_baselines(text_of(content)))
    told = rows["left and right neighbour, and what is shown"]
    expected = 0.8 * 8 + 0.2 * (-p * np.log2(p) - (1 - p) * np.log2((1 - p) / 255))
    assert told["bits_per_masked_token"] == pytest.approx(expected, rel=0.05)
    assert told["accuracy"] == pytest.approx(0.2 * p, abs=0.02)
    assert rows["unigram"]["bits_per_masked_token"] == pytest.approx(8, rel=0.02)


def test_the_counts_are_those_of_the_training_text(text_of):
    data = text_of(b"the cat sat on the mat. " * 60)
    train = data.text.documents("train")[0]
    model = WordModel(masked_count_model._words([train]), 2)
    text = b"\0" + train + b"\0"
    triples = [text[n : n + 3] for n in range(len(text) - 2)]
    context = np.array([(ord("e") << 16) | (ord("t") << 8)], np.uint64)  # t ? e
    table = masked_count_model._table(model, context)[0]
    assert table.sum() == pytest.approx(1.0, abs=1e-12)
    counts = {x: triples.count(bytes([ord("t"), x, ord("e")])) for x in range(256)}
    assert table.argmax() == max(counts, key=counts.get) == ord("h")


def test_every_hidden_byte_of_the_split_is_scored_with_its_true_neighbours(text_of):
    data = dataclasses.replace(text_of(bytes(range(1, 201)) * 3), mask_rate=0.5)
    seen = 0
    for context, target, _ in masked_count_model._asked(data, "test"):
        left, right = (context >> np.uint64(8)) & np.uint64(255), context >> np.uint64(16)
        inside = (left > 0) & (right > 0) & (target > 1) & (target < 200)
        assert (left[inside] + 1 == target[inside]).all()
        assert (right[inside] - 1 == target[inside]).all()
        seen += len(target)
    rows = data.source("test").batch(np.arange(len(data.source("test"))))
    assert seen == (rows["targets"] != IGNORE).sum() > 0


def test_the_command_prints_them(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 300)
    text = {"_target_": "seqzoo.data.text.Text", "path": str(tmp_path / "a.txt"), "seq_len": 128}
    node = {"_target_": "seqzoo.data.masked.Masked", "text": text}
    monkeypatch.setattr(baselines, "compose", lambda words: OmegaConf.create({"data": node}))
    assert baselines.main([]) == 0
    printed = capsys.readouterr().out
    assert "unigram" in printed and "left and right neighbour, and what is shown" in printed
