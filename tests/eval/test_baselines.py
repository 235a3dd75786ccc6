"""The count model against its definition, and baselines against what is known of their data."""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from omegaconf import OmegaConf

from seqzoo.data import MQAR, ListOps
from seqzoo.eval import baselines
from seqzoo.eval.count_model import CountModel, _discounts

WORDS = [b"the cat sat on the mat", b"the dog sat on the cat", b"a cat and a dog", b"mat"] * 2


def literal(documents, order, context, symbol):
    """Interpolated Kneser-Ney by loops over tuples."""
    grams = Counter()
    for document in documents:
        text = bytes(order) + document + b"\0"
        grams.update(text[n : n + order + 1] for n in range(len(document) + 1))
    levels = [grams]
    for _ in range(order):
        levels.append(Counter(gram[1:] for gram in levels[-1]))
    p = 1 / 256
    for length, counts in enumerate(reversed(levels)):
        discount = _discounts(np.array(list(counts.values())))
        seen = context[len(context) - length :]
        followers = {gram[-1]: n for gram, n in counts.items() if gram[:-1] == seen}
        if followers:
            total = sum(followers.values())
            left = sum(discount[min(n, 3)] for n in followers.values())
            mine = followers.get(symbol, 0)
            p = (mine - discount[min(mine, 3)]) / total + left / total * p
    return p


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_count_model_is_interpolated_kneser_ney(order):
    model = CountModel(WORDS, order)
    for context in (b"the cat", b"the", b"t", b"", b"xyz"):
        found = model.next_byte(context)
        assert found.sum() == pytest.approx(1.0, abs=1e-12) and (found > 0).all()
        padded = bytes(order) + context
        for symbol in (0, ord("t"), ord(" "), ord("z")):
            expected = literal(WORDS, order, padded[len(padded) - order :], symbol)
            assert found[symbol] == pytest.approx(expected, rel=1e-12)


def test_the_cost_of_a_document_is_that_of_its_bytes_and_its_end():
    model = CountModel(WORDS, 4)
    bits = model.bits([b"the dog", b"", b"a"])
    assert bits.shape == (8 + 1 + 2,)
    text = b"the dog"
    expected = [model.next_byte(text[:n])[byte] for n, byte in enumerate(text + b"\0")]
    np.testing.assert_allclose(bits[:8], -np.log2(expected), rtol=1e-12)
    assert bits[8] == pytest.approx(-math.log2(model.next_byte(b"")[0]))


def test_orders_out_of_range_are_refused():
    with pytest.raises(ValueError, match="order=8"):
        CountModel(WORDS, 8)


@dataclasses.dataclass
class Words:
    def documents(self, split):
        rng = np.random.default_rng(len(split))
        words = [b"alpha ", b"beta ", b"gamma ", b"delta "]
        return tuple(b"".join(rng.choice(words, 300)) for _ in range(20))


def test_text_baselines_near_the_entropy_of_a_known_source():
    rows = {row["baseline"]: row["bits_per_byte"] for row in baselines.text_baselines(Words())}
    # Two bits per word; a word has 5 or 6 bytes.
    entropy = 2 / np.mean([6, 5, 6, 6])
    count = rows["order-6 count model of the training text"]
    assert entropy < count < 1.05 * entropy
    assert entropy < rows["xz -9e behind the training text"] <= rows["xz -9e"] < rows["gzip -9"]


def test_recall_baselines_count_what_noise_makes_ambiguous():
    rows = {r["baseline"]: r["accuracy"] for r in baselines.recall_baselines(MQAR(), "valid")}
    assert rows["guessing a value out of the context"] == pytest.approx(0.25)
    assert rows["guessing a value"] == pytest.approx(1 / 128)
    ceiling = rows["noise ceiling: any value that followed the key"]
    assert 0.98 < ceiling < 1 and rows["the value that followed the key last"] < ceiling
    clean = MQAR(random_non_queries=False)
    rows = {r["baseline"]: r["accuracy"] for r in baselines.recall_baselines(clean, samples=100)}
    assert rows["noise ceiling: any value that followed the key"] == 1.0
    assert rows["the value that followed the key last"] == 1.0


def test_the_noise_ceiling_by_a_loop():
    data = MQAR(vocab_size=20, seq_len=40, num_kv_pairs=3)
    batch = data.source("test").batch(np.arange(60))
    expected = []
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        right = 0.0
        for place in np.flatnonzero(targets >= 0):
            followed = defaultdict(list)
            for before, after in zip(tokens[:place], tokens[1 : place + 1], strict=True):
                if after >= 10:
                    followed[before].append(after)
            options = followed[tokens[place]]
            right += options.count(targets[place]) / len(options)
        expected.append(right / 3)
    rows = baselines.recall_baselines(data, samples=60)
    assert rows[0]["accuracy"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_label_baselines_are_those_of_the_cards_law():
    data = ListOps(test_samples=3000)
    majority, first = baselines.label_baselines(data, samples=6000, first_token=True)
    # 24,000 trees of a literal generator: 16.9 % and 35.9 %.
    assert majority["accuracy"] == pytest.approx(0.169, abs=0.02)
    assert first["accuracy"] == pytest.approx(0.359, abs=0.025)


def test_a_table_has_a_line_per_row():
    rows = [{"baseline": "a", "bits_per_byte": 1.5}, {"baseline": "longer", "bits_per_byte": 12.0}]
    assert baselines.table(rows).splitlines() == [
        "baseline  bits_per_byte",
        "a         1.5000",
        "longer    12.0000",
    ]


@pytest.fixture
def composed(monkeypatch):
    """Lets `main` see one data node, whatever else a configuration needs."""

    def only(node):
        monkeypatch.setattr(baselines, "compose", lambda words: OmegaConf.create({"data": node}))

    return only


def test_the_command_prints_the_table_of_its_data(composed, capsys, tmp_path):
    composed({"_target_": "seqzoo.data.mqar.MQAR", "test_samples": 50})
    assert baselines.main([]) == 0
    assert "guessing a value out of the context" in capsys.readouterr().out
    node = {"min_length": 5, "max_length": 20, "max_depth": 3, "test_samples": 50}
    composed({"_target_": "seqzoo.data.listops.ListOps", "train_samples": 100, **node})
    assert baselines.main([]) == 0
    assert "behind the first token" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("one two three " * 300)
    composed({"_target_": "seqzoo.data.text.Text", "path": str(tmp_path / "a.txt")})
    assert baselines.main([]) == 0
    printed = capsys.readouterr().out
    assert "train 3,780 bytes, valid 210 bytes, test 210 bytes" in printed
    assert "order-6 count model" in printed


def test_the_command_says_what_it_cannot_do(composed, capsys, tmp_path):
    composed({"_target_": "seqzoo.data.selective_copying.SelectiveCopying"})
    assert baselines.main([]) == 2
    assert "no baselines for SelectiveCopying" in capsys.readouterr().err
    composed({"_target_": "seqzoo.data.text.Text", "path": str(tmp_path / "nothing")})
    assert baselines.main([]) == 2
    assert "there is no such file" in capsys.readouterr().err
