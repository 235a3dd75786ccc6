"""TCNCA: the contract of a mixer, who sees whom, its settings; and the network alone."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import TCNCA
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.nn.tcn import TCN, receptive_field
from seqzoo.testing import PROMISES, STREAMS, Subject, check_promise

SMALL = dict(kernel_size=4, dilation_growth=4, n_levels=2, chunk_size=20)
SUBJECTS = {
    "mega": Subject(build=functools.partial(TCNCA, **SMALL), d_model=16),
    "simple": Subject(
        build=functools.partial(TCNCA, **SMALL, gating="simple", attention="laplace"), d_model=16
    ),
    "separable": Subject(
        build=functools.partial(TCNCA, **SMALL, preset="separable", rel_pos_bias="simple"),
        d_model=16,
    ),
    "linear": Subject(build=functools.partial(TCNCA, **SMALL, preset="linear"), d_model=16),
    "both_ways": Subject(
        build=functools.partial(
            TCNCA, kernel_size=5, dilation_growth=3, n_levels=2, chunk_size=None, causal=False
        ),
        d_model=16,
    ),
}
FAST = ("mega",)


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SUBJECTS]
)
def test_promise(name, promise):
    result = check_promise(promise, SUBJECTS[name])
    declines = name == "both_ways" and promise in STREAMS
    assert result.outcome == ("declined" if declines else "kept"), result.detail


@pytest.mark.parametrize("promise", ["steps_equal_whole", "causal", "packed_equal_alone"])
def test_simple_promise(promise):
    result = check_promise(promise, SUBJECTS["simple"])
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("gating", ["mega", "simple"])
def test_only_the_network_crosses_chunks(gating):
    """A token of the second chunk sees the first one through the network, and not beyond it."""
    chunk, reach = 8, 6  # levels of 2 taps, dilations 1 and 4: 5 tokens back
    stack = dict(kernel_size=2, dilations=(1, 4), preset="linear")
    mixer = TCNCA(8, gating=gating, **stack, chunk_size=chunk, rngs=RNGS())
    x = jax.random.normal(jax.random.key(0), (1, 24, 8))

    @jax.jit
    def of(x, g):
        y, _ = mixer(x)
        return jnp.sum(y[:, 16] * g)

    # Token 16 begins the third chunk: its own chunk before it is empty.
    seen = np.any(np.asarray(jax.grad(of)(x, jnp.ones(8)))[0] != 0, axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(seen), [11, 12, 15, 16])
    assert reach == receptive_field(2, (1, 4))
    none = TCNCA(8, gating=gating, kernel_size=1, n_levels=1, dilation_growth=1, chunk_size=chunk,
                 rngs=RNGS())  # fmt: skip
    alone = np.asarray(jax.jit(lambda x: none(x)[0])(x))
    changed = np.asarray(jax.jit(lambda x: none(x)[0])(x.at[:, :chunk].add(1.0)))
    np.testing.assert_array_equal(alone[:, chunk:], changed[:, chunk:])


def RNGS():
    return nnx.Rngs(0)


def test_simple_form_by_hand():
    """In numpy, of one chunk, without bias of the scores."""
    mixer = TCNCA(6, gating="simple", kernel_size=3, n_levels=2, dilation_growth=2, z_dim=4,
                  v_dim=5, chunk_size=16, rngs=RNGS())  # fmt: skip
    block = mixer.block
    block.rel_pos_bias.alpha[...] = jnp.zeros(4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 6))
    weight, s = np.asarray(block.move.weight, np.float64), x
    for i, d in enumerate((1, 2)):
        a = sum(w * np.pad(s, ((j * d, 0), (0, 0)))[:9] for j, w in enumerate(weight[i]))
        s = s + np.maximum(a, 0)
    m = s / (1 + np.exp(-s))
    q, k, v = (m @ np.asarray(p.kernel[...]) for p in (block.q_proj, block.k_proj, block.v_proj))
    scores = np.where(np.tri(9, dtype=bool), q @ k.T / 2, -np.inf)
    p = np.exp(scores - scores.max(1, keepdims=True))
    want = p / p.sum(1, keepdims=True) @ v @ np.asarray(block.out_proj.kernel[...])
    got, _ = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], want, atol=2e-5)


def test_weight_norm():
    """The size of v does not matter, that of g does; at the start the weight is v."""
    move = TCN(4, kernel_size=3, dilation_growth=3, n_levels=2, rngs=RNGS())
    before = np.asarray(move.weight)
    np.testing.assert_allclose(before, move.v[...], rtol=1e-6)
    move.v[...] = 7 * move.v[...]
    np.testing.assert_allclose(move.weight, before, rtol=1e-6)
    move.g[...] = 2 * move.g[...]
    np.testing.assert_allclose(move.weight, 2 * before, rtol=1e-6)


def test_taps_without_a_direction():
    """A channel whose taps are all 0: it has 0 for its taps, and finite gradients."""
    stack = dict(kernel_size=3, dilation_growth=2, n_levels=2, preset="linear")
    network = TCN(4, **stack, rngs=RNGS())
    before = network.weight
    network.v[...] = network.v[...].at[1, :, 2].set(0.0)
    expected = np.asarray(before).copy()
    expected[1, :, 2] = 0
    np.testing.assert_array_equal(network.weight, expected)
    x = jax.random.normal(jax.random.key(1), (1, 9, 4))
    grads = nnx.grad(lambda network: jnp.sum(network(x)[0]))(network)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert np.any(grads.v[...][1, :, 2] != 0)  # so it can get one


def test_parameter_count():
    d, levels, taps = 8, 3, 5
    count = lambda **more: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            nnx.state(
                TCN(d, kernel_size=taps, dilation_growth=2, n_levels=levels, rngs=RNGS(), **more),
                nnx.Param,
            )
        )
    )
    assert count() == d * levels * (taps + 2) + d
    assert count(weight_norm=False, use_bias=False, skip=False) == d * levels * taps
    assert count(preset="separable") == d * levels * (taps + 2) + d + levels * d * d


def test_fields_of_the_card():
    """K, f, J and what they see; the shipped default; any list of dilations."""
    for taps, growth, levels, seen in (
        (17, 17, 3, 4913), (5, 5, 5, 3125), (32, 32, 2, 1024), (7, 4, 6, 8191), (3, 2, 8, 511),
    ):  # fmt: skip
        move = nnx.eval_shape(
            lambda k=taps, f=growth, j=levels: TCN(
                1, kernel_size=k, dilation_growth=f, n_levels=j, rngs=RNGS()
            )
        )
        assert move.receptive_field == seen
    assert TCN(1, rngs=RNGS()).dilations == (1, 16, 256)
    assert TCN(1, dilations=[1], kernel_size=3, rngs=RNGS()).receptive_field == 3


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(kernel_size=4, dilation_growth=5), "leaves holes"),
        (dict(causal=False), "kernel_size is 16 and causal false: an even number of taps"),
        (dict(kernel_size=0), "kernel_size is 0"),
        (dict(n_levels=0), "n_levels is 0"),
        (dict(dilations=[]), "dilations is \\[\\]"),
        (dict(dilations=[0]), "dilations\\[0\\] is 0"),
        (dict(preset="full"), "preset is 'full'"),
        (dict(gating="none"), "gating is 'none'"),
        (dict(chunk_size=None), "chunk_size is null and the mixer is causal"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(attention="cosine"), "attention is 'cosine'"),
        (dict(rel_pos_bias="none"), "rel_pos_bias is 'none'"),
        (dict(max_length=0), "max_length is 0"),
    ],
)
@pytest.mark.parametrize("gating", ["mega", "simple"])
def test_bad_settings(gating, keywords, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: TCNCA(16, **(dict(gating=gating) | keywords), rngs=RNGS()))


def built(**keywords):
    """The network, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        move = nnx.eval_shape(lambda: TCN(4, rngs=RNGS(), **keywords))
    return move, [str(w.message) for w in caught]


