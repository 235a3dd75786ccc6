"""The suite on the device: outputs, states and every gradient against float64.

Inputs are drawn anew for each report (its seed is on the page). Before the second run of a program
as much memory as its results take is filled with nan and freed, so that what a kernel does not
write shows; both runs must give the same bits.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import kernel_check
from pallas_kernels.core.on_gpu.result import Result
from pallas_kernels.core.testing import (
    ArgSpec,
    Arrays,
    Case,
    assert_close,
    draw_case,
    oracle,
    results,
    tolerance_of,
)

FORM = "pallas_gpu"
# What is compared; the last with a state before and packed documents, the first without either.
BARE, STATES, DOCUMENTS = range(3)
GIVEN = ("y, gradients", "y, states, gradients", "y, states, gradients, documents")
TAGS = frozenset({"tpu", "gpu"})
_POISON = 2 * 2**30  # bytes that are filled with nan beside those of the results


class How(NamedTuple):
    """How the work is done here.

    Attributes:
        seed: of the inputs.
        dry: interpreted on a CPU, at the smallest shapes.
        part, parts: which of how many processes that share an operator's cases this is.
    """

    seed: int
    dry: bool
    part: int = 0
    parts: int = 1


def config_of(op: Any, how: How) -> Any:
    """None on a GPU, the form's own configuration with `interpret` in a dry run."""
    if not how.dry:
        return None
    from pallas_kernels.core.gpu import GpuConfig

    found = [
        x
        for x in vars(op.forms[FORM]).values()
        if isinstance(x, type) and issubclass(x, GpuConfig) and x is not GpuConfig
    ]
    return (found[0] if found else GpuConfig)(interpret=True)


def with_state(op: Any) -> Any:
    """The operator as the suite calls it: one without a state ignores that of others."""
    if op.axes.state:
        return op

    @functools.wraps(op)
    def call(*arrays, initial_state=None, segment_ids=None, **given):
        del initial_state, segment_ids
        return op(*arrays, **given), None

    return call


def small_specs(op: Any) -> list[ArgSpec]:
    """The calls that the suite takes on a CPU too."""
    module = op.__module__.rsplit(".", 1)[0]
    specs = __import__(f"{module}.arg_specs", fromlist=["SPECS"]).SPECS
    return [s for s in specs if s.tags & {"test", "extreme"}]


def one_row(spec: ArgSpec) -> ArgSpec:
    """The call with one sequence: for the interpreter, which takes its time."""
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1})


def check(op: Any, how: How) -> Iterator[Result | str]:
    """The findings about an operator, and what is done next."""
    small = small_specs(op)
    if how.dry:
        spec = one_row(small[0])
        for dtype in ("float32", "bfloat16"):  # matrix units take no float32
            yield f"{spec.name}, 16 tokens, {dtype}"
            found = _one(op, spec, 16, dtype, STATES, how)
            yield found
            if not found.status.startswith("refused"):
                break
        return
    primary = kernel_check.specs_of(op, primary=True, tags=TAGS)
    wide = [s for s in kernel_check.specs_of(op, tags=TAGS) if s.name.endswith("_f32")]
    cases = []
    for spec in (*primary[:1], *wide[:1]):
        length, dtype = spec.sizes["t"], kernel_check.dtype_of(spec)
        for given in (BARE, DOCUMENTS) if op.axes.state and spec in primary else (BARE,):
            cases.append((spec, length, dtype, given, "xla"))
    for spec in small:
        for dtype in ("float32", "bfloat16"):
            cases.append((spec, 130, dtype, DOCUMENTS, "reference"))
    for spec, length, dtype, given, oracle_form in cases[how.part :: how.parts]:
        yield f"{spec.name}, {dtype}, {GIVEN[given]}"
        yield _one(op, spec, length, dtype, given, how, wide=oracle_form)


