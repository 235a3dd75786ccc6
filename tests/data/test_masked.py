"""Masked text: the law of what is hidden, and that it depends on (seed, split, row) alone."""

import dataclasses

import numpy as np
import pytest

from seqzoo.data import IGNORE, MQAR, Masked, StdlibText, Text, Tokens, pipeline
from seqzoo.errors import ConfigError

TEXT = StdlibText(seq_len=64)
DATA = Masked(TEXT, seq_len=64)


def rows(data, split, index):
    """The plain rows and the masked ones."""
    index = np.asarray(index)
    return data.text.source(split).batch(index), data.source(split).batch(index)


def test_hidden_tokens_are_the_targets_and_nothing_else_changes():
    plain, masked = rows(DATA, "valid", np.arange(300))
    chosen = masked["targets"] != IGNORE
    np.testing.assert_array_equal(masked["targets"][chosen], plain["tokens"][chosen])
    np.testing.assert_array_equal(masked["tokens"][~chosen], plain["tokens"][~chosen])
    np.testing.assert_array_equal(masked["segment_ids"], plain["segment_ids"])
    assert {value.dtype for value in masked.values()} == {np.dtype(np.int32)}


def test_shares_are_as_asked_for(chi_square):
    data = dataclasses.replace(DATA, mask_rate=0.3, eval_mask_rate=0.1, mask_share=0.7)
    for split, rate in (("train", 0.3), ("valid", 0.1)):
        plain, masked = rows(data, split, np.arange(2000))
        chosen = masked["targets"] != IGNORE
        n = chosen.size
        assert chosen.sum() == pytest.approx(rate * n, abs=5 * (n * rate * (1 - rate)) ** 0.5)
        shown, true = masked["tokens"][chosen], plain["tokens"][chosen]
        hidden, kept = (shown == 256).sum(), (shown == true).sum()
        other = len(shown) - hidden - kept
        # One of the 256 that are drawn is the token itself.
        shares = np.array([0.7, 0.2 + 0.1 / 256, 0.1 * 255 / 256])
        assert chi_square([hidden, kept, other], shares * len(shown)) < 5
        drawn = shown[(shown != 256) & (shown != true)]
        assert chi_square(np.bincount(drawn, minlength=256), np.full(256, len(drawn) / 256)) < 5


def test_rows_are_a_pure_function_of_seed_split_and_number():
    index = np.arange(40)
    whole = DATA.source("train").batch(index)
    for start in (0, 7, 31):
        part = DATA.source("train").batch(index[start : start + 9])
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name][start : start + 9])
    again = Masked(StdlibText(seq_len=64), seq_len=64)
    np.testing.assert_array_equal(again.source("train").batch(index)["tokens"], whole["tokens"])
    assert again.fingerprint() == DATA.fingerprint() and hash(again) == hash(DATA)
    other = dataclasses.replace(DATA, seed=1)
    assert (other.source("train").batch(index)["targets"] != whole["targets"]).any()
    assert other.fingerprint() != DATA.fingerprint()
    text = dataclasses.replace(DATA, text=dataclasses.replace(TEXT, seed=1))
    assert text.fingerprint() != DATA.fingerprint()


def test_a_row_is_masked_anew_in_another_epoch_and_in_another_split(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(range(1, 201)))
    text = Text(
        path=str(file), encoding="bytes", seq_len=180, valid_fraction=0.05, segment_ids=False
    )
    data = Masked(text, seq_len=180)
    source = data.source("train")
    assert len(source) == 1
    chosen = source.batch(np.arange(6))["targets"] != IGNORE
    assert len({row.tobytes() for row in chosen}) == 6
    valid = data.source("valid").batch(np.arange(1))["targets"] != IGNORE
    assert (valid[0, :10] != chosen[0, :10]).any() or valid.sum() != chosen[0].sum()


@pytest.mark.parametrize("segment_ids", [True, False])
def test_padding_is_never_asked_for(tmp_path, segment_ids):
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(range(1, 101)))
    text = Text(path=str(file), encoding="bytes", seq_len=64, segment_ids=segment_ids)
    masked = Masked(text, seq_len=64, mask_rate=1.0).source("test").batch(np.arange(1))
    assert (masked["targets"] != IGNORE).sum() == 6 and (masked["targets"][0, 6:] == IGNORE).all()


def test_the_pipeline_fills_up_batches_with_rows_that_ask_nothing():
    batches = [*pipeline.eval_batches(DATA, "valid", batch_size=64, max_samples=100)]
    assert [b["tokens"].shape for b in batches] == [(64, 64)] * 2
    assert ((batches[1]["targets"] != IGNORE).any(1)).sum() <= 36


def test_token_arrays_are_masked_as_well(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000) % 90)
    text = Tokens(100, path=str(tmp_path / "a.npy"), seq_len=32)
    data = Masked(text, vocab_size=104, mask_token=103, seq_len=32)
    batch = data.source("train").batch(np.arange(50))
    assert batch["tokens"].max() == 103 and 0 <= batch["targets"].max() < 90
    assert data.bytes_per_token is None and data.group_names == ()


@pytest.mark.parametrize(
    "keywords, text",
    [
        (dict(mask_rate=0.0), "data.mask_rate=0.0; it must be above 0"),
        (dict(eval_mask_rate=1.5), "data.eval_mask_rate=1.5"),
        (dict(mask_share=0.9, random_share=0.2), "nor both together above 1"),
        (dict(mask_token=255), "data.mask_token=255; it must be at least data.text.vocab_size=256"),
        (dict(mask_token=257), "below data.vocab_size=257"),
        (dict(seq_len=65), "data.seq_len=65, but data.text.seq_len=64"),
        (dict(text=3), "data.text is int; it must be a data set"),
    ],
)
def test_mistakes_are_answered(keywords, text):
    with pytest.raises(ConfigError, match=text):
        Masked(**{"text": TEXT, "seq_len": 64, **keywords})


def test_any_data_set_of_tokens_will_do():
    assert Masked(MQAR(seq_len=64), seq_len=64).group_names == ("pairs_4",)
