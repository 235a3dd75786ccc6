"""Sliding-window attention: the contract of a mixer, an oracle in float64, its settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import Attention, SlidingWindowAttention
from seqzoo.nn.sharding import MESH_AXES, make_rules, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

MAKE = functools.partial(SlidingWindowAttention, n_heads=4, n_kv_heads=2, use_bias=True)
SUBJECT = Subject(build=functools.partial(MAKE, window=10), d_model=16)
# Wider than a chunk of the stream, and than most documents.
WIDE = Subject(build=functools.partial(MAKE, window=40), d_model=16)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("promise", ["steps_go_on", "packed_streams"])
def test_promise_of_a_wide_window(promise):
    result = check_promise(promise, WIDE)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("case", ["sliding_w8_rotary", "sliding_w16_norotary"])
def test_golden(golden, case):
    """The published layer; window_size w there lets a query see w // 2 + 1 keys."""
    file = golden(f"based/{case}")
    flags = json.loads(str(file["meta"]))["flags"]
    mixer = SlidingWindowAttention(
        flags["n"],
        n_heads=flags["H"],
        window=flags["window_size"] // 2 + 1,
        rope=flags["rotary"],
        rngs=nnx.Rngs(0),
    )
    names = ("q_proj", "k_proj", "v_proj")  # Wqkv has their rows one after the other
    kernels = dict(zip(names, np.split(file["in.w.Wqkv.weight"], 3), strict=True))
    kernels["out_proj"] = file["in.w.out_proj.weight"]
    graphdef, _ = nnx.split(mixer)
    params = {name: {"kernel": jnp.asarray(w.T)} for name, w in kernels.items()}

    def run(params, x):
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * file["ct.y"]), y

    ((_, y), grads) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(
        params, jnp.asarray(file["in.x"])
    )
    by_name = {n: np.asarray(g["kernel"]).T for n, g in grads[0].items()}
    found = {
        "x": np.asarray(grads[1]),
        "w.Wqkv.weight": np.concatenate([by_name[n] for n in names]),
        "w.out_proj.weight": by_name["out_proj"],
    }
    off = lambda got, want: np.max(np.abs(got - want)) / np.max(np.abs(want))
    assert off(np.asarray(y), file["out64.y"]) < 1e-5
    for name, got in found.items():
        assert off(got, file[f"grad64.{name}"]) < 1e-4, name


def test_a_window_over_everything_is_attention():
    mine = SlidingWindowAttention(16, window=20, rngs=nnx.Rngs(0))
    full = Attention(16, rngs=nnx.Rngs(0))
    nnx.update(full, nnx.state(mine))
    x = jax.random.normal(jax.random.key(0), (2, 20, 16))
    ids = jnp.asarray([[1] * 9 + [2] * 11, [0] * 2 + [1] * 18], jnp.int32)
    run = lambda mixer: jax.jit(lambda x: mixer(x, segment_ids=ids)[0])(x)
    np.testing.assert_allclose(run(mine), run(full), atol=1e-6)


def test_what_left_the_window_is_forgotten():
    """Tokens older than the window may be permuted; with positions, one layer sees no change."""
    mixer = SlidingWindowAttention(16, window=5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 30, 16))
    run = jax.jit(lambda x: mixer(x)[0])
    y, moved = run(x), run(x.at[:, :20].set(x[:, 19::-1]))
    np.testing.assert_array_equal(moved[:, 24:], y[:, 24:])
    assert not np.array_equal(moved[:, 23], y[:, 23])


def test_initial_values():
    std = lambda layer: float(jnp.std(layer.kernel[...]))
    mixer = SlidingWindowAttention(256, n_heads=8, n_residuals=4, rngs=nnx.Rngs(0))
    assert std(mixer.q_proj) == pytest.approx(1 / 16, rel=0.02)
    assert std(mixer.out_proj) == pytest.approx(1 / 32, rel=0.02)
    published = SlidingWindowAttention(256, init_std=0.02, n_residuals=54, rngs=nnx.Rngs(0))
    assert std(published.v_proj) == pytest.approx(0.02, rel=0.02)
    assert std(published.out_proj) == pytest.approx(0.02 / 54**0.5, rel=0.02)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(window=0), "window is 0; it must be at least 1"),
        (dict(n_heads=3), "no multiple of n_heads"),
        (dict(n_heads=4, n_kv_heads=3), "must be a multiple of n_kv_heads"),
        (dict(head_dim=3), "head_dim is 3; it must be at least 1, and even with rope"),
        (dict(init_std=0.0), "init_std is 0.0; it must be above 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(16, **keywords, rngs=nnx.Rngs(0))


def test_spread_over_eight_devices():
    mixer = SlidingWindowAttention(16, n_heads=4, n_kv_heads=2, window=6, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.k) + jnp.sum(state.v)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(grad)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: grad(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def test_grouped_heads_are_cut_together():
    mixer = SlidingWindowAttention(16, n_heads=4, n_kv_heads=2, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((1, 1, 4, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    rules = make_rules({"heads": "tensor", "kv_heads": None})
    with use_mesh(mesh, rules), pytest.raises(ValueError, match="give both the same rule"):
        jax.eval_shape(mixer, jnp.zeros((1, 3, 16)))