def _one(
    op: Any,
    spec: ArgSpec,
    length: int,
    dtype: str,
    given: int,
    how: How,
    *,
    wide: str = "reference",
) -> Result:
    """One call, with documents and a state as `given` says, or with fewer of them if refused."""
    op = with_state(op)
    name = f"{spec.name} t={length}"
    row = Result("numerics", op.__name__, name, dtype, what=FORM)
    draw = functools.partial(draw_case, op, spec, length, dtype=dtype, seed=how.seed % 2**32)
    given = given if op.axes.state else BARE
    refusals = []
    for fewer in range(given, -1, -1):
        part = GIVEN[fewer]
        case = draw(documents=fewer == DOCUMENTS)
        if fewer == BARE:
            case = case._replace(state=None, dstate=jax.tree.map(np.zeros_like, case.dstate))
        try:
            return _compared(op, spec, case, row._replace(part=part), how, wide)
        except NotImplementedError as refusal:
            refusals.append(" ".join(str(refusal).split()))
        except Exception as error:  # what breaks is the finding
            text = " ".join(str(error).split())[:300]
            return row._replace(part=part, status=f"CRASHED: {type(error).__name__}: {text}")
    return row._replace(part=GIVEN[given], status=f"refused: {refusals[-1][:200]}")


def _compared(op: Any, spec: ArgSpec, case: Case, row: Result, how: How, wide: str) -> Result:
    """The row with what a case showed."""
    run = results(op, spec, implementation=FORM, config=config_of(op, how))
    got = run(case)
    expected = _oracle(op, spec, wide)(case)
    error, allowed = _worst(got, expected, row.dtype)
    row = row._replace(error=error, allowed=allowed)
    if not how.dry:
        _poison(got)
        if differ := _differ(op, got, run(case), expected, row.dtype):
            return row._replace(status=f"WRONG: a second run over poisoned memory {differ[:250]}")
    for name, array in got.items():
        if not np.all(np.isfinite(array.astype(np.float64))):
            return row._replace(status=f"WRONG: {name} is not finite")
    try:
        assert_close(got, expected, row.dtype, implementation=FORM)
    except AssertionError as differences:
        text = " / ".join(str(differences).splitlines())
        return row._replace(status=f"WRONG: {text[:300]}")
    return row


def _differ(op: Any, got: Arrays, again: Arrays, expected: Arrays, dtype: str) -> str | None:
    """What is wrong with a second run: other bits. Of a library's kernel, which may add up in
    another order, what is not as near as it has to be."""
    if getattr(op.forms[FORM], "library", None):
        try:
            assert_close(again, expected, dtype, implementation=FORM)
        except AssertionError as differences:
            return f"is wrong: {' / '.join(str(differences).splitlines())}"
        return None
    names = [k for k in got if got[k].tobytes() != again[k].tobytes()]
    return f"differs in {', '.join(names)}" if names else None


def _oracle(op: Any, spec: ArgSpec, form: str) -> Any:
    """The reference in float64 on the CPU; for long sequences the portable form on the device."""
    if form == "reference":
        run = oracle(op, spec)

        def on_cpu(case: Case) -> Arrays:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                return run(case)

        return on_cpu
    run = results(op, spec, implementation=form)

    def in_float64(case: Case) -> Arrays:
        wide = lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        with jax.enable_x64(True):
            return run(jax.tree.map(wide, case))

    return in_float64


def _worst(got: Arrays, expected: Arrays, dtype: str) -> tuple[float, float]:
    """The relative root mean square error that is nearest to, or furthest over, what is allowed."""
    tolerance = tolerance_of(dtype, FORM)
    found = [(0.0, tolerance.rms)]
    for name, want in expected.items():
        if not jnp.issubdtype(want.dtype, jnp.floating) or not want.size:
            continue
        have, want = got[name].astype(np.float64), want.astype(np.float64)
        scale = max(float(np.sqrt(np.mean(want**2))), 1e-5)
        error = float(np.sqrt(np.mean((have - want) ** 2))) / scale
        allowed = tolerance.rms * (tolerance.gradients if name.startswith("grad") else 1)
        found.append((error, allowed))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _poison(like: Arrays) -> None:
    """Fills memory that the next program's results will take with nan."""
    floats = [x for x in like.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    arrays = [jnp.full(x.shape, jnp.nan, x.dtype) for x in floats]
    arrays.append(jnp.full((_POISON // 4,), jnp.nan, jnp.float32))
    for array in arrays:
        array.block_until_ready()
        array.delete()
