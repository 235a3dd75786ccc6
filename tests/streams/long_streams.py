"""A million tokens through small models, chunk by chunk: what they cost in memory, and that the
chunks are what the whole is where the whole fits.

`make long-streams`, or `python tests/streams/long_streams.py --tokens 1048576 --chunk 4096`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

MODELS = {
    "mamba": ("model=mamba_small",),
    "gated_deltanet": ("model=gated_deltanet_small",),
    "lssl": ("model=mamba_small", "model.pattern=[lssl]"),  # lssl_small classifies
    "titans_lmm": ("model=titans_lmm_small",),
}
MOST_BYTES = 2 * 2**30
WHOLE = 8192  # tokens of a row that is also read whole

# Trained for a moment: what is asked is whether chunks are the whole, not how good it is.
TRAIN = (
    "task=next_token", "data=stdlib_text", "trainer.steps=3", "trainer.global_batch_size=2",
    "trainer.eval_samples=2", "trainer.test_samples=0", "logger.progress=none",
    "logger.tensorboard=false", "mesh.data=1",
)  # fmt: skip


class Read(NamedTuple):
    """What reading a row took."""

    loss: float
    peak_bytes: int
    seconds: float


def seqzoo(*words: str) -> tuple[str, int, float]:
    """Runs a command; returns what it printed, its largest resident memory, its seconds."""
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "seqzoo.cli.main", *words], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"seqzoo {' '.join(words)} ended with {child.returncode}")
    return out, usage.ru_maxrss * 1024, time.monotonic() - began


def train(mixer: str, runs: pathlib.Path) -> pathlib.Path:
    """A run of a small model; returns its folder."""
    seqzoo("train", *TRAIN, *MODELS[mixer], f"name={mixer}", "--runs", str(runs))
    (folder,) = (
        p.parent for p in (runs / mixer).glob("*/status.json") if not p.parent.is_symlink()
    )
    return folder


def read(run: pathlib.Path, tokens: int, chunk: int | None) -> Read:
    """Scores one row of so many tokens, whole or in chunks."""
    words = [f"data.eval_seq_len={tokens}", "trainer.eval_batch_size=1"]
    words += [] if chunk is None else [f"eval.stream_chunk={chunk}"]
    out, peak, seconds = seqzoo("eval", str(run), *words, "--samples", "1", "--format", "json")
    found: Any = json.loads(out)
    return Read(found["metrics"]["loss"], peak, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--mixers", nargs="+", default=list(MODELS))
    args = parser.parse_args()
    failed = False
    print(f"{'mixer':<18}{'whole - chunks':>16}{'tokens':>12}{'peak MiB':>10}{'tokens/s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for mixer in args.mixers:
            run = train(mixer, pathlib.Path(folder))
            length = min(WHOLE, args.tokens)
            whole, parts = read(run, length, None), read(run, length, min(1000, args.chunk))
            off = abs(whole.loss / parts.loss - 1)
            stream = read(run, args.tokens, args.chunk)
            failed |= off > 1e-5 or stream.peak_bytes > MOST_BYTES
            speed = args.tokens / stream.seconds
            print(
                f"{mixer:<18}{off:>16.1e}{args.tokens:>12,}{stream.peak_bytes / 2**20:>10,.0f}"
                f"{speed:>10,.0f}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
