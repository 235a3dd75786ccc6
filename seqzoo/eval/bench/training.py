"""Tokens per second of training a Mamba, and of its peer (transformers + mambapy) in turns."""

import json
import os
import pathlib
import statistics
import subprocess
import time

from seqzoo.errors import ConfigError
from seqzoo.eval.bench._train_step import BATCH, LENGTH, MAMBA, VOCAB, Trainer
from seqzoo.train import environment

TOKENS = BATCH * LENGTH
CASE = f"Mamba d 256, 4 layers, N 16, {BATCH} x {LENGTH} bytes"


def run(quick: bool = False, peer_python: str | None = None) -> list[dict[str, object]]:
    """Rows: tokens per second, ours and the peer's, medians of updates taken in turns.

    Args:
        quick: fewer updates.
        peer_python: the Python of an environment with torch, transformers and mambapy; None = no
            peer.
    """
    trainer = Trainer(MAMBA, batch=BATCH, length=LENGTH, vocab=VOCAB)
    started = time.perf_counter()
    trainer.start()
    compiling = time.perf_counter() - started
    trainer.update()
    rounds = 3 if quick else 9
    ours, theirs = [], []
    peer = Peer(peer_python) if peer_python else None
    try:
        for _ in range(rounds):
            started = time.perf_counter()
            trainer.update()
            ours.append(time.perf_counter() - started)
            if peer is not None:
                theirs.append(peer.update())
    finally:
        if peer is not None:
            peer.close()
    rows: list[dict[str, object]] = [
        {
            "bench": "training",
            "case": CASE,
            "tokens/s": round(TOKENS / statistics.median(ours)),
            "s/update": round(statistics.median(ours), 4),
            "compile s": round(compiling, 1),
        }
    ]
    if peer is not None:
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        rows[0] |= {"times the peer": round(ratio, 2), "to reach": ">= 5"}
        rows.append(
            {
                "bench": "training",
                "case": f"the same, {peer.name}",
                "tokens/s": round(TOKENS / statistics.median(theirs)),
                "s/update": round(statistics.median(theirs), 4),
            }
        )
    return rows


class Peer:
    """The peer in a process of its own, which trains one update whenever it is told to."""

    def __init__(self, python: str):
        script = pathlib.Path(__file__).with_name("peer_mamba.py")
        # Its threads must sleep while we compute.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        command = [python, str(script), "--threads", str(environment.threads())]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        except OSError as error:
            raise ConfigError(f"--peer-python {python} cannot be started: {error}") from error
        self.name = self._read()["name"]
        self.update()

    def update(self) -> float:
        """One update; returns its seconds, measured inside the peer."""
        self._child.stdin.write("update\n")
        self._child.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()

    def _read(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            raise ConfigError(
                "the peer ended before it answered; its environment needs torch, transformers and "
                "mambapy (its own message stands above)"
            )
        return json.loads(line)
