"""Passkey and needles: what stands in a row, where, and that only the answer is asked."""

import re

import numpy as np
import pytest

from seqzoo.data import IGNORE, Needles, Passkey, PasskeyTokens, pipeline
from seqzoo.errors import ConfigError

FORMS = {
    "single": dict(),
    "multi-key 1": dict(n_keys=4),
    "multi-key 2": dict(haystack="needles"),
    "multi-key 3": dict(haystack="needles", keys="uuids", values="uuids"),
}


def texts(batch):
    """Rows as text, with the answer's last token, which no row shows."""
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    asked = batch["targets"] != IGNORE
    n = asked.sum(1)[0]
    assert asked[:, -n:].all() and not asked[:, :-n].any()
    np.testing.assert_array_equal(batch["tokens"][:, 1 - n :], batch["targets"][:, -n:-1])
    rows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    return [written(row) for row in rows], n


def written(tokens):
    return bytes(tokens.astype(np.uint8)).decode()


def test_the_passkey_stands_between_two_sentences_and_is_asked(chi_square):
    n, length = 3000, 300
    batch = Passkey(seq_len=length).source("train").batch(np.arange(n))
    assert batch["tokens"].shape == (n, length) and "group" not in batch
    rows, digits = texts(batch)
    assert digits == 5
    needle = re.compile(
        r"(^|\. )The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\. "
    )
    where = []
    for row in rows:
        found = needle.search(row)
        assert found[2] == found[3] == row[-5:]
        assert row.endswith(f"What is the pass key? The pass key is {found[2]}")
        assert row.count("The pass key is ") == 2
        where.append(found.start())
    _, counts = np.unique(where, return_counts=True)
    assert len(counts) == 11 and abs(chi_square(counts, np.full(11, n / 11))) < 5
    answers = np.concatenate([batch["targets"][:, -5:].ravel() - 48])
    assert abs(chi_square(np.bincount(answers, minlength=10), np.full(10, n / 2))) < 5


@pytest.mark.parametrize("make", [Passkey, PasskeyTokens, Needles])
def test_the_test_split_is_a_grid_of_length_and_depth(make):
    data = make(seq_len=1024, test_lengths=[600, 1024], depths=[0, 50, 100], test_samples=3)
    assert data.group_names[0] == "len_600_depth_0" and len(data.group_names) == 6
    seen = {}
    for batch in pipeline.eval_batches(data, "test", batch_size=3):
        assert len(set(batch["group"])) == 1  # a cell of the grid at a time
        seen[data.group_names[batch["group"][0]]] = batch["tokens"]
    assert list(seen) == list(data.group_names)
    for name, tokens in seen.items():
        _, length, _, depth = name.split("_")
        assert tokens.shape == (3, int(length))
        if make is PasskeyTokens:
            place = (tokens[:, :-6] == data.vocab_size - 1).argmax(1)
        elif make is Passkey:
            place = np.array([bytes(row.astype(np.uint8)).index(b"The pass") for row in tokens])
        else:
            place = np.array([bytes(row.astype(np.uint8)).index(b"One of") for row in tokens])
        start = len(data._introduction()) if make is Needles else 0
        share = (place - start) / (int(length) - data.least_length())
        assert (np.abs(share - int(depth) / 100) < 0.12).all(), (name, share)
    assert not (seen["len_600_depth_0"][:, None] == seen["len_600_depth_50"]).all(-1).any()


@pytest.mark.parametrize("noise", ["apart", "alike"])
def test_the_passkey_in_tokens(noise, chi_square):
    data = PasskeyTokens(seq_len=24, noise=noise, vocab_size=16, n_values=4, n_digits=3)
    batch = data.source("train").batch(np.arange(5000))
    tokens, targets = batch["tokens"], batch["targets"]
    assert (targets[:, :-3] == IGNORE).all() and (tokens[:, -3] == 14).all()
    marker = tokens == 15
    assert (marker.sum(1) == 1).all() and ((tokens == 14).sum(1) == 1).all()
    place = marker.argmax(1)
    rows = np.arange(len(tokens))[:, None]
    np.testing.assert_array_equal(tokens[rows, place[:, None] + np.arange(1, 4)], targets[:, -3:])
    np.testing.assert_array_equal(tokens[:, -2:], targets[:, -3:-1])
    assert abs(chi_square(np.bincount(place, minlength=18), np.full(18, 5000 / 18))) < 5
    rest = np.ones(tokens.shape, bool)
    rest[rows, place[:, None] + np.arange(4)] = False
    found = np.bincount(tokens[:, :-3][rest[:, :-3]], minlength=16)
    assert (found[:4] == 0).all() == (noise == "apart") and (found[4:14] > 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_needles_have_one_answer(form):
    settings = FORMS[form]
    data = Needles(seq_len=1200, **settings)
    rows, n = texts(data.source("valid").batch(np.arange(50)))
    value = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}" if "values" in settings else r"\d{7}"
    what = data.values.removesuffix("s")
    needle = re.compile(f"One of the special magic {what}s for (\\S+) is: ({value})\\. ")
    last = re.compile(
        f"What is the special magic {what} for (\\S+) mentioned in the provided text\\? The "
        f"special magic {what} for (\\S+) mentioned in the provided text is ({value})$"
    )
    asked = set()
    for row in rows:
        assert len(row) == 1201 and row.startswith(f"Some special magic {what}s are hidden")
        found = needle.findall(row)
        told = dict(found)
        assert len(told) == len(found)  # no key twice
        question = last.search(row)
        assert question[1] == question[2] and told[question[1]] == question[3]
        assert n == len(question[3])
        asked.add([key for key, _ in found].index(question[1]))
        if data.haystack == "sentences":
            assert len(found) == data.n_keys and row.count("The sun is yellow.") > 5
        else:
            assert len(found) > 5 and "yellow" not in row
            assert len(found) == (1200 - data.least_length()) // data._needle_length() + 1
    assert len(asked) > 1 or data.n_keys == 1


