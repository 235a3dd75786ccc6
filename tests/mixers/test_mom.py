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
from seqzoo.mixers import GatedDeltaNet, MoM
from seqzoo.nn.report import captured
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.nn.slots import slots_for
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

T = 12


def make(**keywords):
    settings = dict(n_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    return MoM(12, **{**settings, **keywords})


def run(mixer, x, segment_ids=None, state=None):
    """One program for all calls of a shape: documents and state are always given."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    return _run(mixer, x, ids, mixer.init_state(len(x)) if state is None else state)


@nnx.jit
def _run(mixer, x, segment_ids, state):
    (y, state), found = captured(mixer, lambda m: m(x, segment_ids=segment_ids, state=state))
    return y, state, {name.partition("__")[2]: value for name, value in found.items()}


@nnx.jit
def step(mixer, x_t, state):
    return mixer.step(x_t, state)


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, 12)), jnp.float32)


def avoiding(mixer, memory):
    """The mixer with a router that sends no token whose first number is positive to a memory."""
    mixer.router.kernel[...] = mixer.router.kernel[...].at[0, memory].set(-1e3)
    return mixer


def test_a_single_memory_is_gated_deltanet():
    mixer = make(num_memories=1, topk=1, shared_mem=False)
    plain = GatedDeltaNet(12, n_heads=2, head_dim=4, expand_v=1.0, rngs=nnx.Rngs(1))
    for theirs, ours in (
        (plain.q_proj, mixer.q_proj.kernel[...]),
        (plain.k_proj, mixer.k_proj.kernel[0]),
        (plain.v_proj, mixer.v_proj.kernel[0]),
        (plain.a_proj, mixer.rule.a_proj.kernel[0]),
        (plain.b_proj, mixer.rule.b_proj.kernel[0]),
        (plain.gate_proj, mixer.gate.kernel[...]),
        (plain.out_proj, mixer.out_proj.kernel[...]),
    ):
        theirs.kernel[...] = ours
    plain.decay = mixer.rule.decay
    taps = mixer.conv.weight[...].reshape(4, 2, 3, 4)  # head by head, q k v in each
    for i, conv in enumerate((plain.q_conv, plain.k_conv, plain.v_conv)):
        conv.weight[...] = taps[:, :, i].reshape(4, 8)
    x = inputs(2, T)
    want, _ = nnx.jit(lambda mixer, x: mixer(x))(plain, x)
    np.testing.assert_allclose(run(mixer, x)[0], want, atol=1e-6)


def test_labels_of_memories_mean_nothing():
    mixer, x = make(), inputs(2, T)
    y, _, told = run(mixer, x)
    order = jnp.asarray([2, 0, 3, 1])
    mixer.router.kernel[...] = mixer.router.kernel[...][:, order]
    for part in (mixer.k_proj, mixer.v_proj, mixer.rule.a_proj, mixer.rule.b_proj):
        part.kernel[...] = part.kernel[...].at[:4].set(part.kernel[...][order])
    again, _, relabelled = run(mixer, x)
    np.testing.assert_allclose(again, y, atol=1e-6)
    assert relabelled["router_load/0"] == told["router_load/2"]


def test_memories_that_are_not_chosen_stay_the_same_to_the_bit():
    """A step changes the chosen memories and the shared one, and no bit of the others."""
    mixer, x, new = make(), inputs(2, T), inputs(2, seed=1)
    _, state, _ = run(mixer, x)
    _, after = step(mixer, new, state)
    chosen, _ = mixer._visits(mixer._route(new))
    for row in range(2):
        for memory in range(5):
            for before, now in zip(state[:-1], after[:-1], strict=True):
                same = np.array_equal(before[row, memory], now[row, memory])
                assert same == (memory not in chosen[row])


def test_a_memory_that_is_never_hit():
    """Prefill and steps go by it: it holds nothing, and the rest is as in one piece."""
    mixer = avoiding(make(), 1)
    x = inputs(2, 2 * T).at[..., 0].set(1)
    _, state, told = run(mixer, x[:, :T])
    assert float(told["router_load/1"]) == 0
    want, end, _ = run(mixer, x[:, T:], state=state)
    for t in range(T):
        y, state = step(mixer, x[:, T + t], state)
        np.testing.assert_allclose(y, want[:, t], atol=1e-6)
    for part, wanted in zip(state[:-1], end[:-1], strict=True):
        assert not np.any(part[:, 1]) and np.all(np.any(part[:, 0].reshape(2, -1), axis=1))
        np.testing.assert_allclose(part, wanted, atol=1e-6)


def test_what_a_memory_holds_of_an_earlier_document_is_forgotten():
    """Memory 1 is hit in document 1, not in 2, then by steps, which name no document."""
    mixer = avoiding(make(), 1)
    x = inputs(2, 2 * T)
    x = x.at[:, :T, 0].set(-0.01).at[:, T:, 0].set(1)
    _, first, told = run(mixer, x[:, :T])
    assert float(told["router_load/1"]) > 0.5
    assert np.all(np.any(first.s[:, 1], axis=(1, 2, 3))) and np.any(first.conv[:, 1])
    twos = jnp.full((2, T), 2, jnp.int32)
    _, second, _ = run(mixer, x[:, T:], twos, first)
    assert not np.any(second.s[:, 1]) and not np.any(second.conv[:, 1])
    _, alone, _ = run(mixer, x[:, T:])
    y, _ = step(mixer, x[:, 0], second)
    want, _ = step(mixer, x[:, 0], alone)
    np.testing.assert_allclose(y, want, atol=1e-6)
    # Both documents in one call: the same.
    both = jnp.concatenate([x[:, T // 2 : T], x[:, T : T + T // 2]], axis=1)
    ids = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), T // 2, axis=1).repeat(2, axis=0)
    _, state, _ = run(mixer, both, ids)
    assert not np.any(state.s[:, 1]) and not np.any(state.conv[:, 1]) and np.any(state.s[:, 2])


# --- the router ----------------------------------------------------------------------------------


def test_load_and_loss_of_a_layer():
    ids = jnp.asarray(from_lengths([(5, 4), (11,)], T))
    _, _, told = run(make(), inputs(2, T), ids)
    load = sum(float(told[f"router_load/{i}"]) for i in range(4))
    assert load == pytest.approx(2, rel=1e-6)  # counts add up to topk times the tokens
    assert float(told["router_dropped"]) == 0
    assert 0 < float(told["router_entropy/token"]) <= 1
    even = make()
    even.router.kernel[...] = jnp.zeros((12, 4))
    assert float(run(even, inputs(2, T), ids)[2]["load_balance"]) == pytest.approx(2 * 0.01)


def test_the_loss_is_a_mean_over_layers():
    mixer = make(aux_loss_scale=0.5, n_layers=4, rule="retention", d_conv=0)
    mixer.router.kernel[...] = jnp.zeros((12, 4))
    assert float(run(mixer, inputs(2, T))[2]["load_balance"]) == pytest.approx(2 * 0.5 / 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_choice_leaves_the_router_to_the_loss(normalize):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mixer = make(topk=1, normalize_weights=normalize, rule="retention", d_conv=0)
    assert [str(w.message)[:12] for w in caught] == ["topk is 1: t"] * normalize

    graphdef, variables = nnx.split(mixer)

    @jax.jit
    @jax.jacrev
    def slopes(kernel):
        mixer = nnx.merge(graphdef, variables, copy=True)
        mixer.router.kernel[...] = kernel
        y, found = captured(mixer, lambda mixer: mixer(inputs(2, T))[0])
        return jnp.stack([jnp.sum(jnp.sin(y)), found["loss__load_balance"]])

    by_output, by_loss = np.abs(slopes(mixer.router.kernel[...])).max(axis=(1, 2))
    assert by_output == 0 if normalize else by_output > 1e-4
    assert by_loss > 1e-4


def test_nan_in_the_router_shows_and_drops_nothing():
    """Training stops at such a step (exit 3): a nan must not be hidden, nor anything else break."""
    mixer, x = make(), inputs(2, T)
    mixer.router.kernel[...] = jnp.full((12, 4), jnp.nan)
    y, state, told = run(mixer, x)
    assert np.all(np.isnan(y)) and np.all(np.isfinite(state.s))
    assert float(told["router_dropped"]) == 0
    y, _ = step(mixer, x[:, 0], mixer.init_state(2))
    assert np.all(np.isnan(y))


def test_nan_in_one_row_stays_there():
    mixer, x = make(), inputs(2, T)
    y, _, _ = run(mixer, x)
    bad, _, _ = run(mixer, x.at[0, 7].set(jnp.nan))
    assert np.all(np.isnan(bad[0, 7]))
    np.testing.assert_array_equal(bad[1], y[1])


# --- lengths and documents -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63])
def test_lengths(length):
    mixer, x = make(), inputs(2, length)
    y, _, _ = run(mixer, x)
    state, stepped = mixer.init_state(2), []
    for t in range(length):
        y_t, state = step(mixer, x[:, t], state)
        stepped.append(y_t)
    np.testing.assert_allclose(y, jnp.stack(stepped, 1), atol=1e-6)


def test_long_rows_have_longer_blocks_and_the_same_answer():
    mixer, x = make(rule="retention"), inputs(2, 448)
    assert [slots_for(t, 3, 5, 3)[1] for t in (224, 448)] == [16, 64]
    whole, end, _ = run(mixer, x)
    first, state, _ = run(mixer, x[:, :224])
    second, state, _ = run(mixer, x[:, 224:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    np.testing.assert_allclose(state.s, end.s, atol=1e-6)


def test_an_empty_document_in_a_pack():
    """It takes no token, and its number may be missing: nobody notices."""
    mixer, x = make(), inputs(2, T)
    y, _, _ = run(mixer, x, jnp.asarray(from_lengths([(5, 0, 7)] * 2, T)))
    missing = np.where(np.arange(T) < 5, 2, 7)[None].repeat(2, axis=0)
    other, _, _ = run(mixer, x, jnp.asarray(missing, jnp.int32))
    np.testing.assert_array_equal(y, other)
    nothing, state, told = run(mixer, x, jnp.zeros((2, T), jnp.int32))
    assert not np.any(nothing) and not any(np.any(part) for part in state)
    assert all(np.isfinite(value) for value in told.values())


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
        (mixer.conv.weight, 0.5),
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
        (dict(expand_v=0.3), "expand_v 0.3: they make 1.2 channels"),
        (dict(d_conv=-1), "d_conv is -1"),
        (dict(aux_loss_scale=-1.0), "aux_loss_scale is -1.0"),
        (dict(gate_normalizer=0.0), "gate_normalizer is 0.0"),
        (dict(init_gain=0.0), "init_gain is 0.0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


# The quickest to compile; what a mesh cuts is the same for all.
QUICK = dict(rule="retention", d_conv=0)
SPREAD = [
    (QUICK, (2, 2, 2, 1)),
    *(
        pytest.param({}, m, marks=pytest.mark.slow)
        for m in ((2, 2, 2, 1), (8, 1, 1, 1), (1, 1, 8, 1))
    ),
]


@pytest.mark.parametrize("keywords, shape", SPREAD)
def test_spread_over_eight_devices(keywords, shape):
    """The operators stand in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(make(n_heads=8, head_dim=2, **keywords))
    x = inputs(8, 37)
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        mixer = nnx.merge(graphdef, variables)
        call = lambda mixer: mixer(x, segment_ids=ids)
        (y, state), found = captured(mixer, call)
        total = jnp.sum(jnp.sin(y)) + jnp.sum(state.conv) + jnp.sum(state.s)
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
