"""What is asked of an operator's kernels without their device: that they compile, at what cost.

For each tagged call of an operator (arg_specs.py) and device, two rows as a model trains with
it, without documents or a state before or after: "forward", which saves what the backward pass
needs, and "backward". And a row "documents, state" with packed documents, a state before and after,
and their gradients, or "documents" where the kernel takes no state: that it compiles, and whether
a kernel is in its backward pass.

Programs take and give heads side by side (`[b t h*k]`), as projections make and take them: what an
operator's form turns or regroups beyond that is its own cost.

The bytes of a pass are those of its kernels by their BlockSpecs (on a GPU by the copies in their
bodies) and those of XLA's own passes in the compiled program. The minimum: forward, every argument
read and y written once; backward, the arguments, the cotangent of y and what was saved read, and
the gradients written once.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import aot, bench, dispatch, unwritten
from pallas_kernels.core.blocks import Kernel
from pallas_kernels.core.kernel_table import COMPILED, FORWARD_ONLY, Row
from pallas_kernels.core.testing import ArgSpec, letters_of, required
from pallas_kernels.core.tpu import generation
from pallas_kernels.core.traffic import made_by_kernels, of_jaxpr

KERNEL = "pallas_tpu"
TAG, PRIMARY = "tpu", "primary"
# Names of kernels of a backward pass: ours on either platform, and those of jax's own attention.
_BACKWARD = re.compile("backward|_gradients?$|_states_back$|_lags$|_bwd|_dkv|_dq")


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled, for what, and how its rows are filled.

    Attributes:
        form: of an operator: "pallas_tpu", "pallas_gpu".
        platform: whose branch of jax.lax.platform_dependent counts: "tpu", "cuda".
        tags: calls with one of them are compiled.
        compile: as aot.compile_for.
        blank: a row without findings, of stack, operator, call, dtype, device kind.
        filled: the rows of a pass that compiled, the pass's own first: of that row as far as it is
            known, the machine code of the program's kernels (the forward pass's too), the kernels
            of the pass as they were counted, device kind.
    """

    form: str
    platform: str
    tags: frozenset[str]
    compile: Callable
    blank: Callable
    filled: Callable


def has_kernel(op: Callable, form: str = KERNEL) -> bool:
    """Whether a kernel of this operator is written."""
    return op.forms[form].run is not unwritten.run  # type: ignore[attr-defined]


def specs_of(
    op: Callable, *, primary: bool = False, tags: frozenset[str] = frozenset({TAG})
) -> list[ArgSpec]:
    """The calls of real models that the operator is compiled at."""
    folder = op.__module__.rsplit(".", 1)[0]
    specs = importlib.import_module(f"{folder}.arg_specs").SPECS
    return [s for s in specs if tags & s.tags and (not primary or PRIMARY in s.tags)]


def dtype_of(spec: ArgSpec) -> str:
    """The dtype of arguments along time: float32 where the name ends in _f32, else bfloat16."""
    return "float32" if spec.name.endswith("_f32") else "bfloat16"


