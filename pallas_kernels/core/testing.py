"""The test suite that every operator passes, as plain functions over its `arg_specs`.

An operator is compared with its own `reference` in float64, on the same numbers: outputs, states,
and every gradient, with random cotangents on y and on the final state. The reference is compared
with documents run one by one, and with golden files in tests/.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.config import Config

Arrays = dict[str, np.ndarray]


class Tolerance(NamedTuple):
    """How far an array may be off.

    Attributes:
        rms: root mean square of the difference, by that of the oracle.
        largest: largest difference, by the oracle's largest entry.
    """

    rms: float
    largest: float


# By the dtype of the activations. Loosening one needs a reason in the commit.
# bfloat16 keeps 8 bits: the rounding of an output alone is 2^-9 = 2e-3.
TOLERANCES = {
    "float64": Tolerance(rms=1e-13, largest=1e-12),
    "float32": Tolerance(rms=2e-6, largest=5e-6),
    "bfloat16": Tolerance(rms=3e-3, largest=6e-3),
}
FAST_LENGTHS = (1, 130)
SLOW_LENGTHS = (2, 37, 63, 128, 200)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One kind of call, at sizes that have a name: for tests and for benchmarks.

    Attributes:
        name: what it stands for.
        sizes: axis letters with sizes; `t` only where a benchmark needs one.
        draw: gives an argument's values from its name, shape and a generator.
        given: the optional arguments that are there.
        options: static keywords.
        tags: "test", "extreme" (values at the edge of the domain), "bench".
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


def _along_time(op: Callable, spec: ArgSpec) -> tuple[str, ...]:
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
        dstate={k: rng.normal(size=v.shape).astype(v.dtype) for k, v in _floats(state).items()},
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
        floats = _floats(state)

        def call(arrays, floats):
            y, after = op(
                **arrays,
                **spec.options,
                initial_state=_with_floats(state, floats),
                segment_ids=segment_ids,
                implementation=implementation,
                config=config,
            )
            return (y, _floats(after)), after

        (y, _), pull, after = jax.vjp(call, arrays, floats, has_aux=True)
        darrays, dfloats = pull((dy, dstate))
        return {
            "y": y,
            **{f"state.{k}": v for k, v in _fields(after).items()},
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
            wide = lambda x: x.astype(np.float64) if _is_float(x) else x
            return run(jax.tree.map(wide, case))

    return in_float64


def assert_close(got: Arrays, expected: Arrays, dtype: str, *, factor: float = 1.0) -> None:
    """Compares every array by TOLERANCES[dtype]; the message names all that are off.

    Args:
        got: what was computed.
        expected: the oracle.
        dtype: of the tolerance.
        factor: by which this comparison may be looser.
    """
    assert got.keys() == expected.keys(), (sorted(got), sorted(expected))
    allowed = TOLERANCES[dtype]
    wrong = []
    for name, want in expected.items():
        have = np.asarray(got[name])
        assert have.shape == want.shape, f"{name}: shape {have.shape}, expected {want.shape}"
        if not _is_float(want):
            if not np.array_equal(have, want):
                wrong.append(f"{name}: {have} is not {want}")
            continue
        have, want = have.astype(np.float64), want.astype(np.float64)
        if have.size == 0:
            continue
        off = np.abs(have - want)
        scale = max(float(np.max(np.abs(want))), 1e-5)
        rms = np.sqrt(np.mean(off**2)) / max(float(np.sqrt(np.mean(want**2))), 1e-5)
        largest = off.max() / scale
        if not (rms <= factor * allowed.rms and largest <= factor * allowed.largest):
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(off)), off.shape))
            wrong.append(
                f"{name}: rms {rms:.1e} (allowed {factor * allowed.rms:.1e}), largest "
                f"{largest:.1e} (allowed {factor * allowed.largest:.1e}) at {at}: "
                f"{have[at]:.6g} is not {want[at]:.6g}"
            )
    assert not wrong, "\n".join(wrong)


def assert_equal(got: Arrays, expected: Arrays) -> None:
    """Compares every array bit by bit."""
    assert got.keys() == expected.keys()
    wrong = [k for k in got if got[k].tobytes() != expected[k].tobytes()]
    assert not wrong, f"these are not bitwise equal: {wrong}"


# --- The suite ---------------------------------------------------------------------------------


def check_agrees(
    op: Callable,
    spec: ArgSpec,
    length: int,
    *,
    dtype: str = "float32",
    documents: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> None:
    """Outputs, state and every gradient agree with the reference in float64."""
    case = draw_case(op, spec, length, dtype=dtype, documents=documents)
    expected = oracle(op, spec)(case)
    with jax.enable_x64(dtype == "float64"):
        got = results(op, spec, implementation=implementation, config=config)(case)
    for name, array in got.items():
        assert np.all(np.isfinite(array.astype(np.float64))), f"{name} is not finite"
    for name, array in case.arrays.items():
        assert got[f"grad.{name}"].dtype == array.dtype, name
    assert_close(got, expected, dtype)


def check_state_dtypes(op: Callable, spec: ArgSpec, **how: Any) -> None:
    """The state is float32 for bfloat16 and float32 and float64 for float64; y as the inputs."""
    for dtype, state_dtype in (
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        with jax.enable_x64(True):
            arrays = draw_case(op, spec, 3, dtype=dtype).arrays
            y, state = jax.eval_shape(functools.partial(op, **spec.options, **how), **arrays)
        assert y.dtype == dtype
        assert {str(x.dtype) for x in _floats(state).values()} <= {state_dtype}


def check_documents_alone(
    op: Callable, spec: ArgSpec, length: int, *, dtype: str = "float32", **how: Any
) -> None:
    """Packed documents give what the same documents give alone: padded, and without any ids.

    Also: nothing that stands at padding (a nan, say) is ever seen; outputs and gradients there
    are 0.
    """
    along_time = _along_time(op, spec)
    run = results(op, spec, **how)
    case = draw_case(op, spec, length, dtype=dtype, documents=True, fresh=True)
    ids = case.segment_ids
    assert ids is not None
    packed = run(case)

    poison = lambda x: np.where(_wide(ids == 0, x), np.nan, x).astype(x.dtype)
    arrays = {n: poison(x) if n in along_time else x for n, x in case.arrays.items()}
    assert_equal(run(case._replace(arrays=arrays, dy=poison(case.dy))), packed)
    for name in ("y", *(f"grad.{n}" for n in along_time)):
        assert not np.any(packed[name][ids == 0]), f"{name} is not 0 at padding"

    # As many documents at a time as the batch has rows, each at the start of a row.
    documents = [(row, i) for row in range(len(ids)) for i in np.unique(ids[row]) if i > 0]
    by_token = ("y", *(f"grad.{n}" for n in along_time))
    by_row = tuple(k for k in packed if k.startswith(("state.", "grad_state.")))
    got = {k: np.array(v) for k, v in packed.items()}
    for key in got:
        if key not in by_row:
            got[key][...] = 0
    for begin in range(0, len(documents), len(ids)):
        group = documents[begin : begin + len(ids)]
        found = run(_alone(case, group, along_time))
        for slot, (row, i) in enumerate(group):
            places = np.flatnonzero(ids[row] == i)
            for key in by_token:
                got[key][row, places] = found[key][slot, : len(places)]
            for key in by_row:
                first_or_last = ids[row].max() if key.startswith("state.") else _first(ids[row])
                if i == first_or_last and key != "state.last_id":
                    got[key][row] = found[key][slot]
        for key in got:
            if key not in (*by_token, *by_row):
                got[key] += found[key]
    assert_close(
        got, {k: v.astype(np.float64) if _is_float(v) else v for k, v in packed.items()}, dtype
    )

    row, i = max(documents, key=lambda d: np.sum(ids[d[0]] == d[1]))
    places = np.flatnonzero(ids[row] == i)
    bare = {n: x[row : row + 1, places] if n in along_time else x for n, x in case.arrays.items()}
    y, _ = jax.jit(functools.partial(op, **spec.options, **how))(**bare)
    assert_close({"y": np.asarray(y)[0]}, {"y": packed["y"][row, places]}, dtype)


def _alone(case: Case, documents: list[tuple[int, int]], along_time: tuple[str, ...]) -> Case:
    """The case with one document (row, id) per row, and nothing else."""
    ids = case.segment_ids
    assert ids is not None
    alone = jax.tree.map(np.zeros_like, case)
    arrays = {n: alone.arrays[n] if n in along_time else x for n, x in case.arrays.items()}
    for slot, (row, i) in enumerate(documents):
        places = np.flatnonzero(ids[row] == i)
        alone.segment_ids[slot, : len(places)] = 1
        alone.dy[slot, : len(places)] = case.dy[row, places]
        for name in along_time:
            arrays[name][slot, : len(places)] = case.arrays[name][row, places]
        if i == ids[row].max():  # the state after the row is this document's
            for key, value in case.dstate.items():
                alone.dstate[key][slot] = value[row]
    return alone._replace(arrays=arrays)


def _first(row: np.ndarray) -> int:
    return row[row > 0].min()


def check_padding_only(op: Callable, spec: ArgSpec, length: int = 5, **how: Any) -> None:
    """A call of nothing but padding hands the state and its gradient through, bit by bit."""
    case = draw_case(op, spec, length, documents=True)
    assert case.segment_ids is not None
    case = case._replace(segment_ids=np.zeros_like(case.segment_ids))
    got = results(op, spec, **how)(case)
    assert_equal(
        {k: v for k, v in got.items() if k.startswith("state.")},
        {f"state.{k}": v for k, v in _fields(case.state).items()},
    )
    assert_equal(
        {k: v for k, v in got.items() if k.startswith("grad_state.")},
        {f"grad_state.{k}": v for k, v in case.dstate.items()},
    )
    assert not any(np.any(v) for k, v in got.items() if k == "y" or k.startswith("grad."))


def check_hand_off(
    op: Callable,
    spec: ArgSpec,
    length: int,
    cut: int,
    *,
    documents: bool = False,
    dtype: str = "float32",
    **how: Any,
) -> None:
    """A sequence in two pieces, the state handed over, gives what it gives whole, gradients too."""
    letters = letters_of(op)
    case = draw_case(op, spec, length, documents=documents, dtype=dtype)

    def in_pieces(*, initial_state, segment_ids, **arrays):
        def part(begin, end, state):
            cut_arrays = {
                n: v[:, begin:end] if n in letters and "t" in letters[n] else v
                for n, v in arrays.items()
            }
            ids = None if segment_ids is None else segment_ids[:, begin:end]
            return op(**cut_arrays, initial_state=state, segment_ids=ids)

        first, state = part(0, cut, initial_state)
        second, state = part(cut, length, state)
        return jnp.concatenate([first, second], axis=1), state

    whole = results(op, spec, **how)(case)
    assert_close(results(in_pieces, spec, **how)(case), whole, dtype)


def check_vmap(op: Callable, spec: ArgSpec, length: int, **how: Any) -> None:
    """Under vmap over arguments along time it gives what a loop gives, gradients too."""
    letters = letters_of(op)
    one, two = (draw_case(op, spec, length, documents=True, seed=s) for s in (0, 1))
    shared = {n: v for n, v in one.arrays.items() if "t" not in letters[n]}
    two = two._replace(arrays={**two.arrays, **shared})
    apart = [results(op, spec, **how)(case) for case in (one, two)]

    def mapped(*, initial_state, segment_ids, **arrays):
        implementation, config = arrays.pop("implementation"), arrays.pop("config")
        options = {n: arrays.pop(n) for n in spec.options}

        def call(arrays, state, ids):
            return op(
                **arrays,
                **options,
                initial_state=state,
                segment_ids=ids,
                implementation=implementation,
                config=config,
            )

        axes = {n: 0 if "t" in letters[n] else None for n in arrays}
        return jax.vmap(call, in_axes=(axes, 0, 0))(arrays, initial_state, segment_ids)

    stacked = jax.tree.map(lambda *x: np.stack(x), one, two)
    stacked = stacked._replace(arrays={**stacked.arrays, **shared})
    got = results(mapped, spec, **how)(stacked)
    expected = {
        k: apart[0][k] + apart[1][k]
        if k.removeprefix("grad.") in shared
        else np.stack([a[k] for a in apart])
        for k in apart[0]
    }
    assert_close(got, expected, "float32")


def check_deterministic(op: Callable, spec: ArgSpec, length: int, **how: Any) -> None:
    """Two runs give the same bits, gradients too."""
    run = results(op, spec, **how)
    case = draw_case(op, spec, length, documents=True)
    assert_equal(run(case), run(case))


def check_program_size(op: Callable, spec: ArgSpec, *lengths: int, **how: Any) -> None:
    """The program does not grow with the length of the sequence (StableHLO lines)."""
    lines = []
    for length in lengths:
        arrays = draw_case(op, spec, length).arrays

        def program(arrays):
            y, state = op(**arrays, **spec.options, **how)
            return jnp.sum(y.astype(jnp.float32)) + sum(map(jnp.sum, _floats(state).values()))

        lines.append(len(jax.jit(jax.grad(program)).lower(arrays).as_text().splitlines()))
    assert max(lines) <= 1.05 * min(lines), dict(zip(lengths, lines, strict=True))


def check_configs(
    op: Callable, spec: ArgSpec, length: int, configs: tuple[Config, ...], **how: Any
) -> None:
    """Tile sizes change rounding, nothing else."""
    case = draw_case(op, spec, length, documents=True)
    expected = oracle(op, spec)(case)
    for config in configs:
        assert_close(results(op, spec, config=config, **how)(case), expected, "float32")


# --- Helpers -----------------------------------------------------------------------------------


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _fields(state: Any) -> dict[str, Any]:
    """The arrays of a state by place."""
    if state is None:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def _floats(state: Any) -> dict[str, Any]:
    return {k: v for k, v in _fields(state).items() if _is_float(v)}


def _with_floats(state: Any, floats: Mapping[str, Any]) -> Any:
    """The state with its floating-point arrays replaced."""
    if state is None:
        return None
    flat, tree = jax.tree_util.tree_flatten(state)
    return jax.tree.unflatten(
        tree, [floats.get(k, x) for k, x in zip(_fields(state), flat, strict=True)]
    )


def _wide(mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    """A `[b t]` mask with axes of 1 behind it, to stand beside `[b t ...]`."""
    return mask.reshape(mask.shape + (1,) * (array.ndim - 2))
