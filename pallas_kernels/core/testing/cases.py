"""The calls that operators are tested with: drawn from `arg_specs`, run, and run by the oracle."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One kind of call, at sizes that have a name: for tests and for benchmarks.

    Attributes:
        name: what it stands for.
        sizes: axis letters with sizes; `t` only where a benchmark needs one.
        draw: gives an argument's values from its name, shape and a generator.
        given: the optional arguments that are there.
        options: static keywords.
        tags: "test", "extreme" (values at the edge of the domain), "bench"; "tpu" (a call of a
            real model, compiled for TPUs by `make check-tpu-full` and for GPUs by `make
            check-gpu-full`; "gpu": for GPUs alone), with "primary" for the one of an operator
            that `make check-tpu` and `make check-gpu` compile.
        settle: makes of a state of random floats and zero integers, and a generator, one that a
            stream can be in; None = it is one.
    """

    name: str
    sizes: Mapping[str, int]
    draw: Callable[[str, tuple[int, ...], np.random.Generator], np.ndarray]
    given: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: frozenset[str] = frozenset({"test"})
    settle: Callable[[Any, np.random.Generator], Any] | None = None


class Case(NamedTuple):
    """Numbers for one call.

    Attributes:
        arrays: arguments by name.
        state: the state before, the operator's own class.
        segment_ids: int32 `[b t]` or None.
        dy: cotangent of y.
        dstate: cotangents of the floating-point fields of the state after, by their place.
    """

    arrays: Arrays
    state: Any
    segment_ids: np.ndarray | None
    dy: np.ndarray
    dstate: Arrays


def letters_of(op: Callable) -> dict[str, tuple[str, ...]]:
    """The axis letters of each positional argument, by name."""
    names = list(inspect.signature(op).parameters)
    declared = op.axes.arguments  # type: ignore[attr-defined]
    return dict(zip(names, declared, strict=False))


def names_along_time(op: Callable, spec: ArgSpec) -> tuple[str, ...]:
    """The arguments of a call that have a time axis."""
    letters = letters_of(op)
    return tuple(n for n in (*required(op), *spec.given) if "t" in letters[n])


def required(op: Callable) -> tuple[str, ...]:
    """Arguments without a default."""
    parameters = inspect.signature(op).parameters
    return tuple(n for n in letters_of(op) if parameters[n].default is inspect.Parameter.empty)


def draw_case(
    op: Callable,
    spec: ArgSpec,
    length: int,
    *,
    dtype: str = "float32",
    documents: bool = False,
    fresh: bool = False,
    seed: int = 0,
) -> Case:
    """Draws a call; numbers are exact in dtype, whatever they are computed in later.

    Args:
        op: the operator.
        spec: sizes and what is given.
        length: t.
        dtype: of arguments along time; parameters have it too, but float32 at least.
        documents: packed documents and padding, else one document.
        fresh: whether the state before is zeros.
        seed: of the generator.
    """
    rng = np.random.default_rng([seed, length])
    sizes = {**spec.sizes, "t": length}
    letters = letters_of(op)
    arrays = {}
    for name in (*required(op), *spec.given):
        shape = tuple(sizes[x] for x in letters[name])
        of = dtype if "t" in letters[name] else jnp.promote_types(dtype, jnp.float32)
        arrays[name] = np.asarray(spec.draw(name, shape, rng)).astype(of)
    with jax.enable_x64(dtype == "float64"):
        y, state = jax.eval_shape(functools.partial(op, **spec.options), **arrays)

    def before(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(x.shape, x.dtype)
        values = rng.normal(size=x.shape)
        return (values * (not fresh)).astype(x.dtype)

    state_before = jax.tree.map(before, state)
    if spec.settle is not None and not fresh:
        state_before = spec.settle(state_before, rng)
    segment_ids = None
    if documents:
        segment_ids, last_id = packed_rows(sizes["b"], length, rng)
        if hasattr(state_before, "last_id"):
            last_id = np.zeros_like(last_id) if fresh else last_id
            state_before = state_before._replace(last_id=last_id)
    return Case(
        arrays,
        state_before,
        segment_ids,
        dy=rng.normal(size=y.shape).astype(y.dtype),
        dstate={
            k: rng.normal(size=v.shape).astype(v.dtype) for k, v in float_fields(state).items()
        },
    )


def packed_rows(b: int, t: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of documents, and the id that the state before each carries.

    Row 0 goes on with the document of the state; row 1 begins another one; row 2 is padding; all
    others begin with padding. Padding also stands between documents and at the end.
    """
    ids = np.zeros((b, t), np.int32)
    last_id = np.zeros((b,), np.int32)
    for row in range(b):
        if row % 4 == 2:
            last_id[row] = 3
            continue
        last_id[row] = (1, 1, 0, 0)[row % 4]
        document, at = (1, 2, 0, 1)[row % 4], min(t - 1, int(rng.integers(1, 4))) * (row % 4 == 3)
        while at < t:
            length = int(rng.integers(1, max(2, t // 2)))
            ids[row, at : at + length] = document
            document, at = document + 1, at + length + int(rng.integers(0, 2)) * 3
        if t > 8:
            ids[row, t - 2 :] = 0
    return ids, last_id


def results(
    op: Callable, spec: ArgSpec, *, implementation: str | None = None, config: Any = None
) -> Callable[[Case], Arrays]:
    """A compiled function from a case to everything that a call gives, by name.

    The names: y, state.FIELD, grad.ARGUMENT, grad_state.FIELD.
    """

    def run(arrays, state, segment_ids, dy, dstate):
        floats = float_fields(state)

        def call(arrays, floats):
            y, after = op(
                **arrays,
                **spec.options,
                initial_state=with_floats(state, floats),
                segment_ids=segment_ids,
                implementation=implementation,
                config=config,
            )
            return (y, float_fields(after)), after

        (y, _), pull, after = jax.vjp(call, arrays, floats, has_aux=True)
        darrays, dfloats = pull((dy, dstate))
        return {
            "y": y,
            **{f"state.{k}": v for k, v in fields(after).items()},
            **{f"grad.{k}": v for k, v in darrays.items()},
            **{f"grad_state.{k}": v for k, v in dfloats.items()},
        }

    compiled = jax.jit(run)
    return lambda case: jax.tree.map(np.asarray, compiled(*case))


def oracle(op: Callable, spec: ArgSpec) -> Callable[[Case], Arrays]:
    """`results` of the reference in float64, on the same numbers."""
    run = results(op, spec, implementation="reference")

    def in_float64(case: Case) -> Arrays:
        with jax.enable_x64(True):
            wide = lambda x: x.astype(np.float64) if is_float(x) else x
            return run(jax.tree.map(wide, case))

    return in_float64


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def fields(state: Any) -> dict[str, Any]:
    """The arrays of a state by place."""
    if state is None:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def float_fields(state: Any) -> dict[str, Any]:
    return {k: v for k, v in fields(state).items() if is_float(v)}


def with_floats(state: Any, floats: Mapping[str, Any]) -> Any:
    """The state with its floating-point arrays replaced."""
    if state is None:
        return None
    flat, tree = jax.tree_util.tree_flatten(state)
    return jax.tree.unflatten(
        tree, [floats.get(k, x) for k, x in zip(fields(state), flat, strict=True)]
    )
