"""The one metric loop: training, `seqzoo eval` and tests all count with it."""

from typing import Any

import jax
import numpy as np

from seqzoo.data import pipeline
from seqzoo.train import mesh as meshes
from seqzoo.train import programs
from seqzoo.train.setup import Setup
from seqzoo.train.step import eval_step


def evaluate(
    run: Setup,
    params: Any,
    rest: Any,
    split: str,
    *,
    max_samples: int | None = None,
    batch_size: int | None = None,
    say=lambda text: None,
) -> dict[str, float]:
    """Returns the task's metrics over a split, every row counted once.

    Args:
        run: what is evaluated and on what data.
        params, rest: the model's arrays.
        split: "train", "valid" or "test".
        max_samples: at most so many rows, spread evenly over the split; None = all.
        batch_size: rows per batch; None = trainer.eval_batch_size, else those of a microbatch.
        say: gets announcements of compilation.
    """
    spec, trainer = run.spec, run.trainer
    micro = trainer.global_batch_size // trainer.grad_accum_steps
    rows = batch_size or trainer.eval_batch_size or micro
    meshes.check_batch(rows, spec.mesh, spec.rules, "trainer.eval_batch_size")
    function = eval_step(spec)
    sharding = meshes.batch_sharding(spec.mesh, spec.rules)
    stream = pipeline.eval_batches(
        run.data,
        split,  # type: ignore[arg-type]
        batch_size=rows,
        max_samples=max_samples,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=trainer.workers,
        prefetch=trainer.prefetch,
    )
    pending: list[dict[str, tuple[Any, Any]]] = []
    totals: dict[str, tuple[float, float]] = {}
    try:
        for host_batch in stream:
            batch = meshes.put_batch(host_batch, sharding)
            what = f"{rows} rows of {batch['tokens'].shape[1]} tokens"
            arguments = (params, rest, batch)
            program = programs.compiled(
                function, *arguments, name="evaluation", say=say, what=what
            )
            pending.append(program(*arguments))
            if len(pending) > 4:  # a few batches run ahead of what is added up
                _add(totals, pending.pop(0))
    finally:
        stream.close()
    for sums in pending:
        _add(totals, sums)
    return run.task.finish(totals)


def _add(totals: dict[str, tuple[float, float]], sums: dict[str, tuple[Any, Any]]) -> None:
    """Adds in float64: over many batches float32 would lose the last digits."""
    for name, (value, weight) in sums.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (
            before[0] + float(np.asarray(value, np.float64)),
            before[1] + float(np.asarray(weight, np.float64)),
        )
