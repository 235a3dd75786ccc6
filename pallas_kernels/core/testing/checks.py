"""The suite: what is asked of every operator, and of every form of it by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.config import Config
from pallas_kernels.core.testing.cases import (
    ArgSpec,
    Case,
    draw_case,
    fields,
    float_fields,
    is_float,
    letters_of,
    names_along_time,
    oracle,
    results,
)
from pallas_kernels.core.testing.compare import assert_close, assert_equal

FAST_LENGTHS = (1, 130)
SLOW_LENGTHS = (2, 37, 63, 128, 200)


def check_agrees(
    op: Callable,
    spec: ArgSpec,
    length: int,
    *,
    dtype: str = "float32",
    documents: bool = False,
    implementation: str | None = None,
    config: Any = None,
    factor: float = 1.0,
) -> None:
    """Outputs, state and every gradient agree with the reference in float64.

    A factor says by how much more than TOLERANCES they may be off; whoever gives one says why.
    """
    case = draw_case(op, spec, length, dtype=dtype, documents=documents)
    expected = oracle(op, spec)(case)
    with jax.enable_x64(dtype == "float64"):
        got = results(op, spec, implementation=implementation, config=config)(case)
    for name, array in got.items():
        assert np.all(np.isfinite(array.astype(np.float64))), f"{name} is not finite"
    for name, array in case.arrays.items():
        assert got[f"grad.{name}"].dtype == array.dtype, name
    assert_close(got, expected, dtype, factor=factor, implementation=implementation)


def check_state_dtypes(op: Callable, spec: ArgSpec, **how: Any) -> None:
    """The state is float32 for bfloat16 and float32 and float64 for float64; y as the inputs.

    Kernels take no float64.
    """
    pairs = [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
    kernel = (how.get("implementation") or "").startswith("pallas_")
    for dtype, state_dtype in pairs[:2] if kernel else pairs:
        with jax.enable_x64(True):
            arrays = draw_case(op, spec, 3, dtype=dtype).arrays
            y, state = jax.eval_shape(functools.partial(op, **spec.options, **how), **arrays)
        assert y.dtype == dtype
        assert {str(x.dtype) for x in float_fields(state).values()} <= {state_dtype}


def check_documents_alone(
    op: Callable, spec: ArgSpec, length: int, *, dtype: str = "float32", **how: Any
) -> None:
    """Packed documents give what the same documents give alone: padded, and without any ids.

    Also: nothing that stands at padding (a nan, say) is ever seen; outputs and gradients there
    are 0.
    """
    along_time = names_along_time(op, spec)
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
    form = how.get("implementation")
    wanted = {k: v.astype(np.float64) if is_float(v) else v for k, v in packed.items()}
    assert_close(got, wanted, dtype, implementation=form)

    row, i = max(documents, key=lambda d: np.sum(ids[d[0]] == d[1]))
    places = np.flatnonzero(ids[row] == i)
    bare = {n: x[row : row + 1, places] if n in along_time else x for n, x in case.arrays.items()}
    y, _ = jax.jit(functools.partial(op, **spec.options, **how))(**bare)
    wanted = {"y": packed["y"][row, places]}
    assert_close({"y": np.asarray(y)[0]}, wanted, dtype, implementation=form)


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
        {f"state.{k}": v for k, v in fields(case.state).items()},
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
    got = results(in_pieces, spec, **how)(case)
    assert_close(got, whole, dtype, implementation=how.get("implementation"))


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
    assert_close(got, expected, "float32", implementation=how.get("implementation"))


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
            return jnp.sum(y.astype(jnp.float32)) + sum(map(jnp.sum, float_fields(state).values()))

        lines.append(len(jax.jit(jax.grad(program)).lower(arrays).as_text().splitlines()))
    assert max(lines) <= 1.05 * min(lines), dict(zip(lengths, lines, strict=True))


def check_configs(
    op: Callable, spec: ArgSpec, length: int, configs: tuple[Config, ...], **how: Any
) -> None:
    """Tile sizes change rounding, nothing else."""
    case = draw_case(op, spec, length, documents=True)
    expected = oracle(op, spec)(case)
    for config in configs:
        got = results(op, spec, config=config, **how)(case)
        assert_close(got, expected, "float32", implementation=how.get("implementation"))


def _wide(mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    """A `[b t]` mask with axes of 1 behind it, to stand beside `[b t ...]`."""
    return mask.reshape(mask.shape + (1,) * (array.ndim - 2))
