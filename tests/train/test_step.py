"""One update: however the batch is cut it is the same, and rates and seeds compile nothing."""

import functools

import jax
import numpy as np
import pytest

from seqzoo.train import manifest, programs
from seqzoo.train import mesh as meshes
from seqzoo.train.setup import initial_state, setup
from seqzoo.train.step import train_step


@functools.cache
def batch_of(rows: int) -> dict[str, np.ndarray]:
    """Rows with 1, 2, 3, ... targets each: no two microbatches count the same."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (rows, 16)).astype(np.int32)
    targets = random.integers(0, 32, (rows, 16)).astype(np.int32)
    asked = np.arange(16)[None] < 1 + (np.arange(rows)[:, None] * 5) % 16
    return {"tokens": tokens, "targets": np.where(asked, targets, -100).astype(np.int32)}


def updated(config, batch, *, devices=None, steps=1, seed=0, state=None):
    """Parameters and metrics after some updates with one batch."""
    run = setup(config, devices=devices)
    state = initial_state(run) if state is None else state
    placed = meshes.put_batch(batch, meshes.batch_sharding(run.spec.mesh, run.spec.rules))
    for step in range(steps):
        state, metrics = train_step(run.spec)(state, placed, run.hyper(step), np.uint32(seed))
    pairs = {n: tuple(map(float, p)) for n, p in zip(metrics.names, metrics.pairs, strict=True)}
    arrays = {n: np.asarray(a) for n, a in manifest.flatten(state.params).items()}
    return arrays, pairs, bool(metrics.finite)


WORDS = (
    "model=mamba_attention",
    "model.n_layers=2",
    "model.d_model=8",
    "optimizer=sgd",
    "optimizer.clip_norm=0.5",
)


def assert_same(one, other, tolerance=1e-6):
    for name, array in one[0].items():
        np.testing.assert_allclose(array, other[0][name], rtol=0, atol=tolerance, err_msg=name)
    for name, (value, weight) in one[1].items():
        assert weight == other[1][name][1], name
        assert value == pytest.approx(other[1][name][0], rel=1e-5), name


@pytest.fixture(scope="module")
def whole(tiny):
    return updated(tiny(*WORDS), batch_of(8), devices=jax.devices()[:1], steps=2)


def test_microbatches_give_the_same_update(tiny, whole):
    cut = updated(
        tiny(*WORDS, "trainer.grad_accum_steps=4"), batch_of(8), devices=jax.devices()[:1], steps=2
    )
    assert_same(whole, cut)


@pytest.mark.parametrize(
    "cut",
    [
        ("mesh.data=4",),
        ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "trainer.grad_accum_steps=2"),
    ],
)
def test_devices_give_the_same_update(tiny, whole, cut):
    assert_same(whole, updated(tiny(*WORDS, *cut), batch_of(8), steps=2))


def test_parameters_lie_where_the_rules_say(tiny):
    run = setup(tiny(*WORDS, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"))
    state = initial_state(run)
    assert state.params["embed"]["embedding"].addressable_shards[0].data.shape == (16, 4)
    moments = manifest.flatten(state.opt_state)
    shapes = {a.addressable_shards[0].data.shape for n, a in moments.items() if "embedding" in n}
    assert shapes == {(16, 4)}


def test_what_declares_no_decay_does_not_decay(tiny):
    config = tiny("optimizer=adamw", "optimizer.lr=0.1", "optimizer.weight_decay=0.5")
    run = setup(config)
    before = {n: np.asarray(a) for n, a in manifest.flatten(initial_state(run).params).items()}
    nothing = {k: np.full_like(v, -100) if k == "targets" else v for k, v in batch_of(8).items()}
    after, _, _ = updated(config, nothing)
    decayed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert decayed == {n for n in before if not n.endswith("scale")}
    for name in decayed:
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_the_average_of_the_weights_follows(tiny):
    run = setup(tiny("trainer.ema_decay=0.75", "optimizer.lr=0.1"))
    state = initial_state(run)
    first = jax.tree.map(np.asarray, state.params)
    placed = meshes.put_batch(batch_of(8), meshes.batch_sharding(run.spec.mesh, run.spec.rules))
    state, _ = train_step(run.spec)(state, placed, run.hyper(0), np.uint32(0))
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, state.ema)


def test_dropout_depends_on_seed_and_step_alone(tiny):
    config = tiny("model.dropout=0.5", "optimizer=sgd", "optimizer.lr=1e-9")
    run = setup(config)
    loss = lambda seed, steps: updated(config, batch_of(8), seed=seed, steps=steps)[1]["loss"][0]
    assert loss(0, 1) == loss(0, 1)
    assert len({loss(0, 1), loss(0, 2), loss(1, 1)}) == 3
    assert run.spec == setup(config).spec and hash(run.spec) == hash(setup(config).spec)


def test_what_is_not_finite_is_flagged(tiny):
    config = tiny("optimizer=sgd", "optimizer.lr=1e30", "optimizer.clip_norm=null")
    assert updated(config, batch_of(8))[2]
    assert not updated(config, batch_of(8), steps=3)[2]


def test_rates_and_seeds_share_one_compiled_step(fit):
    fit()  # the seeds and rates below differ from it and from each other
    compiled = []

    def listen(event: str, seconds: float, **more):
        if event.endswith("backend_compile_duration"):
            compiled.append(more.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert len(compiled) == 1  # so this is how a compilation shows
        compiled.clear()
        kept = set(map(id, programs._COMPILED.values()))
        losses = set()
        for lr in ("1e-4", "1e-3", "1e-2"):
            for seed in ("1", "2", "3"):
                result = fit(
                    f"optimizer.lr={lr}",
                    f"trainer.seed={seed}",
                    f"optimizer.weight_decay={lr}",
                    f"optimizer.clip_norm={seed}",
                )
                losses.add(result.test["loss"])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(losses) == 9
    assert compiled == []
    assert set(map(id, programs._COMPILED.values())) == kept
