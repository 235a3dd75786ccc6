"""The machinery of chunked rules: cutting, documents, memories, the pass of states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core import chunks
from pallas_kernels.core.segments import boundaries

# Three memories in rows of five blocks; memory 1 of row 1 has no block.
BLOCK_MEMORY = np.array([[0, 0, 1, 2, 2], [0, 2, 2, 2, 2]], np.int32)


LAST_ID = np.array([[1, 0, 2], [0, 3, 1]], np.int32)


def rows_of_ids(rng):
    """Each memory goes on from its last id; empty slots behind each memory's tokens."""
    ids = np.zeros((2, 320), np.int32)
    for row in range(2):
        for memory in range(3):
            places = np.flatnonzero(np.repeat(BLOCK_MEMORY[row], 64) == memory)
            used = places[: len(places) - int(rng.integers(0, 40))]
            first = max(1, LAST_ID[row, memory])
            ids[row, used] = first + np.sort(rng.integers(0, 4, len(used)))
    return ids


def test_cut_and_join():
    x = jnp.arange(2 * 7 * 3 * 5.0).reshape(2, 7, 3, 5)
    cut = chunks.cut(x, 4)
    assert cut.shape == (2, 2, 3, 4, 5)
    np.testing.assert_array_equal(cut[1, 0, 2, :3], x[0, 4:, 2])
    assert not np.any(cut[1, :, :, 3])
    np.testing.assert_array_equal(chunks.join(cut, 7), x)


def test_who_sees_whom():
    """Against the ids themselves, token by token; nothing stands where there is no token."""
    ids = np.array([[1, 1, 0, 2, 2, 2, 3, 3, 3, 3, 4], [0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5]], np.int32)
    last_id = np.array([1, 4], np.int32)
    plan, after = chunks.plan(11, 4, jnp.asarray(ids), jnp.asarray(last_id))
    np.testing.assert_array_equal(after, [4, 5])
    sees = np.broadcast_to(chunks.sees(plan, 4), (3, 2, 1, 4, 4))
    strictly = np.broadcast_to(chunks.sees(plan, 4, strictly=True), (3, 2, 1, 4, 4))
    start, end, through = (
        np.asarray(f(plan))
        for f in (chunks.sees_start, chunks.reaches_end, chunks.start_reaches_end)
    )
    ids = np.pad(ids, ((0, 0), (0, 1)))
    document = np.maximum.accumulate(np.maximum(ids, last_id[:, None]), axis=1)
    for n, row in np.ndindex(3, 2):
        here = document[row, 4 * n : 4 * n + 4]
        before = document[row, 4 * n - 1] if n else last_id[row]
        same = here[:, None] == here[None]
        np.testing.assert_array_equal(sees[n, row, 0], np.tril(same))
        np.testing.assert_array_equal(strictly[n, row, 0], np.tril(same, -1))
        np.testing.assert_array_equal(start[n, row, 0], here == before)
        np.testing.assert_array_equal(end[n, row, 0], here == here[-1])
        assert through[n, row, 0] == (here[-1] == before)
    x = chunks.cut(jnp.ones((2, 11, 3)), 4, plan)
    np.testing.assert_array_equal(x[:, :, 0].swapaxes(0, 1).reshape(2, 12), ids > 0)


def test_documents_inside_memories():
    """Each memory's tokens, taken alone, begin documents where they do alone."""
    ids = rows_of_ids(np.random.default_rng(0))
    reset, valid, after = chunks.resets(*map(jnp.asarray, (ids, LAST_ID, BLOCK_MEMORY)))
    np.testing.assert_array_equal(valid, ids > 0)
    for row, memory in np.ndindex(2, 3):
        places = np.flatnonzero(np.repeat(BLOCK_MEMORY[row], 64) == memory)
        if not len(places):
            assert after[row, memory] == LAST_ID[row, memory]
            continue
        want, _, want_after = boundaries(ids[row : row + 1, places], LAST_ID[row, memory][None])
        np.testing.assert_array_equal(reset[row, places], want[0])
        assert after[row, memory] == want_after[0]


def test_states_of_memories():
    """A memory's chunks run in order from its state; its gradient runs back the same way."""
    rng = np.random.default_rng(0)
    s, ds = rng.normal(size=(2, 2, 3, 1, 2, 2)).astype(np.float32)
    decay, brought = rng.normal(size=(2, 5, 2, 1, 2, 2)).astype(np.float32)

    def step(s, x):
        return x[0] * s + x[1], s

    run = lambda s, x: chunks.carry(step, s, x, jnp.asarray(BLOCK_MEMORY.T))
    after, starts = run(s, (decay, brought))
    want, want_starts = s.copy(), np.zeros_like(brought)
    for n, row in np.ndindex(5, 2):
        memory = BLOCK_MEMORY[row, n]
        want_starts[n, row] = want[row, memory]
        want[row, memory] = decay[n, row] * want[row, memory] + brought[n, row]
    np.testing.assert_allclose(after, want, rtol=1e-6)
    np.testing.assert_allclose(starts, want_starts, rtol=1e-6)
    np.testing.assert_array_equal(after[1, 1], s[1, 1])

    step_back = lambda ds, x: (x * ds, ds)
    got, _ = chunks.carry(step_back, ds, decay, jnp.asarray(BLOCK_MEMORY.T), reverse=True)
    _, pull = jax.vjp(lambda s: run(s, (decay, brought))[0], s)
    np.testing.assert_allclose(got, pull(ds)[0], rtol=1e-6)
    np.testing.assert_array_equal(got[1, 1], ds[1, 1])


SIZES = dict(b=2, t=320, h=1, k=2, v=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(initial_state=None), "block_memory is given and initial_state is not"),
        (dict(sizes={**SIZES, "t": 63}, segment_ids=None), "63 tokens; .* a power of two"),
        (dict(block_memory=BLOCK_MEMORY[:, 1:]), r"block_memory has shape \(2, 4\)"),
        (
            dict(initial_state=(np.zeros((2, 3, 1, 2, 2)), np.zeros((2,), int))),
            r"last_id of initial_state has shape \(2,\); it must be \(2, 3\)",
        ),
        (dict(initial_state=(np.zeros((2, 1, 2, 2)), np.zeros((2, 3), int))), r"\[b m h k v\]"),
    ],
)
def test_bad_calls(change, message):
    call = dict(
        sizes=dict(SIZES),
        initial_state=(np.zeros((2, 3, 1, 2, 2)), np.zeros((2, 3), int)),
        segment_ids=np.ones((2, 320), np.int32),
        block_memory=BLOCK_MEMORY,
        dtype=jnp.float32,
    )
    chunks.open_call("rule", **call)
    with pytest.raises(ValueError, match=message):
        chunks.open_call("rule", **{**call, **change})


def test_chunks_that_do_not_divide_the_blocks():
    with pytest.raises(ValueError, match="chunk is 48"):
        chunks.plan(320, 48, None, jnp.zeros((2, 3), jnp.int32), jnp.asarray(BLOCK_MEMORY))
