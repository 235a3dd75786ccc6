"""Batches: one global order whatever the number of processes, any first step, whole evaluations."""

import dataclasses
import subprocess
import sys
import types

import numpy as np
import pytest

from seqzoo.data import IGNORE, MQAR, InductionHeads, pipeline
from seqzoo.data.stored import Stored
from seqzoo.errors import ConfigError, DataError

SMALL = MQAR(vocab_size=32, seq_len=16, num_kv_pairs=2, train_samples=10, valid_samples=7)


def taken(stream):
    return {step: batch["tokens"] for step, batch in stream}


def test_a_split_without_rows_is_refused():
    """As of three images of which a tenth is held out."""
    data = types.SimpleNamespace(source=lambda split: Stored(lambda rows: {}, np.arange(0), 0))
    with pytest.raises(DataError, match="the valid split of this data has no rows"):
        pipeline.eval_batches(data, "valid", batch_size=2)
    with pytest.raises(DataError, match="the train split of this data has no rows"):
        pipeline.batches(data, "train", global_batch_size=2)


@pytest.mark.parametrize("data", [SMALL, MQAR()], ids=["finite", "endless"])
def test_processes_share_one_global_order(data):
    whole = taken(pipeline.batches(data, "train", global_batch_size=8, stop_step=5))
    assert list(whole) == list(range(5))
    for count in (2, 4):
        parts = [
            taken(
                pipeline.batches(
                    data,
                    "train",
                    global_batch_size=8,
                    stop_step=5,
                    process_index=p,
                    process_count=count,
                )
            )
            for p in range(count)
        ]
        for step, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), rows)


def test_starting_late_is_the_rest_of_starting_early_with_any_threads():
    whole = taken(pipeline.batches(SMALL, "train", global_batch_size=4, stop_step=9))
    for workers, prefetch in ((0, 0), (1, 2), (4, 8)):
        rest = taken(
            pipeline.batches(
                SMALL,
                "train",
                global_batch_size=4,
                start_step=6,
                stop_step=9,
                workers=workers,
                prefetch=prefetch,
            )
        )
        assert list(rest) == [6, 7, 8]
        for step, rows in rest.items():
            np.testing.assert_array_equal(rows, whole[step])


def test_a_far_step_of_an_endless_stream_is_at_hand():
    stream = pipeline.batches(MQAR(), "train", global_batch_size=4, start_step=10**9)
    step, batch = next(stream)
    assert step == 10**9 and batch["tokens"].shape == (4, 64)
    assert stream.delivered == 1 and stream.waited > 0
    stream.close()


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    source = SMALL.source("train")
    index = source.order(np.arange(30)).reshape(3, 10)
    for epoch, rows in enumerate(index):
        np.testing.assert_array_equal(np.sort(rows), np.arange(10) + 10 * epoch)
    assert (index[0] % 10 != index[1] % 10).any()
    other = dataclasses.replace(SMALL, seed=1).source("train").order(np.arange(10))
    assert (other != index[0]).any()
    np.testing.assert_array_equal(
        source.batch(index[0])["tokens"], source.batch(index[0] + 50)["tokens"]
    )


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_row_once_and_fills_up_with_rows_that_ask_nothing(count):
    expected = SMALL.source("valid").batch(np.arange(7))["tokens"]
    parts = [
        list(
            pipeline.eval_batches(
                SMALL, "valid", batch_size=4, process_index=p, process_count=count
            )
        )
        for p in range(count)
    ]
    batches = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert [batch["tokens"].shape for batch in batches] == [(4, 16)] * 2
    asked = [(batch["targets"] != IGNORE).any(1) for batch in batches]
    assert [a.sum() for a in asked] == [4, 3]
    seen = np.concatenate([b["tokens"][a] for b, a in zip(batches, asked, strict=True)])
    np.testing.assert_array_equal(seen, expected)


def test_part_of_an_evaluation_is_spread_over_the_split():
    data = InductionHeads(test_lengths=[8, 16], test_samples=100)
    batches = list(pipeline.eval_batches(data, "test", batch_size=10, max_samples=20))
    assert [batch["tokens"].shape for batch in batches] == [(10, 8), (10, 16)]
    source = data.source("test")
    np.testing.assert_array_equal(
        batches[0]["tokens"], source.batch(np.arange(0, 100, 10))["tokens"]
    )


def test_an_error_in_a_worker_reaches_the_user():
    @dataclasses.dataclass(frozen=True)
    class Broken(MQAR):
        def source(self, split):
            return dataclasses.replace(super().source(split), make=self._fail)

        def _fail(self, key):
            raise ValueError("no rows today")

    with pytest.raises(ValueError, match="no rows today"):
        next(pipeline.batches(Broken(), "train", global_batch_size=4))


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="global batch of 6 rows cannot be shared by 4"):
        pipeline.batches(MQAR(), "train", global_batch_size=6, process_count=4)
    with pytest.raises(ConfigError, match="batch size is 0"):
        pipeline.batches(MQAR(), "train", global_batch_size=0)
    with pytest.raises(ConfigError, match="no process 2 among 2"):
        pipeline.batches(MQAR(), "train", global_batch_size=4, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="train split has no end; .* --samples N"):
        pipeline.eval_batches(MQAR(), "train", batch_size=4)
    with pytest.raises(ConfigError, match="max_samples=0"):
        pipeline.eval_batches(MQAR(), "valid", batch_size=4, max_samples=0)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        pipeline.batches(MQAR(), "dev", global_batch_size=4)


def test_data_needs_no_jax():
    code = "import sys, seqzoo.data, seqzoo.data.pipeline; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
