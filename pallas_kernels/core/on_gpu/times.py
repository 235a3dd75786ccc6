"""How long kernels take, beside the portable form and what the device can do at best.

Every candidate of a call takes its turn in every round; a round runs it often enough to be timed,
over several sets of arguments that together outgrow the caches, and waits once.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import bench, kernel_check
from pallas_kernels.core.on_gpu.numerics import (
    FORM,
    TAGS,
    How,
    config_of,
    one_row,
    small_specs,
    with_state,
)
from pallas_kernels.core.on_gpu.result import Result
from pallas_kernels.core.testing import ArgSpec, draw_case, letters_of

_CACHE = 150e6  # bytes: three times the second-level cache of a Hopper
_MOST_BYTES = 24e9  # of all sets
_DRAWN = 512  # tokens; longer calls have them again and again, or the host draws for minutes
# A batch at which a GPU is full, beside the calls of arg_specs.py.
_BATCH = 8
# Operators whose work is no matrix product.
ELEMENTWISE = ("selective_scan", "short_conv", "dilated_conv")


def rounds(how: How) -> dict[str, Any]:
    """How often it is measured."""
    return dict(rounds=1, least=0.0) if how.dry else dict(rounds=15, least=0.01)


def rates(how: How) -> Iterator[Result | str]:
    """What the device does at best: bytes copied, matrix products, exponentials per second."""
    size = 2**12 if how.dry else 2**28
    side = 64 if how.dry else 8192
    large = jnp.ones((size,), jnp.float32)
    some = jnp.linspace(0.0, 1.0, max(size // 8, 2), dtype=jnp.float32)
    many = 16 if how.dry else 128

    def exponentials(x):
        for _ in range(many):  # one pass over memory, many exponentials
            x = jnp.exp(-x)
        return x

    def product(dtype):
        x = jax.random.normal(jax.random.key(how.seed % 2**31), (side, side)).astype(dtype)
        return jnp.matmul, (x, x), 2.0 * side**3

    for name, dtype, program, given, work in (
        ("copy", "float32", lambda x: x + 1, (large,), 2.0 * large.nbytes),
        ("exponentials", "float32", exponentials, (some,), float(many * some.size)),
        ("matrix product", "bfloat16", *product("bfloat16")),
        ("matrix product", "float32", *product("float32")),
        ("a call of nothing", "float32", lambda x: x + 1, (jnp.ones(()),), 1.0),
    ):
        yield f"{name} {dtype}"
        (found,) = bench.take_turns_over_sets({"": program}, [given], **rounds(how)).values()
        if isinstance(found, Exception):
            yield Result("rates", name, dtype=dtype, status=f"WRONG: {_said(found)}")
            continue
        best = min(found.seconds)
        yield Result("rates", name, dtype=dtype, seconds=best, rate=work / best)


def calls(op: Any, how: How) -> list[ArgSpec]:
    """What is timed: the tagged calls, the primary one first and in a larger batch."""
    if how.dry:
        spec = one_row(small_specs(op)[0])
        return [dataclasses.replace(spec, sizes={**spec.sizes, "t": 16})]
    specs = kernel_check.specs_of(op, tags=TAGS)
    specs.sort(key=lambda spec: "primary" not in spec.tags)
    more = []
    for spec in specs[:1]:
        if spec.sizes["b"] < _BATCH:
            name, sizes = f"{spec.name}_b{_BATCH}", {**spec.sizes, "b": _BATCH}
            more.append(dataclasses.replace(spec, name=name, sizes=sizes))
        if op.__name__ == "selective_scan":  # the issue's
            sizes = {**spec.sizes, "b": 8, "t": 2048, "e": 2048, "n": 16}
            more.append(dataclasses.replace(spec, name="b8_l2048_d2048_n16", sizes=sizes))
    return [*specs[:1], *more, *specs[1:]]


def measure(op: Any, how: How) -> Iterator[Result | str]:
    """The times of an operator's calls."""
    for spec in calls(op, how):
        dtype = kernel_check.dtype_of(spec)
        yield f"{spec.name}"
        candidates = {
            FORM: _y(op, spec, FORM, config_of(op, how)),
            "xla": _y(op, spec, "xla", None),
        }
        if op.__name__ == "selective_scan":
            candidates["associative_scan"] = functools.partial(associative_scan, spec)
        yield from both_passes(op, spec, dtype, candidates, how)


