"""`seqzoo train` that writes down which samples each update of this process read, and may stop.

python logged_train.py LOG STOP_AT WORDS...: LOG gets a line of JSON per update, [step, samples]; at
step STOP_AT (a boundary at which processes agree; 0 = never) this process gets a SIGTERM.
"""

import json
import os
import signal
import sys

from seqzoo.cli.main import main
from seqzoo.data import pipeline
from seqzoo.train import mesh
from seqzoo.train.session import Session


def log_samples(path: str) -> None:
    make, put = pipeline._Steps.__getitem__, mesh.put_batch

    def with_samples(steps, k):
        step, batch = make(steps, k)
        rows = steps.global_batch_size // steps.process_count
        first = step * steps.global_batch_size + steps.process_index * rows
        return step, batch | {"samples": [step, list(range(first, first + rows))]}

    def without(batch, sharding):
        if "samples" in batch:
            with open(path, "a") as file:
                file.write(json.dumps(batch["samples"]) + "\n")
        return put({name: a for name, a in batch.items() if name != "samples"}, sharding)

    pipeline._Steps.__getitem__, mesh.put_batch = with_samples, without


def stop_at(step: int) -> None:
    advance = Session.advance

    def and_stop(session):
        if session.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(session)

    Session.advance = and_stop


if __name__ == "__main__":
    log_samples(sys.argv[1])
    stop_at(int(sys.argv[2]))
    sys.exit(main(["train", *sys.argv[3:]]))
