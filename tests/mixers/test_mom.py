"""MoM: the contract of a mixer, its router and memories, its initial values, its settings."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.core.segments import from_lengths
from seqzoo.mixers import MoM
from seqzoo.nn.report import captured
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=functools.partial(MoM, n_heads=2, head_dim=4, expand_v=2.0), d_model=16)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gla", "retention", "mamba2", "linear"])
@pytest.mark.parametrize("promise", PROMISES)
def test_promise_of_other_rules(promise, rule):
    build = functools.partial(MoM, n_heads=2, head_dim=4, num_memories=3, rule=rule, d_conv=2)
    result = check_promise(promise, Subject(build=build, d_model=16))
    assert result.outcome == "kept", result.detail


# --- memories ------------------------------------------------------------------------------------


def make(**keywords):
    settings = dict(n_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    return MoM(12, **{**settings, **keywords})


@nnx.jit
def run(mixer, x, segment_ids=None, state=None):
    return mixer(x, segment_ids=segment_ids, state=state)


@nnx.jit
def told(mixer, x, segment_ids=None):
    _, found = captured(mixer, lambda mixer: mixer(x, segment_ids=segment_ids)[0])
    return {name.partition("__")[2]: value for name, value in found.items()}


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, 12)), jnp.float32)


def avoiding(mixer, memory):
    """The mixer with a router that never sends a token (whose first number is 1) to a memory."""
    mixer.router.kernel[...] = mixer.router.kernel[...].at[0, memory].set(-1e3)
    return mixer


def test_labels_of_memories_mean_nothing():
    mixer, x = make(), inputs(2, 40)
    y, _ = run(mixer, x)
    order = jnp.asarray([2, 0, 3, 1])
    routed = lambda kernel: kernel.at[:4].set(kernel[order])
    mixer.router.kernel[...] = mixer.router.kernel[...][:, order]
    for part in (mixer.k_proj, mixer.v_proj, mixer.rule.a_proj, mixer.rule.b_proj):
        part.kernel[...] = routed(part.kernel[...])
    again, state = run(mixer, x)
    np.testing.assert_allclose(again, y, atol=1e-6)


def test_memories_that_are_not_chosen_stay_the_same_to_the_bit():
    """A step changes the chosen memories and the shared one, and no bit of the others."""
    mixer, x = make(), inputs(3, 10)
    _, state = run(mixer, x[:, :9])
    _, after = nnx.jit(lambda mixer, x_t, state: mixer.step(x_t, state))(mixer, x[:, 9], state)
    chosen, _ = mixer._visits(mixer._route(x[:, 9]))
    for row in range(3):
        for memory in range(5):
            for before, now in zip(state[:-1], after[:-1], strict=True):
                same = np.array_equal(before[row, memory], now[row, memory])
                assert same == (memory not in chosen[row])


def test_a_memory_that_is_never_hit():
    """Prefill and steps go by it: it holds nothing, and the rest is as in one piece."""
    mixer = avoiding(make(), 1)
    x = inputs(2, 12).at[..., 0].set(1)
    assert float(told(mixer, x)["router_load/1"]) == 0
    whole, end = run(mixer, x)
    _, state = run(mixer, x[:, :9])
    step = nnx.jit(lambda mixer, x_t, state: mixer.step(x_t, state))
    for t in range(9, 12):
        y, state = step(mixer, x[:, t], state)
        np.testing.assert_allclose(y, whole[:, t], atol=1e-6)
    for part, want in zip(state[:-1], end[:-1], strict=True):
        assert not np.any(part[:, 1]) and np.all(np.any(part[:, 0].reshape(2, -1), axis=1))
        np.testing.assert_allclose(part, want, atol=1e-6)


def test_what_a_memory_holds_of_an_earlier_document_is_forgotten():
    """Memory 1 is hit in document 1, not in 2, then by a stream that names no document any more."""
    mixer = avoiding(make(), 1)
    x = inputs(1, 24)
    x = x.at[:, 8:16, 0].set(1).at[:, :8, 0].set(-0.01).at[:, 16:, 0].set(-0.01)
    assert float(told(mixer, x[:, :8])["router_load/1"]) > 0.5
    ids = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 8, axis=1)
    _, state = run(mixer, x[:, :8], ids[:, :8])
    assert np.any(state.s[:, 1]) and np.any(state.k[:, 1])
    _, state = run(mixer, x[:, 8:16], ids[:, 8:])
    assert not np.any(state.s[:, 1]) and not np.any(state.k[:, 1])
    _, whole = run(mixer, x[:, :16], ids)
    assert not np.any(whole.s[:, 1]) and not np.any(whole.k[:, 1])
    _, alone = run(mixer, x[:, 8:16])
    got, want = (run(mixer, x[:, 16:], None, one)[0] for one in (state, alone))
    np.testing.assert_allclose(got, want, atol=1e-6)


# --- the router ----------------------------------------------------------------------------------


def test_load_and_loss_of_a_layer():
    ids = jnp.asarray(from_lengths([(20, 9), (33,)], 35))
    found = told(make(), inputs(2, 35), ids)
    load = sum(float(found[f"router_load/{i}"]) for i in range(4))
    assert load == pytest.approx(2, rel=1e-6)  # counts add up to topk times the tokens
    assert float(found["router_dropped"]) == 0
    assert 0 < float(found["router_entropy/token"]) <= 1
    even = make(aux_loss_scale=0.5, n_layers=4)
    even.router.kernel[...] = jnp.zeros((12, 4))
    assert float(told(even, inputs(2, 35), ids)["load_balance"]) == pytest.approx(2 * 0.5 / 4)


def test_the_router_learns_from_weights_and_loss_alone():
    def gradient(what, **keywords):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixer = make(**keywords)

        def loss(mixer):
            y, found = captured(mixer, lambda mixer: mixer(inputs(2, 20))[0])
            return jnp.sum(jnp.sin(y)) if what == "output" else found["loss__load_balance"]

        return np.abs(nnx.jit(nnx.grad(loss))(mixer)["router"]["kernel"][...]).max()

    assert gradient("output") > 1e-4
    assert gradient("output", topk=1) == 0
    assert gradient("output", topk=1, normalize_weights=False) > 1e-4
    assert gradient("loss", topk=1) > 1e-4


def test_one_choice_warns_that_the_router_gets_no_gradient():
    with pytest.warns(UserWarning, match="topk is 1: .* the router gets no gradient"):
        make(topk=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(topk=1, normalize_weights=False)
        make(topk=1, num_memories=1)


def test_nan_in_the_router_shows_and_drops_nothing():
    """Training stops at such a step (exit 3): a nan must not be hidden, nor anything else break."""
    mixer, x = make(), inputs(2, 20)
    mixer.router.kernel[...] = jnp.full((12, 4), jnp.nan)
    y, state = run(mixer, x)
    assert np.all(np.isnan(y)) and np.all(np.isfinite(state.s))
    assert float(told(mixer, x)["router_dropped"]) == 0
    y, _ = mixer.step(x[:, 0], mixer.init_state(2))
    assert np.all(np.isnan(y))


def test_nan_in_one_row_stays_there():
    mixer, x = make(), inputs(2, 20)
    y, _ = run(mixer, x)
    bad, _ = run(mixer, x.at[0, 7].set(jnp.nan))
    assert np.all(np.isnan(bad[0, 7]))
    np.testing.assert_array_equal(bad[1], y[1])


# --- lengths and documents -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63])
def test_lengths(length):
    mixer, x = make(), inputs(2, length)
    y, _ = run(mixer, x)
    step = nnx.jit(lambda mixer, x_t, state: mixer.step(x_t, state))
    state, stepped = mixer.init_state(2), []
    for t in range(length):
        y_t, state = step(mixer, x[:, t], state)
        stepped.append(y_t)
    np.testing.assert_allclose(y, jnp.stack(stepped, 1), atol=1e-6)


def test_an_empty_document_in_a_pack():
    """It takes no token, and its number may be missing: nobody notices."""
    mixer, x = make(), inputs(1, 20)
    y, _ = run(mixer, x, jnp.asarray(from_lengths([(9, 0, 11)], 20)))
    other, _ = run(mixer, x, jnp.asarray(np.where(np.arange(20) < 9, 2, 7)[None], jnp.int32))
    np.testing.assert_array_equal(y, other)
    nothing, state = run(mixer, x, jnp.zeros((1, 20), jnp.int32))
    assert not np.any(nothing) and not any(np.any(part) for part in state)


# --- settings ------------------------------------------------------------------------------------


def test_parameter_count_is_that_of_the_card():
    """340M: per layer, and what a token leaves idle."""
    make = lambda **kw: nnx.eval_shape(lambda: MoM(1024, head_dim=256, rngs=nnx.Rngs(0), **kw))
    count = lambda mixer: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    d = 1024
    own = 2 * d * d + 2 * 4 * d
    common = 3 * d * d + 3 * 4 * d + 256 + 8
    assert count(make()) == 5 * own + common + 4 * d
    assert make().idle_parameters() == 2 * own
    assert count(make(single_kv_proj=True)) == own + common + 4 * d
    assert make(single_kv_proj=True).idle_parameters() == 0
    assert make().state_bytes(1) == dict(
        recurrent=4 * 5 * 4 * 256 * 256, total=4 * 5 * (4 * 256 * 256 + 3 * 3072) + 4
    )


@pytest.mark.parametrize("rule", ["gated_deltanet", "gla", "retention", "mamba2", "linear"])
def test_idle_parameters_are_those_of_a_memory(rule):
    count = lambda **kw: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            nnx.state(nnx.eval_shape(lambda: make(rule=rule, **kw)), nnx.Param)
        )
    )
    idle = nnx.eval_shape(lambda: make(rule=rule, num_memories=3)).idle_parameters()
    router = 12
    assert count(num_memories=4) - count(num_memories=3) == idle + router


def test_initial_values():
    mixer = MoM(256, n_heads=4, head_dim=32, rngs=nnx.Rngs(0))
    xavier = lambda d_in, d_out: 2**-2.5 * (6 / (d_in + d_out)) ** 0.5
    for kernel, bound in (
        (mixer.router.kernel, xavier(256, 4)),
        (mixer.q_proj.kernel, xavier(256, 128)),
        (mixer.k_proj.kernel, xavier(256, 128)),
        (mixer.rule.a_proj.kernel, xavier(256, 4)),
        (mixer.out_proj.kernel, xavier(128, 256)),
        (mixer.k_conv.weight, 0.5),
    ):
        assert 0.95 * bound < float(jnp.abs(kernel[...]).max()) <= bound
    assert len({float(k[0, 0]) for k in mixer.k_proj.kernel[...]}) == 5
    rates = np.exp(mixer.rule.decay.A_log[...])
    assert np.all((rates > 0) & (rates <= 16))
    dt = jax.nn.softplus(mixer.rule.decay.dt_bias[...])
    assert np.all((dt > 0.99e-4) & (dt < 0.101))
    np.testing.assert_array_equal(mixer.norm.scale[...], 1.0)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(topk=5), "topk is 5; it must lie in 1 .. num_memories, which is 4"),
        (dict(topk=0), "topk is 0"),
        (dict(num_memories=0), "num_memories is 0"),
        (dict(rule="delta"), "rule is 'delta'; allowed: gated_deltanet, gla"),
        (dict(n_heads=5, head_dim=None), "no multiple of n_heads"),
        (dict(expand_v=0.1), "expand_v 0.1"),
        (dict(d_conv=-1), "d_conv is -1"),
        (dict(aux_loss_scale=-1.0), "aux_loss_scale is -1.0"),
        (dict(gate_normalizer=0.0), "gate_normalizer is 0.0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


@pytest.mark.parametrize(
    "shape", [(8, 1, 1, 1), pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)]
)
def test_spread_over_eight_devices(shape):
    """The operators stand in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(make())
    x = inputs(8, 37)
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        mixer = nnx.merge(graphdef, variables)
        call = lambda mixer: mixer(x, segment_ids=ids)
        (y, state), found = captured(mixer, call)
        total = jnp.sum(jnp.sin(y)) + sum(jnp.sum(part) for part in state[:-1])
        return total + found["loss__load_balance"]

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(grad)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: grad(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