@pytest.mark.parametrize("make", [Passkey, Needles])
def test_training_on_text_asks_every_next_byte_of_train_rows_alone(make):
    rows, answers = make(seq_len=500, train_on="text"), make(seq_len=500)
    assert rows.most_asked is None and answers.most_asked == answers.n_digits
    for split in ("train", "valid", "test"):
        read, asked = (data.source(split).batch(np.arange(4)) for data in (rows, answers))
        np.testing.assert_array_equal(read["tokens"], asked["tokens"])
        if split != "train":
            np.testing.assert_array_equal(read["targets"], asked["targets"])
            continue
        assert read["targets"].dtype == np.int32
        np.testing.assert_array_equal(read["targets"][:, :-1], read["tokens"][:, 1:])
        np.testing.assert_array_equal(read["targets"][:, -1], asked["targets"][:, -1])


@pytest.mark.parametrize("make", [Passkey, Needles])
@pytest.mark.parametrize("train_on", ["answers", "text"])
def test_documents_share_rows_of_train_each_with_a_question_of_its_own(make, train_on):
    data = make(seq_len=1301, documents=3, train_on=train_on)
    assert data.most_asked == (None if train_on == "text" else 3 * data.n_digits)
    batch = data.source("train").batch(np.arange(40))
    counts = batch["segment_ids"].max(1)
    assert set(counts) == {1, 2, 3}
    seen = set()
    for tokens, targets, ids, count in zip(
        batch["tokens"], batch["targets"], batch["segment_ids"], counts, strict=True
    ):
        sizes = [int((ids == number).sum()) for number in range(1, count + 1)]
        assert sizes == [1301 // count] * (count - 1) + [1301 - 1301 // count * (count - 1)]
        assert (np.diff(ids) >= 0).all()
        for number in range(1, count + 1):
            document, asked = tokens[ids == number], targets[ids == number]
            key = written(asked[-data.n_digits :])
            assert key.isdigit() and written(document).endswith(key[:-1])
            assert f" is {key}. " in written(document) or f" is: {key}. " in written(document)
            seen.add(key)
            if train_on == "text":
                np.testing.assert_array_equal(asked[:-1], document[1:])
            else:
                assert (asked[: -data.n_digits] == IGNORE).all()
    assert len(seen) == counts.sum()  # no document is another's
    for split in ("valid", "test"):
        assert "segment_ids" not in data.source(split).batch(np.arange(2))
    part = data.source("train").batch(np.array([7, 31]))
    for name, rows in part.items():
        np.testing.assert_array_equal(rows, batch[name][[7, 31]])


def test_rows_are_a_function_of_seed_split_and_number():
    for data in (Passkey(), PasskeyTokens(), Needles(n_keys=4)):
        whole = data.source("train").batch(np.arange(20))["tokens"]
        again = data.source("train").batch(np.array([19, 3]))["tokens"]
        np.testing.assert_array_equal(again, whole[[19, 3]])
        other = data.source("valid").batch(np.arange(20))["tokens"]
        assert not (other[:, None] == whole).all(-1).any()
    assert Passkey().fingerprint() != Passkey(n_digits=4).fingerprint()


def test_the_shortest_rows_hold_no_filler():
    for data in (Passkey(), PasskeyTokens(), Needles(), Needles(**FORMS["multi-key 3"])):
        length = data.least_length()
        short = type(data)(**{**vars(data), "seq_len": length, "test_lengths": None})
        for split in ("train", "test"):
            assert short.source(split).batch(np.arange(2))["tokens"].shape == (2, length)
        with pytest.raises(ConfigError, match=f"seq_len={length - 1}.*at least {length}"):
            type(data)(**{**vars(data), "seq_len": length - 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Passkey(vocab_size=128), "data.vocab_size=128.*at least 256"),
        (lambda: Passkey(n_digits=0), "data.n_digits=0"),
        (lambda: Passkey(train_on="rows"), "data.train_on=rows; .* answers, text"),
        (lambda: Passkey(documents=0), "data.documents=0"),
        (
            lambda: Passkey(documents=6),
            "data.documents=6; .*seq_len=512 holds at most 5 of 101 tokens",
        ),
        (lambda: Passkey(depths=[]), r"data.depths=\[\]; give at least one"),
        (lambda: Passkey(depths=[10, 10]), "none twice"),
        (lambda: Passkey(depths=[101]), r"data.depths=\[101\]; a depth is a percentage"),
        (lambda: Passkey(test_lengths=[512, 60]), "data.test_lengths=60"),
        (lambda: Passkey(test_samples=0), "data.test_samples=0"),
        (lambda: PasskeyTokens(noise="some"), "data.noise=some; it must be one of apart, alike"),
        (lambda: PasskeyTokens(vocab_size=11), "data.vocab_size=11 is too small.*at least 12"),
        (lambda: PasskeyTokens(n_values=1), "data.n_values=1"),
        (lambda: Needles(haystack="essays"), "data.haystack=essays"),
        (lambda: Needles(keys="numbers"), "data.keys=numbers"),
        (lambda: Needles(n_keys=4, haystack="needles"), "data.n_keys=4 with haystack=needles"),
        (lambda: Needles(seq_len=2**20, haystack="needles"), "4096 keys, too few.*keys=uuids"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
