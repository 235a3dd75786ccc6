"""Measuring operators: candidates take turns, so that a busy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.costs import Device


class Measured(NamedTuple):
    """What a compiled program took.

    Attributes:
        seconds: of each call, in the order of the rounds.
        temp_bytes: temporaries that the compiler plans for.
        argument_bytes: of the arguments.
        output_bytes: of the results.
        compile_seconds: to lower and compile.
    """

    seconds: tuple[float, ...]
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    compile_seconds: float

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def forward_and_gradients(op: Callable, *, has_state: bool = True) -> Callable:
    """A function of (cotangent, *arrays) that runs op and gives y and the gradient of each array.

    Args:
        op: `op(*arrays) -> (y, state)`, or y alone without a state.
        has_state: whether there is one.
    """

    def program(cotangent, *arrays):
        def run(*arrays):
            return op(*arrays)[0] if has_state else op(*arrays)

        y, pull = jax.vjp(run, *arrays)
        return y, pull(cotangent.astype(y.dtype))

    return program


def compile_(function: Callable, *arguments: Any) -> tuple[Any, Measured]:
    """Compiles for these arguments (arrays or ShapeDtypeStructs) and asks what memory it needs."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    return compiled, Measured(
        (),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        seconds,
    )


def take_turns(
    candidates: Mapping[str, Callable], arguments: tuple, *, rounds: int = 9, pause: float = 0.0
) -> dict[str, Measured]:
    """Compiles the candidates, warms them up, then runs each once per round.

    Args:
        candidates: functions of the same arguments, by name.
        arguments: arrays.
        rounds: how many; nine at least give a median worth quoting.
        pause: seconds before each call. Hundreds of megabytes that one candidate used go back to
            the system after it has ended, at the expense of the next.

    Returns:
        What each took, by name.
    """
    compiled = {name: compile_(function, *arguments) for name, function in candidates.items()}
    for program, _ in compiled.values():
        jax.block_until_ready(program(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (program, _) in compiled.items():
            time.sleep(pause)
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - started)
    return {
        name: measured._replace(seconds=tuple(seconds[name]))
        for name, (_, measured) in compiled.items()
    }


def take_turns_over_sets(
    candidates: Mapping[str, Callable],
    sets: Sequence[tuple],
    *,
    rounds: int = 15,
    least: float = 0.01,
) -> dict[str, Measured | Exception]:
    """As `take_turns` on a device that works while Python goes on.

    In each round a candidate is called over the sets in turn, as often as takes `least` seconds,
    and waited for once: starting a call costs what many a kernel takes.

    Args:
        candidates: functions of the same arguments, by name.
        sets: sets of arguments; together they should outgrow the caches.
        rounds: how many.
        least: seconds of a candidate's part of a round; 0 = one call.

    Returns:
        What each took per call, by name; of one that cannot be compiled or run its exception.
    """

    def compiled(function: Callable) -> Any:
        try:
            program, measured = compile_(function, *sets[0])
            for given in (*sets, sets[0]) if least else sets[:1]:
                jax.block_until_ready(program(*given))
            return program, measured
        except Exception as error:  # a kernel that fails is a finding about it alone
            return error

    found: dict[str, Any] = {name: compiled(function) for name, function in candidates.items()}
    ready = {name: one for name, one in found.items() if not isinstance(one, Exception)}
    counts: dict[str, int] = {}
    for name, (program, _) in ready.items():
        started = time.perf_counter()
        if least:
            jax.block_until_ready(program(*sets[0]))
        once = max(time.perf_counter() - started, 1e-6)
        counts[name] = min(max(len(sets), round(least / once)), 500) if least else 1
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (program, _) in ready.items():
            started = time.perf_counter()
            result = None
            for i in range(counts[name]):
                result = program(*sets[i % len(sets)])
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - started) / counts[name])
    return {
        name: one if isinstance(one, Exception) else one[1]._replace(seconds=tuple(seconds[name]))
        for name, one in found.items()
    }


def times_faster(slow: Measured, fast: Measured) -> float:
    """Median over the rounds of slow's time by fast's."""
    return float(np.median(np.divide(slow.seconds, fast.seconds)))


def this_machine(*, megabytes: int = 64, rounds: int = 9) -> Device:
    """What this machine does at best, measured: for one that is in no table (a CPU).

    A large copy for bytes (what is read and what is written count), a float32 matrix product, and
    an exponential of an array that stays in the cache.
    """
    large = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    square = jnp.ones((1024, 1024), jnp.float32)
    small = jnp.ones((2**18,), jnp.float32)
    # Many passes over the small array in one call, or the call itself is what is measured.
    passes = lambda f: lambda x: jax.lax.fori_loop(0, 50, lambda _, x: f(x), x)
    best = lambda f, x: min(take_turns({"": f}, (x,), rounds=rounds)[""].seconds)
    product = 2 * 1024**3 / best(lambda x: x @ x, square)
    exponentials = 50 * small.size / best(passes(lambda x: jnp.exp(-x)), small)
    return Device(
        flops=product,
        flops_f32=product,
        bandwidth=2 * large.nbytes / best(lambda x: x + 1, large),
        transcendentals=exponentials,
    )
