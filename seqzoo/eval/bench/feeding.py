"""How fast the data arrives: MQAR samples per second from one process."""

import time

import numpy as np

from seqzoo.data.mqar import MQAR

CASES = ((64, 4, 400_000), (256, 64, 40_000))


def samples_per_second(seq_len: int, num_kv_pairs: int, *, batch: int, seconds: float) -> float:
    """Draws batch after batch for `seconds` and returns samples per second."""
    source = MQAR(
        vocab_size=8192, seq_len=seq_len, num_kv_pairs=num_kv_pairs, random_non_queries=True
    ).source("train")
    source.batch(np.arange(batch, dtype=np.int64))
    drawn, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        source.batch(np.arange(drawn, drawn + batch, dtype=np.int64))
        drawn += batch
    return drawn / (time.perf_counter() - started)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: length, pairs, samples per second, and the figure to reach."""
    return [
        {
            "bench": "feeding",
            "case": f"MQAR L {length}, {pairs} pairs",
            "samples/s": round(
                samples_per_second(length, pairs, batch=1024, seconds=0.2 if quick else 3.0)
            ),
            "to reach": f">= {goal:,}",
        }
        for length, pairs, goal in CASES
    ]
