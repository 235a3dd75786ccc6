"""Speech Commands' folders, written by hand: both word lists, splits, scales, damaged sound."""

import dataclasses
import wave

import numpy as np
import pytest

from seqzoo.data import SPLITS, SpeechCommands, pipeline
from seqzoo.data.speech_commands import _WORDS
from seqzoo.errors import ConfigError, DataError

LENGTH = 20
SMALL = dict(seq_len=LENGTH, official=False)


def write(file, samples, rate=16_000, channels=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as clip:
        clip.setnchannels(channels)
        clip.setsampwidth(2)
        clip.setframerate(rate)
        clip.writeframes(np.asarray(samples, "<i2").tobytes())


@pytest.fixture
def folder(tmp_path):
    """Ten whole clips of each of ten words, and a short one; three of each other word."""
    rng = np.random.default_rng(0)
    for word in _WORDS[35]:
        for number in range(10 if word in _WORDS[10] else 3):
            write(tmp_path / word / f"{number}_nohash_0.wav", rng.normal(50, 1000, LENGTH))
        write(tmp_path / word / "9_nohash_1.wav", rng.normal(50, 1000, LENGTH - 5))
    held_out = {
        "validation_list.txt": [f"{word}/0_nohash_0.wav" for word in _WORDS[35]],
        "testing_list.txt": [f"{word}/9_nohash_1.wav" for word in _WORDS[35]],
    }
    for name, lines in held_out.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def samples_of(folder, name):
    return np.frombuffer((folder / name).read_bytes()[44:], "<i2").astype(np.float64)


def test_ten_words_are_whole_clips_dealt_out_by_class(folder):
    data = SpeechCommands(str(folder), **SMALL)
    batches = {}
    for split, size in zip(SPLITS, (70, 20, 10), strict=True):  # round(1.5) = 2
        (batches[split],) = pipeline.eval_batches(data, split, batch_size=size)
        assert batches[split]["inputs"].shape == (size, LENGTH, 1)
        counts = np.bincount(batches[split]["label"], minlength=10)
        np.testing.assert_array_equal(counts, size // 10)
    train = batches["train"]["inputs"].astype(np.float64)
    assert train.mean() == pytest.approx(0, abs=1e-6) and train.std() == pytest.approx(1, abs=1e-6)
    every = np.concatenate([batch["inputs"] for batch in batches.values()])
    assert len(np.unique(every[..., 0], axis=0)) == 100 and every.dtype == np.float32
    other = dataclasses.replace(data, split_seed=1)
    assert other.fingerprint() != data.fingerprint()


def test_rows_are_the_sound_of_their_label(folder):
    data = SpeechCommands(str(folder), mean=0.0, std=1.0, **SMALL)
    batch = data.source("test").batch(np.arange(10))
    for row, label in zip(batch["inputs"], batch["label"], strict=True):
        of_word = [
            samples_of(folder, f"{_WORDS[10][label]}/{n}_nohash_0.wav") / 32768 for n in range(10)
        ]
        assert min(abs(row[:, 0] - clip).max() for clip in of_word) < 1e-6


def test_all_words_have_the_published_lists_and_shorter_clips(folder):
    data = SpeechCommands(str(folder), n_classes=35, mean=0.0, std=1.0, segment_ids=True, **SMALL)
    assert [len(data.source(split)) for split in SPLITS] == [10 * 9 + 25 * 2, 35, 35]
    batch = data.source("test").batch(np.arange(35))
    np.testing.assert_array_equal(batch["label"], np.arange(35))
    np.testing.assert_array_equal(batch["segment_ids"].sum(1), LENGTH - 5)
    for row, word in zip(batch["inputs"], _WORDS[35], strict=True):
        expected = np.pad(samples_of(folder, f"{word}/9_nohash_1.wav"), (0, 5)) / 32768
        np.testing.assert_allclose(row[:, 0], expected, atol=1e-7)
    silent = dataclasses.replace(data, segment_ids=False).source("test").batch(np.arange(2))
    assert set(silent) == {"inputs", "label"}


def test_half_the_rate_is_asked_of_held_out_clips_alone(folder):
    data = SpeechCommands(str(folder), **SMALL)
    half = dataclasses.replace(data, eval_stride=2)
    for split in SPLITS:
        whole, some = (one.source(split).batch(np.arange(3))["inputs"] for one in (data, half))
        np.testing.assert_array_equal(some, whole if split == "train" else whole[:, ::2])
    marked = dataclasses.replace(half, segment_ids=True).source("test").batch(np.arange(3))
    assert marked["segment_ids"].shape == (3, LENGTH // 2)


def test_files_that_are_not_right(folder):
    def refused(message, **settings):
        with pytest.raises(DataError, match=message):
            source = SpeechCommands(str(folder), **{**SMALL, **settings}).source("train")
            source.batch(np.arange(len(source)))

    refused(r"clips \(all\): 100 found where 34,975 are published", official=True)
    refused(r"clips \(train\): 140 found where 84,843", official=True, n_classes=35)
    clip = folder / "yes/1_nohash_0.wav"
    whole = clip.read_bytes()
    clip.write_bytes(b"RIFF")
    refused("yes/1_nohash_0.wav is no readable wav file")
    clip.write_bytes(whole[:-4])
    refused("yes/1_nohash_0.wav ends before the 20 samples", n_classes=35)
    write(clip, np.zeros(LENGTH), rate=8000)
    refused("has 1 channels of 2 bytes at 8000 Hz where 1 channel of 2 bytes at 16000 Hz")
    write(clip, np.zeros(2 * LENGTH), channels=2)
    refused("has 2 channels of 2 bytes")
    (folder / "testing_list.txt").write_text("")
    clip.write_bytes(whole)
    refused("no clips are left for test", n_classes=35)
    (folder / "testing_list.txt").unlink()
    refused(
        "there is no testing_list.txt in it.*speech_commands_v0.02.tar.gz, sha256", n_classes=35
    )
    refused("yes has no clips .* of 16000 samples", seq_len=16_000)
    for file in (folder / "go").iterdir():
        file.unlink()
    (folder / "go").rmdir()
    refused("its folder go is not there")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_classes=12), "data.n_classes=12; it must be 10"),
        (dict(input_dim=2), "data.input_dim=2"),
        (dict(eval_stride=0), "data.eval_stride=0"),
        (dict(mean=0.0), "data.mean and data.std: give both"),
        (dict(mean=0.0, std=0.0), "data.std=0.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SpeechCommands("anywhere", **settings)
