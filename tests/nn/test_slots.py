"""Slots: every memory gets its tokens in time order, nothing is lost, gradients are gathers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.nn import slots as mom_slots
from seqzoo.nn.slots import LONG, SHORT, slots_for

place = jax.jit(mom_slots.place, static_argnames=("n_memories", "keep"))


def visits_of(b, t, m, j, seed=0):
    """j different memories per token; the last row never goes to memory 0."""
    rng = np.random.default_rng(seed)
    found = np.argsort(rng.random((b, t, m)), axis=-1)[..., :j]
    if m > j:
        others = np.argsort(rng.random((t, m - 1)), axis=-1)[:, :j] + 1
        found[-1] = others
    return found.astype(np.int32)


def ids_of(b, t):
    """Padding first, then documents 2 and 5, padding last; one row of nothing but padding."""
    place = np.arange(t)
    row = np.where(place < t // 6, 0, np.where(place < t // 2, 2, 5)) * (place < t - t // 9)
    ids = np.tile(row, (b, 1))
    ids[0] = 0
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    "t, m, j, keep, block",
    [
        (1, 4, 2, 3, SHORT),
        (63, 4, 2, 3, SHORT),
        (430, 5, 3, 0, LONG),
        (260, 3, 3, 1, LONG),
        (256, 1, 1, 2, LONG),
    ],
)
def test_each_memory_gets_its_tokens_in_time_order(t, m, j, keep, block):
    b = 3
    assert slots_for(t, j, m, keep)[1] == block
    visits, ids = visits_of(b, t, m, j), ids_of(b, t)
    entry = np.array([0, 2, 1], np.int32)
    slots = jax.tree.map(np.asarray, place(visits, ids, entry, n_memories=m, keep=keep))
    for row in range(b):
        at, pairs = 0, 0
        for memory in range(m):
            tokens = [i for i in range(t) if ids[row, i] and memory in visits[row, i]]
            assert slots.count[row, memory] == len(tokens)
            if not tokens:
                continue
            assert slots.first[row, memory] == at and at % block == 0
            size = -(-(len(tokens) + keep) // block) * block
            assert np.all(slots.memory[row, at // block : (at + size) // block] == memory)
            mine = slice(at + keep, at + keep + len(tokens))
            np.testing.assert_array_equal(slots.visit[row, mine] // j, tokens)
            which = [list(visits[row, i]).index(memory) for i in tokens]
            np.testing.assert_array_equal(slots.visit[row, mine] % j, which)
            np.testing.assert_array_equal(
                slots.slot[row, tokens, which], np.arange(at, at + size)[keep : keep + len(tokens)]
            )
            np.testing.assert_array_equal(slots.ids[row, mine], ids[row, tokens])
            documents = [entry[row]] * keep + [ids[row, i] for i in tokens]
            groups = np.cumsum([1, *(np.diff(documents) != 0)]) + pairs
            np.testing.assert_array_equal(slots.groups[row, at : mine.stop], groups)
            assert not np.any(slots.groups[row, mine.stop : at + size])
            at, pairs = at + size, groups[-1]
        assert at <= slots.visit.shape[1]
        assert np.all(np.diff(slots.memory[row]) >= 0)
        # Nothing dropped: as many slots are held as there are visits.
        assert (
            np.sum(slots.visit[row] < t * j) == j * np.sum(ids[row] > 0) == slots.count[row].sum()
        )
        assert np.sum(slots.ids[row] > 0) == slots.count[row].sum()
        assert np.all(slots.slot[row, ids[row] == 0] == slots.visit.shape[1])


@pytest.mark.parametrize("block", [SHORT, LONG])
def test_slots_suffice_when_every_memory_is_hit_badly(block):
    """The most unlucky counts, one more than full blocks each, still fit."""
    each = block + 1 if block == SHORT else 8 * block + 1
    t, m, j = 2 * each, 4, 2
    assert slots_for(t, j, m, 0)[1] == block
    visits = np.zeros((1, t, j), np.int32)
    visits[0, :each] = [0, 1]
    visits[0, each:] = [2, 3]
    ids = np.ones((1, t), np.int32)
    slots = place(visits, ids, np.ones(1, np.int32), n_memories=m)
    np.testing.assert_array_equal(slots.count[0], each)
    assert np.sum(slots.visit < t * j) == t * j


def test_authors_gather_and_restore(golden):
    have = golden("mom/routing")
    x, chosen = jnp.asarray(have["in.x"]), have["out.topk_indices"]
    b, t, m = *chosen.shape[:2], have["out.gathered_x"].shape[0]
    slots = place(chosen, np.ones((b, t), np.int32), np.ones(b, np.int32), n_memories=m)
    packed = np.asarray(jax.jit(mom_slots.tokens_to_slots)(x, slots))
    for memory in range(m):
        for row in range(b):
            want = have["out.gathered_x"][memory, row][have["out.gather_mask"][memory, row]]
            first, n = int(slots.first[row, memory]), len(want)
            np.testing.assert_array_equal(packed[row, first : first + n], want)
    found = jax.jit(mom_slots.slots_to_visits)(packed, slots)
    restored = jnp.sum(found * have["out.topk_weights"][..., None], axis=2)
    np.testing.assert_allclose(restored, have["out.restored_x"], atol=1e-6)


def test_gradients_are_those_of_indexing():
    b, t, m, j, e = 2, 21, 4, 2, 3
    rng = np.random.default_rng(0)
    visits, ids = jnp.asarray(visits_of(b, t, m, j)), ids_of(b, t)
    ids[0] = 1
    slots = place(visits, jnp.asarray(ids), jnp.ones(b, jnp.int32), n_memories=m, keep=2)
    x, each = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((b, t, e), (b, t, m, e)))
    s = slots.visit.shape[1]
    weight = jnp.asarray(rng.standard_normal((b, s, e)), jnp.float32)

    def ours(x, each):
        packed = mom_slots.tokens_to_slots(x, slots) * mom_slots.memories_to_slots(each, slots)
        return jnp.sum(jnp.sin(mom_slots.slots_to_visits(packed * weight, slots)))

    def plain(x, each):
        rows, tokens = jnp.arange(b)[:, None, None], jnp.arange(t)[:, None]
        y = x[rows, tokens] * each[rows, tokens, visits] * weight[rows, slots.slot]
        return jnp.sum(jnp.where((ids > 0)[..., None, None], jnp.sin(y), 0))

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, each)
    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_the_past_goes_before_and_is_kept():
    b, t, m, keep, e = 2, 40, 3, 3, 2
    rng = np.random.default_rng(0)
    visits = jnp.asarray(visits_of(b, t, m, 1))
    slots = place(
        visits, jnp.ones((b, t), jnp.int32), jnp.ones(b, jnp.int32), n_memories=m, keep=keep
    )
    x, past = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((b, t, e), (b, m, keep, e))
    )

    @jax.jit
    def both(x, past):
        packed = mom_slots.with_past(mom_slots.tokens_to_slots(x, slots), past, slots)
        return packed, mom_slots.kept(packed, past, slots)

    packed, after = map(np.asarray, both(x, past))
    for row in range(b):
        for memory in range(m):
            mine = np.asarray(x)[row, np.flatnonzero(visits[row, :, 0] == memory)]
            want = np.concatenate([past[row, memory], mine])
            np.testing.assert_array_equal(after[row, memory], want[-keep:])
            if len(mine):
                first = int(slots.first[row, memory])
                np.testing.assert_array_equal(packed[row, first : first + len(want)], want)
    assert not np.any(visits[1] == 0)  # the one that got nothing kept what it had
