"""timing.jsonl: tokens per second, model-FLOP utilisation, share of the time waiting for data."""

import collections
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.core import costs, dispatch
from seqzoo.config.build import build
from seqzoo.train.setup import Setup
from seqzoo.train.state import merge, structure_of

# Shapes and dtypes of a batch by name: hashable.
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


class Pauses:
    """Seconds that belong to no lap; the runs of a group share them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Time spent inside belongs to no lap."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


class Timing:
    """Measures laps from line to line of the log; evaluations and saves stand outside.

    Args:
        run: what is trained.
        path: timing.jsonl; None = write nothing.
        attempt: which start of the run this is.
        pauses: where evaluations and saves are counted; None = this run stands alone.
    """

    def __init__(
        self, run: Setup, path: pathlib.Path | None, attempt: int, pauses: Pauses | None = None
    ):
        self._run, self._path, self._attempt = run, path, attempt
        self._updates: collections.Counter[Shapes] = collections.Counter()
        self._began = self._since = time.perf_counter()
        self._pauses = pauses or Pauses()
        self._paused = self._waited = 0.0

    def start(self) -> None:
        """The first update is about to begin."""
        self._since, self._paused = time.perf_counter(), self._pauses.seconds

    def count(self, shapes: Shapes) -> None:
        """An update with a batch of these shapes was begun."""
        self._updates[shapes] += 1

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Time spent inside belongs to no lap."""
        return self._pauses.counted()

    def lap(self, step: int, waited: float) -> dict[str, Any]:
        """Ends a lap, writes its line and returns it.

        Args:
            step: updates done.
            waited: seconds that the stream of batches kept us waiting so far.

        Returns:
            seconds since the start, step_seconds, tokens_per_second, flops_per_second and mfu (of
            what the definitions of the model's operators compute, without what remat computes
            again; on a CPU relative to a matrix product measured here), data_wait (a share).
        """
        now = time.perf_counter()
        seconds = max(now - self._since - (self._pauses.seconds - self._paused), 1e-9)
        tokens = sum(n * tokens_of(shapes) for shapes, n in self._updates.items())
        flops = sum(n * update_flops(self._run, shapes) for shapes, n in self._updates.items())
        values = {
            "seconds": round(now - self._began, 3),
            "step_seconds": round(seconds / max(1, self._updates.total()), 6),
            "tokens_per_second": round(tokens / seconds, 1),
            "flops_per_second": round(flops / seconds),
            "mfu": float(f"{flops / seconds / peak_flops(self._run):.4g}"),
            "data_wait": round(min(1.0, (waited - self._waited) / seconds), 4),
        }
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "attempt": self._attempt} | values) + "\n")
        self._updates.clear()
        self._waited = waited
        self.start()
        return values


def shapes_of(batch: Mapping[str, Any]) -> Shapes:
    """The shapes of a batch (the global one)."""
    return tuple((name, a.shape, str(a.dtype)) for name, a in sorted(batch.items()))


def update_flops(run: Setup, shapes: Shapes) -> float:
    """Operations of one update, forward and backward, counted in the definitions."""
    task: Any = run.task  # a frozen dataclass: hashable
    return _flops(json.dumps(run.config["model"], sort_keys=True), task, shapes)


@functools.lru_cache(maxsize=64)
def _flops(model_json: str, task: Any, shapes: Shapes) -> float:
    node = json.loads(model_json)
    if "remat" in node:
        node["remat"] = "none"
    structure = structure_of(functools.partial(build, node))

    def loss(params, rest, batch):
        return task.sums(merge(structure.graphdef, params, rest), batch).loss

    # One row: operations are proportional to rows.
    one = {name: jax.ShapeDtypeStruct((1, *shape[1:]), dtype) for name, shape, dtype in shapes}
    params, rest = nnx.to_pure_dict(structure.params), nnx.to_pure_dict(structure.rest)
    with dispatch.counting():
        counted = costs.count_flops(jax.grad(loss), params, rest, one)
    return counted.flops * shapes[0][1][0]


def peak_flops(run: Setup) -> float:
    """What the devices of a run could do per second at best."""
    device = run.spec.mesh.devices.flat[0]
    sheet = costs.device(device.device_kind)
    if sheet is None:
        return _measured_peak()  # of the whole machine: simulated devices share it
    bfloat16 = run.config["model"].get("dtype") == "bfloat16"
    return run.spec.mesh.size * (sheet.flops if bfloat16 else sheet.flops_f32)


@functools.cache
def _measured_peak(n: int = 1024) -> float:
    """Operations per second of a float32 matrix product here, the best of a few."""
    product = jax.jit(jnp.matmul)
    a = jnp.asarray(np.ones((n, n), np.float32))
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best


def tokens_of(shapes: Shapes) -> int:
    """Tokens in a batch of these shapes, or vectors where it holds `inputs`."""
    found = {name: shape for name, shape, _ in shapes}
    return int(np.prod(found["tokens"] if "tokens" in found else found["inputs"][:-1]))


def row_length(batch: Mapping[str, Any]) -> int:
    """Tokens in a row of a batch, or vectors where it holds `inputs`; two documents count both."""
    shape = batch["tokens"].shape if "tokens" in batch else batch["inputs"].shape[:-1]
    return int(np.prod(shape[1:]))