def test_levels_that_reach_nothing_are_left_out():
    move, said = built(max_length=200)
    assert move.dilations == (1, 16)
    assert len(said) == 2 and "levels of dilation [256] reach no other token" in said[0]
    assert "the receptive field is 256 tokens, more than sequences of 200 have" in said[1]
    move, said = built(max_length=4096)
    assert move.dilations == (1, 16, 256) and not said
    _, said = built(max_length=4095)
    assert len(said) == 1 and "4096 tokens, more than" in said[0]
    _, said = built(kernel_size=5, dilation_growth=5, n_levels=2, causal=False, max_length=13)
    assert not said  # 12 to each side
    _, said = built(kernel_size=5, dilation_growth=5, n_levels=2, causal=False, max_length=12)
    assert len(said) == 1 and "25 tokens (half to each side)" in said[0]
    assert built(max_length=1)[0].dilations == (1,)


def test_holes_of_a_list_are_told():
    _, said = built(kernel_size=3, dilations=(1, 4))
    assert len(said) == 1 and "tokens between 3 and 4 back" in said[0]
    assert not built(kernel_size=3, dilations=(3, 1))[1]


@pytest.mark.slow
def test_gradients_against_finite_differences():
    """Every parameter of the network, in float64."""
    with jax.enable_x64(True):
        move = TCN(3, kernel_size=3, dilation_growth=3, n_levels=2, dtype="float64", rngs=RNGS())
        graphdef, params = nnx.split(move)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.as_pure(params))
        rng = np.random.default_rng(0)
        x, dy = (jnp.asarray(rng.normal(size=(2, 15, 3))) for _ in range(2))
        loss = jax.jit(lambda p: jnp.sum(dy * nnx.merge(graphdef, p)(x)[0]))
        gradients = jax.grad(loss)(params)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            direction = jnp.asarray(rng.normal(size=gradient.shape))
            along = lambda step, path=path, direction=direction: float(
                loss(
                    jax.tree_util.tree_map_with_path(
                        lambda q, a: a + step * direction if q == path else a, params
                    )
                )
            )
            want = float(jnp.sum(gradient * direction))
            got = (along(1e-6) - along(-1e-6)) / 2e-6
            assert abs(got - want) < 1e-7 * max(1.0, abs(want)), path


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 8, 1)])
@pytest.mark.parametrize("gating", ["mega", "simple"])
def test_spread_over_eight_devices(gating, shape):
    """Each operator call stands in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(TCNCA(16, gating=gating, **SMALL, rngs=RNGS()))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.move.x)

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
        # The bias of keys moves no softmax: its gradient is rounding alone, hence the 5e-5.
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=5e-5 + 1e-5 * float(jnp.abs(a).max()))
