"""Measuring which tile sizes of a kernel are the fastest on the device at hand."""

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import bench, dispatch, tuned
from pallas_kernels.core.config import Config
from pallas_kernels.core.testing import ArgSpec, draw_case, required


class Tried(NamedTuple):
    """One configuration: milliseconds of forward and gradients, or why it was passed over."""

    config: Config
    milliseconds: float | None
    reason: str = ""


def tune(
    op: Callable,
    spec: ArgSpec,
    implementation: str,
    *,
    dtype: str = "bfloat16",
    rounds: int = 9,
    interpret: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], list[Tried]]:
    """Times the candidates of a kernel for one call, in turns.

    Args:
        op: the operator.
        spec: the call, with t among its sizes.
        implementation: "pallas_tpu" or "pallas_gpu".
        dtype: of arguments along time.
        rounds: how often each candidate runs.
        interpret: runs the kernels by interpretation: the figures mean nothing; for tests.
        say: gets a line per candidate.

    Returns:
        The entry for a table (core/tuned.py), and all that was tried.

    Raises:
        NotImplementedError: the kernel does not serve this call here.
        RuntimeError: no candidate runs.
    """
    case = draw_case(op, spec, spec.sizes["t"], dtype=dtype)
    arrays = tuple(jnp.asarray(case.arrays[n]) for n in (*required(op), *spec.given))
    dy = jnp.asarray(case.dy)

    def program(config: Config | None) -> Callable:
        def call(*arrays):
            named = dict(zip((*required(op), *spec.given), arrays, strict=True))
            return op(**named, **spec.options, implementation=implementation, config=config)

        has_state = bool(op.axes.state)  # type: ignore[attr-defined]
        return bench.forward_and_gradients(call, has_state=has_state)

    start = config_class(op, implementation)(interpret=True) if interpret else None
    with tuned.asked() as found:
        jax.eval_shape(program(start), dy, *arrays)
    asked = found[0]
    of_kind = asked.device_kind or dispatch.device_kind()
    cls: Any = asked.config
    configs = cls.candidates(asked.sizes, of_kind)
    if interpret:
        configs = [dataclasses.replace(one, interpret=True) for one in configs]

    tried: list[Tried] = []
    programs: dict[Config, Any] = {}
    for config in configs:
        try:
            programs[config] = bench.compile_(program(config), dy, *arrays)[0]
            jax.block_until_ready(programs[config](dy, *arrays))
        except Exception as error:  # too much memory, tiles that do not fit: on to the next
            programs.pop(config, None)
            tried.append(Tried(config, None, " ".join(str(error).split())[:200]))
            say(f"{_text(config)}: passed over: {tried[-1].reason}")
    if not programs:
        raise RuntimeError(f"{op.__name__}: no candidate runs; the last: {tried[-1].reason}")
    for config, seconds in _in_turns(programs, (dy, *arrays), rounds).items():
        tried.append(Tried(config, 1e3 * float(np.median(seconds))))
        say(f"{_text(config)}: {tried[-1].milliseconds:.3f} ms")
    times = [one for one in tried if one.milliseconds is not None]
    best = min(times, key=lambda one: one.milliseconds or 0.0)
    heuristic = next((one for one in times if one.config == configs[0]), None)
    entry = {
        "form": tuned.form_of(cls),
        "sizes": asked.sizes,
        "fields": _fields(best.config),
        "milliseconds": best.milliseconds,
        "heuristic_milliseconds": heuristic.milliseconds if heuristic else None,
        "dtype": dtype,
        "jax": jax.__version__,
        "call": spec.name,
    }
    return entry, tried


def _in_turns(programs: dict[Config, Any], arguments: tuple, rounds: int) -> dict:
    """Seconds of each call; each program runs once per round, so that drifts hit all alike."""
    seconds: dict[Config, list[float]] = {config: [] for config in programs}
    for _ in range(rounds):
        for config, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[config].append(time.perf_counter() - began)
    return seconds


def config_class(op: Callable, implementation: str) -> type[Config]:
    """The configuration class of a form."""
    form = op.forms[implementation]  # type: ignore[attr-defined]
    for one in vars(form).values():
        if isinstance(one, type) and issubclass(one, Config) and one.__module__ == form.__name__:
            return one
    raise LookupError(f"{form.__name__} has no configuration class")


def specs_for(op: Callable, implementation: str) -> list[ArgSpec]:
    """The calls to measure: of real models on this platform, else those of the benchmarks."""
    folder = op.__module__.rsplit(".", 1)[0]
    specs = importlib.import_module(f"{folder}.arg_specs").SPECS
    tag = implementation.removeprefix("pallas_")
    return [s for s in specs if tag in s.tags] or [s for s in specs if "bench" in s.tags]


def platform_kernel() -> str | None:
    """The kernels' form for the devices of this machine, or None."""
    platform = dispatch.platform_of(dispatch.device_kind())
    return next((form for form, of in dispatch.KERNELS.items() if of == platform), None)


def _fields(config: Config) -> dict[str, Any]:
    """Tile sizes: what a configuration says beyond where and how it runs."""
    found = dataclasses.asdict(config)
    return {k: v for k, v in found.items() if k not in ("interpret", "device_kind")}


def _text(config: Config) -> str:
    return ", ".join(f"{k}={v}" for k, v in _fields(config).items() if v is not None)
