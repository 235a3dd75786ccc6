"""The one metric loop: training, `seqzoo eval` and tests all count with it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from seqzoo.data import pipeline
from seqzoo.data.source import Batch, Split
from seqzoo.train import mesh as meshes
from seqzoo.train import programs
from seqzoo.train.metrics_log import Totals, add
from seqzoo.train.setup import Setup
from seqzoo.train.step import eval_step
from seqzoo.train.timing import row_length

_AHEAD = 4  # batches that may be computed before the oldest is added up


class Interrupted(Exception):
    """An evaluation was given up half-way."""


def evaluate(
    run: Setup,
    params: Any,
    rest: Any,
    split: Split,
    *,
    max_samples: int | None = None,
    batch_size: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    interrupt: Callable[[int], bool] = lambda batch: False,
) -> dict[str, float]:
    """Returns the task's metrics over a split, every row counted once.

    Args:
        run: what is evaluated and on what data.
        params: the model's parameters (or their moving average).
        rest: whatever else the model holds.
        split: "train", "valid" or "test".
        max_samples: so many rows, spread evenly over the split, rounded up for each shape of rows;
            None = all.
        batch_size: rows per batch; None = trainer.eval_batch_size, else those of a microbatch.
        say: gets announcements of compilation.
        interrupt: asked before each batch whether to give up.

    Raises:
        Interrupted: `interrupt` said so.
    """
    spec, trainer = run.spec, run.trainer
    rows = batch_size or trainer.eval_batch_size or run.microbatch
    meshes.check_batch(rows, spec.mesh, spec.rules, "trainer.eval_batch_size")
    sharding = meshes.batch_sharding(spec.mesh, spec.rules)
    stream = eval_stream(run, split, rows, max_samples)
    pending: list[dict[str, tuple[Any, Any]]] = []
    totals: Totals = {}
    try:
        for number, host_batch in enumerate(stream):
            if interrupt(number):
                raise Interrupted
            batch = meshes.put_batch(host_batch, sharding)
            length = row_length(host_batch)
            program = programs.compiled(
                eval_step(spec, trainer.eval_chunk_length),
                params,
                rest,
                batch,
                name="evaluation",
                say=say,
                what=f"{rows} rows of {length} tokens",
            )
            pending.append(program(params, rest, batch))
            if len(pending) > _AHEAD:
                add(totals, _fetched(pending.pop(0)))
        for sums in pending:
            add(totals, _fetched(sums))
    finally:
        stream.close()
    return run.task.finish(totals)


def eval_stream(
    run: Setup, split: Split, rows: int, max_samples: int | None
) -> pipeline.Stream[Batch]:
    """The batches of a split that this process counts."""
    part = meshes.feed(run.spec.mesh, run.spec.rules)
    return pipeline.eval_batches(
        run.data,
        split,
        batch_size=rows,
        max_samples=max_samples,
        process_index=part.index,
        process_count=part.count,
        workers=run.trainer.workers,
        prefetch=run.trainer.prefetch,
    )


def _fetched(sums: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
