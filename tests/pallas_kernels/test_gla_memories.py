"""simple_gla, gla and gated_delta_rule with block_memory: each memory is a stream of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule, gla, simple_gla
from pallas_kernels.core.testing import ArgSpec, assert_close, draw_case
from pallas_kernels.gated_delta_rule.arg_specs import draw as draw_unit_keys
from pallas_kernels.simple_gla.arg_specs import draw

# Three memories in rows of four blocks of 64; memory 1 of row 1 has no block.
BLOCK_MEMORY = np.array([[0, 1, 1, 2], [0, 0, 2, 2]], np.int32)
MEMORIES, LENGTH = 3, 256
SPECS = {
    simple_gla: ArgSpec(name="memories", sizes=dict(b=2, h=2, g=1, k=3, v=4), draw=draw),
    gla: ArgSpec(name="memories", sizes=dict(b=2, h=2, k=3, v=4), draw=draw),
    gated_delta_rule: ArgSpec(name="memories", sizes=dict(b=2, h=2, k=3, v=4), draw=draw_unit_keys),
}


def states(op, rng):
    """States of all memories, and random cotangents of them."""
    shape = (2, MEMORIES, 2, 3, 4)
    s, ds = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return s, ds


def ids_of(rng):
    """Documents that begin anew in every memory; the last slots of each are empty."""
    ids = np.zeros((2, LENGTH), np.int32)
    for row, memory in np.ndindex(2, MEMORIES):
        places = np.flatnonzero(np.repeat(BLOCK_MEMORY[row], 64) == memory)
        used = places[: max(0, len(places) - 20)]
        ids[row, used] = 1 + np.sort(rng.integers(0, 3, len(used)))
    return ids


def everything(call, arrays, s, dy, ds):
    (y, after), pull = jax.vjp(call, arrays, s)
    darrays, dstate = pull((dy, ds))
    return {"y": y, "s": after, "ds": dstate, **{f"d{n}": x for n, x in darrays.items()}}


def inputs(op, documents):
    """Arrays, states, ids, and cotangents of y and of the states."""
    rng = np.random.default_rng(0)
    case = draw_case(op, SPECS[op], LENGTH)
    s, ds = states(op, rng)
    last_id = rng.integers(0, 2, (2, MEMORIES)).astype(np.int32)
    return case.arrays, s, last_id, ids_of(rng) if documents else None, case.dy, ds


def run(op, implementation, arrays, s, last_id, ids, dy, ds):
    """One call for all memories."""

    def call(arrays, s):
        y, state = op(
            **arrays,
            block_memory=jnp.asarray(BLOCK_MEMORY),
            initial_state=(s, jnp.asarray(last_id)),
            segment_ids=ids,
            implementation=implementation,
        )
        return y, state.s

    return compiled(call, arrays, s, dy, ds)


def run_alone(op, arrays, s, last_id, ids, dy, ds):
    """One call for each memory of each row, of its own tokens."""

    def call(arrays, s):
        y, after = jnp.zeros(dy.shape), s
        for row, memory in np.ndindex(2, MEMORIES):
            places = np.flatnonzero(np.repeat(BLOCK_MEMORY[row], 64) == memory)
            if len(places):
                part, state = op(
                    **{n: x[row : row + 1, places] for n, x in arrays.items()},
                    initial_state=(s[row : row + 1, memory], last_id[row, memory][None]),
                    segment_ids=None if ids is None else ids[row : row + 1, places],
                    implementation="reference",
                )
                y = y.at[row, places].set(part[0])
                after = after.at[row, memory].set(state.s[0])
        return y, after

    return compiled(call, arrays, s, dy, ds)


def compiled(call, *numbers):
    return jax.tree.map(np.asarray, jax.jit(lambda *x: everything(call, *x))(*numbers))


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.__name__)
def test_memories_are_streams_of_their_own(op, documents):
    numbers = inputs(op, documents)
    assert_close(run(op, "reference", *numbers), run_alone(op, *numbers), "float32")


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.__name__)
def test_memories_in_chunks(op, documents):
    numbers = inputs(op, documents)
    got = run(op, "xla", *numbers)
    assert_close(got, run(op, "reference", *numbers), "float32")
    s, ds = numbers[1], numbers[-1]
    np.testing.assert_array_equal(got["s"][1, 1], s[1, 1])  # never hit: as it was, to the bit
    np.testing.assert_array_equal(got["ds"][1, 1], ds[1, 1])