def arguments(op: Callable, spec: ArgSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a call, by name; parameters are in float32."""
    letters, found = letters_of(op), {}
    for name in (*required(op), *spec.given):
        shape = tuple(spec.sizes[x] for x in letters[name])
        dtype = dtype_of(spec) if "t" in letters[name] else "float32"
        found[name] = jax.ShapeDtypeStruct(shape, dtype)
    return found


def check(
    op: Callable,
    spec: ArgSpec,
    device: Any,
    *,
    stack: str,
    target: Target,
    xla: bool = True,
    documents: bool = True,
    dumps: pathlib.Path | None = None,
) -> Iterator[Any]:
    """Compiles a call for a device and counts it; yields rows of the target's table.

    Args:
        op: the operator.
        spec: the call.
        device: a compile-only one.
        stack: versions, for the rows.
        target: the platform.
        xla: whether to compile the portable form beside it, for its memory.
        documents: whether to compile it with documents and a state as well.
        dumps: the folder that `prepare` of aot or aot_gpu was given.
    """
    kind, form = device.device_kind, target.form
    blank = target.blank(stack, op.__name__, spec.name, dtype_of(spec), kind)
    arrays, y = tuple(arguments(op, spec).values()), _result(op, spec)
    try:
        passes = counted(op, spec, target, kind)
    except Exception as error:  # a refusal, or a kernel that cannot be traced, is the finding
        yield blank._replace(part="forward", status=_short(error))
        return
    compiled = functools.partial(_compiled, target, device, dumps=dumps)
    flat, program = tuple(map(_flat, arrays)), functools.partial(_flat_y, op, spec, form)
    one = passes["forward"]
    ahead, rows = compiled(_counts(blank._replace(part="forward"), one), program, flat, one.kernels)
    yield from rows
    both = functools.partial(bench.forward_and_gradients, has_state=False)
    one = passes["backward"]
    row = _counts(blank._replace(part="backward"), one)
    _, rows = compiled(row, both(program), (_flat(y), *flat), one.kernels, without=ahead)
    if xla and rows[0].status == COMPILED:
        other = both(functools.partial(_flat_y, op, spec, "xla"))
        found = target.compile(device, other, _flat(y), *flat)
        rows[0] = rows[0]._replace(xla_temp=found.temp, xla_peak=found.peak)
    yield from rows
    if documents and "segment_ids" in inspect.signature(op).parameters:
        for part in ("documents, state", "documents"):
            packed, shapes = _with_documents(op, spec, arrays, form, has_state="state" in part)
            _, rows = compiled(blank._replace(part=part), packed, shapes)
            if not rows[0].status.startswith("refused"):
                break
        yield from rows


def _call(op: Callable, spec: ArgSpec, implementation: str, *arrays: Any, **more: Any) -> Any:
    names = (*required(op), *spec.given)
    given = dict(zip(names, arrays, strict=True))
    return op(**given, **spec.options, **more, implementation=implementation)


def _y(op: Callable, spec: ArgSpec, implementation: str, *arrays: Any, **more: Any) -> Any:
    found = _call(op, spec, implementation, *arrays, **more)
    return found[0] if op.axes.state else found  # type: ignore[attr-defined]


def _flat(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """`[b t h k]` as `[b t h*k]`."""
    if len(shape.shape) < 4:
        return shape
    sizes = (*shape.shape[:2], math.prod(shape.shape[2:]))
    return jax.ShapeDtypeStruct(sizes, shape.dtype)


def _flat_y(op: Callable, spec: ArgSpec, implementation: str, *arrays: jax.Array) -> jax.Array:
    """y of a call whose arrays, and y itself, have heads side by side."""
    shapes = arguments(op, spec).values()
    given = (x.reshape(shape.shape) for x, shape in zip(arrays, shapes, strict=True))
    y = _y(op, spec, implementation, *given)
    return y.reshape(_flat(y).shape)


def _result(op: Callable, spec: ArgSpec) -> Any:
    """Shape and dtype of y."""
    arrays = arguments(op, spec).values()
    return jax.eval_shape(functools.partial(_y, op, spec, "xla"), *arrays)


class Pass(NamedTuple):
    """The kernels of a pass, the least that it could move, and what is saved for it."""

    kernels: tuple[Kernel, ...]
    least: float
    saved: float

    @property
    def bytes(self) -> float:
        return sum(one.bytes for one in self.kernels)


def counted(op: Callable, spec: ArgSpec, target: Target, kind: str) -> dict[str, Pass]:
    """Both passes of a call, traced and not compiled.

    Raises:
        NotImplementedError: the form refuses the call.
    """
    arrays = tuple(arguments(op, spec).values())
    with dispatch.compiling_for(kind):
        traced = trace_passes(functools.partial(_y, op, spec, target.form), arrays)
    return count_passes(*traced, arrays, _result(op, spec), platform=target.platform)


def trace_passes(forward: Callable, arrays: tuple) -> tuple[Any, Any]:
    """The jaxprs of the forward pass, with what it saves behind y, and of both passes."""
    y = jax.eval_shape(forward, *arrays)

    def both(dy, *arrays):
        y, pull = jax.vjp(forward, *arrays)
        return y, pull(dy)

    ahead = jax.make_jaxpr(lambda *a: jax.vjp(forward, *a))(*arrays)
    return ahead, jax.make_jaxpr(both)(y, *arrays)


def count_passes(
    ahead: Any, both: Any, arrays: tuple, y: Any, *, platform: str = "tpu"
) -> dict[str, Pass]:
    """Counts both passes as `trace_passes` gave them: kernels of the forward pass come first."""
    moved, saved = sum(map(_bytes, arrays)), _saved(ahead, platform)
    first = of_jaxpr(ahead, platform=platform).kernels
    back = of_jaxpr(both, platform=platform).kernels[len(first) :]
    return {
        "forward": Pass(first, moved + _bytes(y), saved),
        "backward": Pass(back, 2 * moved + _bytes(y) + saved, saved),
    }


def _saved(closed: Any, platform: str) -> float:
    """Bytes of what the kernels of a forward pass make and hand to the backward pass.

    Arguments that are handed on, turned or padded or not, are no savings of theirs.
    """
    kept = {id(v): v.bytes for v, made in made_by_kernels(closed, platform=platform)[1:] if made}
    return sum(kept.values())


def _with_documents(
    op: Callable, spec: ArgSpec, arrays: tuple, form: str, *, has_state: bool
) -> tuple[Callable, tuple]:
    """Forward and every gradient of a call with packed documents, and a state before and after."""
    results = jax.eval_shape(functools.partial(_call, op, spec, "xla"), *arrays)
    state = results[1] if has_state and op.axes.state else None  # type: ignore[attr-defined]
    results = results if has_state or not op.axes.state else results[0]  # type: ignore[attr-defined]
    ids = jax.ShapeDtypeStruct((spec.sizes["b"], spec.sizes["t"]), jnp.int32)

    def program(dresults, ids, state, *arrays):
        leaves, tree = jax.tree.flatten(state)
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        floats = [x for x, f in zip(leaves, floating, strict=True) if f]

        def run(floats, *arrays):
            rest = iter(floats)
            given = [next(rest) if f else x for x, f in zip(leaves, floating, strict=True)]
            more = dict(segment_ids=ids)
            if state is not None:
                more["initial_state"] = jax.tree.unflatten(tree, given)
            found = _call(op, spec, form, *arrays, **more)
            if not has_state and op.axes.state:  # type: ignore[attr-defined]
                found = found[0]
            return [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]

        found, pull = jax.vjp(run, floats, *arrays)
        return found, pull(dresults)

    cotangents = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
    return program, (cotangents, ids, state, *arrays)


def _counts(row: Any, one: Pass) -> Any:
    return row._replace(bytes=int(one.bytes), minimum=int(one.least), saved=int(one.saved))


def _compiled(
    target: Target,
    device: Any,
    row: Any,
    program: Callable,
    given: tuple,
    counted: tuple[Kernel, ...] = (),
    *,
    dumps: pathlib.Path | None,
    without: Any = None,
) -> tuple[Any, list]:
    """Compiles a program into rows; XLA's passes of the program `without` are another row's."""
    try:
        found = target.compile(device, program, *given, dumps=dumps)
    except Exception as error:  # whatever the compiler says is the finding
        return None, [row._replace(status=_short(error))]
    kernels = found.kernels
    if not kernels:
        return None, [row._replace(status="no Pallas call in the program")]
    around = max(0, int(found.around - (without.around if without else 0)))
    # Whatever comes before it in the program: a backward pass that fell to xla has no kernel.
    both = row.part == "forward" or any(_BACKWARD.search(k.name) for k in kernels)
    row = row._replace(
        status=COMPILED if both else FORWARD_ONLY,
        bytes=None if row.bytes is None else row.bytes + around,
        around=around,
        temp=found.temp,
        peak=found.peak,
        seconds=round(found.seconds, 1),
    )
    return found, target.filled(row, kernels, counted, device.device_kind)


def _tpu_blank(stack: str, operator: str, call: str, dtype: str, kind: str) -> Row:
    return Row(stack, operator, call, dtype, generation(kind).name, "")


def _tpu_filled(row: Row, kernels: tuple, counted: tuple[Kernel, ...], kind: str) -> list[Row]:
    """One row: sums over the kernels, and the vector memory of the one nearest to its limit."""
    del counted
    if row.part == "backward":  # the forward pass has a row of its own
        kernels = tuple(k for k in kernels if _BACKWARD.search(k.name)) or kernels
    default = generation(kind).scoped_vmem
    limits = [k.limit or default for k in kernels]
    tightest = max(range(len(kernels)), key=lambda i: kernels[i].vmem / limits[i])
    told = all(k.bundles is not None for k in kernels)
    total = lambda field: sum(getattr(k, field) for k in kernels) if told else None
    row = row._replace(
        kernels=" ".join(k.name for k in kernels),
        vmem=kernels[tightest].vmem,
        limit=limits[tightest],
        raised=int(limits[tightest] > default),
        bundles=total("bundles"),
        fills=total("fills"),
        spills=total("spills"),
        inner=total("inner"),
    )
    return [row]


TPU = Target(KERNEL, "tpu", frozenset({TAG}), aot.compile_for, _tpu_blank, _tpu_filled)


def _short(error: Exception) -> str:
    """What a compiler said, on one line; of vector memory that does not suffice the sizes."""
    text = " ".join(str(error).split())
    sizes = re.search(r"size ([\d.]+[KMG]) and limit ([\d.]+[KMG])", text)
    if sizes and "vmem" in text:
        kernel = re.search(r"for %(\S+) =", text)
        whose = f"{kernel[1]} needs" if kernel else "needs"
        return f"too much vector memory: {whose} {sizes[1]} of {sizes[2]}"
    what = "refused" if isinstance(error, NotImplementedError) else type(error).__name__
    return f"{what}: {text}"[:300]


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape)) * aval.dtype.itemsize
