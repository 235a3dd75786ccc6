"""The metric loop for several runs of one program at once, batched over their places."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqzoo.train import programs
from seqzoo.train.evaluate import Interrupted, eval_stream
from seqzoo.train.metrics_log import Totals, add
from seqzoo.train.setup import Setup
from seqzoo.train.step import Spec, eval_step
from seqzoo.train.timing import row_length


@functools.lru_cache(maxsize=64)
def group_eval_step(spec: Spec, chunk_length: int | None):
    """The jitted evaluation of a batch of each place: `(params, rest, batches) -> sums`."""
    whole = NamedSharding(spec.mesh, PartitionSpec())
    one = eval_step(spec, chunk_length).__wrapped__
    return jax.jit(jax.vmap(one), out_shardings=whole)


def evaluate_group(
    runs: Mapping[int, Setup],
    params: Any,
    rest: Any,
    *,
    n: int,
    say: Callable[[str], None] = lambda text: None,
    interrupt: Callable[[], bool] = lambda: False,
) -> dict[int, dict[str, float]]:
    """Returns the metrics of runs over their valid splits, every row counted once.

    Args:
        runs: by place; alike but for what a group may differ in.
        params: of all n places.
        rest: the same of whatever else the models hold.
        n: places.
        say: gets announcements of compilation.
        interrupt: asked before each batch whether to give up.

    Raises:
        Interrupted: `interrupt` said so.
    """
    first = next(iter(runs.values()))
    spec, trainer = first.spec, first.trainer
    rows = trainer.eval_batch_size or first.microbatch
    whole = NamedSharding(spec.mesh, PartitionSpec())
    data = {run.data: run for run in runs.values()}
    streams = {key: eval_stream(run, "valid", rows, trainer.eval_samples)
               for key, run in data.items()}  # fmt: skip
    totals: dict[int, Totals] = {place: {} for place in runs}
    pending: list[Any] = []

    def count(sums: Any) -> None:
        found = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        for place, of_place in totals.items():
            add(of_place, {name: (v[place], w[place]) for name, (v, w) in found.items()})

    try:
        for batches in zip(*streams.values(), strict=True):
            if interrupt():
                raise Interrupted
            by_data = dict(zip(streams, batches, strict=True))
            hosts = [by_data[runs.get(place, first).data] for place in range(n)]
            host = jax.tree.map(lambda *a: np.stack(a), *hosts)
            batch = jax.device_put(host, whole)
            program = programs.compiled(
                group_eval_step(spec, trainer.eval_chunk_length),
                *(params, rest, batch),
                name=f"evaluation of {n} runs",
                what=f"{n} runs, {rows} rows of {row_length(hosts[0])} tokens each",
                say=say,
            )
            pending.append(program(params, rest, batch))
            if len(pending) > 1:  # the next one is computed meanwhile
                count(pending.pop(0))
        for sums in pending:
            count(sums)
    finally:
        for stream in streams.values():
            stream.close()
    return {place: run.task.finish(totals[place]) for place, run in runs.items()}