def both_passes(
    op: Any, spec: ArgSpec, dtype: str, candidates: dict[str, Callable], how: How
) -> Iterator[Result | str]:
    """Forward, then forward and backward, of functions from the call's arrays to y."""
    sets, dys = argument_sets(op, spec, dtype, how)
    for backward in (False, True):
        part = "forward + backward" if backward else "forward"
        yield f"{spec.name} {part}"
        both = functools.partial(bench.forward_and_gradients, has_state=False)
        programs = {k: both(f) if backward else f for k, f in candidates.items()}
        if how.dry and backward:
            programs.pop(FORM, None)  # the numerics have run it; the interpreter takes its time
        given = [(dy, *one) for dy, one in zip(dys, sets, strict=True)] if backward else sets
        found = bench.take_turns_over_sets(programs, given, **rounds(how))
        cost = _cost(op, spec, dtype, backward)
        for what, took in found.items():
            row = Result("times", op.__name__, spec.name, dtype, part, what)
            row = row._replace(tokens=spec.sizes["t"], **cost)
            if isinstance(took, NotImplementedError):
                yield row._replace(status=f"refused: {_said(took)}")
            elif isinstance(took, Exception):
                yield row._replace(status=f"CRASHED: {_said(took)}")
            else:
                yield timed(row, took)


def timed(row: Result, took: bench.Measured) -> Result:
    """The row with the times of its rounds."""
    return row._replace(seconds=took.median, fastest=min(took.seconds), slowest=max(took.seconds))


def argument_sets(op: Any, spec: ArgSpec, dtype: str, how: How) -> tuple[list[tuple], list]:
    """Sets of arrays, and a cotangent of y for each, on the device.

    One set is drawn, its first tokens at least; in the others the sequences are turned, so that
    they hold other numbers of the same kind.
    """
    letters, op, t = letters_of(op), with_state(op), spec.sizes["t"]
    drawn = min(t, _DRAWN)
    case = draw_case(op, spec, drawn, dtype=dtype, fresh=True, seed=how.seed % 2**32)

    def long(x):
        return jnp.tile(x, (1, -(-t // drawn), *(1 for _ in x.shape[2:])))[:, :t]

    along = [letters[name][1:2] == ("t",) for name in case.arrays]
    pairs = zip(map(jnp.asarray, case.arrays.values()), along, strict=True)
    arrays, dy = [long(x) if of_tokens else x for x, of_tokens in pairs], long(jnp.asarray(case.dy))
    total = sum(x.nbytes for x in arrays) + dy.nbytes
    count = max(2, min(math.ceil(_CACHE / total) + 1, 8, int(_MOST_BYTES // total)))
    count = 1 if how.dry else count

    def turned(i: int) -> tuple:
        pairs = zip(arrays, along, strict=True)
        return tuple(jnp.roll(x, 7 * i, axis=1) if t else x + 0 for x, t in pairs)

    return [turned(i) for i in range(count)], [jnp.roll(dy, 5 * i, axis=1) for i in range(count)]


def _y(op: Any, spec: ArgSpec, form: str, config: Any) -> Callable:
    """A function from the call's arrays to y."""
    return functools.partial(kernel_check._y, op, spec, form, config=config)


def _cost(op: Any, spec: ArgSpec, dtype: str, backward: bool) -> dict[str, Any]:
    """The least work of a pass, by the operator's own account; both passes for "backward"."""
    known = {**spec.sizes, **spec.options, "itemsize": np.dtype(jnp.dtype(dtype)).itemsize}
    parameters = inspect.signature(op.cost).parameters
    given = {k: v for k, v in known.items() if k in parameters}
    try:
        cost = op.cost(**given)
        cost = cost + op.cost(**given, backward=True) if backward else cost
    except TypeError:
        return {}
    matrix = int(op.__name__ not in ELEMENTWISE)
    return dict(
        flops=float(cost.flops),
        bytes=float(cost.bytes),
        transcendentals=float(cost.transcendentals),
        matrix=matrix,
    )


def associative_scan(spec: ArgSpec, u, delta, A, B, C, D=None, z=None, delta_bias=None):
    """selective_scan by jax.lax.associative_scan, as one writes it without a kernel: y."""
    f32 = jnp.float32
    step = delta.astype(f32) + (0 if delta_bias is None else delta_bias)
    step = jax.nn.softplus(step) if spec.options.get("delta_softplus") else step
    decay = jnp.exp(step[..., None] * A)
    write = (step * u.astype(f32))[..., None] * B.astype(f32)[:, :, None]

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = jax.lax.associative_scan(join, (decay, write), axis=1)
    y = jnp.einsum("bten,btn->bte", h, C.astype(f32))
    y = y if D is None else y + D * u.astype(f32)
    y = y if z is None else y * jax.nn.silu(z.astype(f32))
    return y.astype(u.dtype)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:250]
