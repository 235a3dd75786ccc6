"""Monarch Mixer: the contract of a mixer both ways, padding, decoding, how it starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import MonarchMixer
from seqzoo.nn.implicit_filter import ImplicitFilter, fading, positions
from seqzoo.nn.param import Rates, own_rates
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, STREAMS, Subject, check_promise

make = functools.partial(MonarchMixer, max_length=512, filter_order=8, init_std=None)
CAUSAL = Subject(build=make, d_model=8)
BOTH_WAYS = Subject(build=functools.partial(make, causal=False), d_model=8)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, CAUSAL)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("promise", PROMISES)
def test_promise_both_ways(promise):
    result = check_promise(promise, BOTH_WAYS)
    assert result.outcome == ("declined" if promise in STREAMS else "kept"), result.detail


def test_the_direct_form_looks_ahead_by_no_bit():
    subject = Subject(build=functools.partial(make, conv_form="direct"), d_model=8)
    result = check_promise("causal", subject)
    assert (result.outcome, result.detail) == ("kept", "to the bit")


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_no_token(causal):
    """A sequence gives the same, whatever length it is padded to and whatever stands there."""
    mixer = jax.jit(make(8, causal=causal, rngs=nnx.Rngs(0)).__call__)
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    want, _ = mixer(x[:, :11])
    for length in (14, 24):
        ids = jnp.broadcast_to((jnp.arange(length) < 11).astype(jnp.int32), (2, length))
        got, _ = mixer(x[:, :length], segment_ids=ids)
        assert not got[:, 11:].any()
        np.testing.assert_allclose(got[:, :11], want, atol=1e-5 * np.abs(want).max())


def test_the_cache_is_as_large_as_asked():
    """Tokens further back than it reaches are forgotten; within reach steps are the whole."""
    mixer = make(8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    whole, _ = jax.jit(mixer.__call__)(x)
    state = mixer.init_state(1, max_length=6)
    assert state.long.conv.v.shape == (1, 5, 8) and state.residual.kernel.shape == (8, 6)
    step = jax.jit(mixer.step)
    for i in range(12):
        y, state = step(x[:, i], state)
        close = np.allclose(y, whole[:, i], atol=1e-5 * float(np.abs(whole).max()))
        assert close == (i < 6)


def test_a_fresh_state_goes_on():
    """What a whole sequence leaves behind remembers all of it, up to max_length tokens."""
    mixer = MonarchMixer(8, max_length=36, filter_order=8, init_std=None, rngs=nnx.Rngs(0))
    call = jax.jit(mixer.__call__)
    x = jax.random.normal(jax.random.key(0), (2, 36, 8))
    whole, _ = call(x)
    for cut in (1, 35):
        _, state = call(x[:, :cut])
        rest, _ = call(x[:, cut:], state=state)
        np.testing.assert_allclose(rest, whole[:, cut:], atol=1e-5 * np.abs(whole).max())


def test_start():
    mixer = MonarchMixer(64, max_length=40, causal=False, rngs=nnx.Rngs(0))
    std = lambda value: float(jnp.std(value[...]))
    assert std(mixer.in_proj.kernel) == pytest.approx(0.02, rel=0.05)
    assert std(mixer.out_proj.kernel) == pytest.approx(0.02, rel=0.05)
    assert not mixer.in_proj.bias[...].any() and not mixer.out_proj.bias[...].any()
    assert mixer.conv.weight.shape == (3, 192)
    assert 0.5 < float(jnp.abs(mixer.conv.weight[...]).max()) <= 3**-0.5
    for one in (mixer.filter, mixer.residual_filter):
        assert std(one.skip) == pytest.approx(1, rel=0.4)
        np.testing.assert_array_equal(one.frequency[...], np.full(128, 10.0))
        np.testing.assert_array_equal(one.z[...], positions(40, 5))
        for network in (one.forward, one.reverse):
            shapes = [w.shape for w in network.weights]
            assert shapes == [(5, 128), (128, 128), (128, 128), (128, 64)]
            assert std(network.weights[1]) == pytest.approx(0.02, rel=0.05)
            assert not any(b[...].any() for b in network.biases)
    slow, fast = np.log(1e-2) / -1.5, np.log(1e-2) / -0.3
    np.testing.assert_allclose(fading(64), np.linspace(slow, fast, 64), rtol=1e-6)


def test_what_the_optimizer_is_told():
    abstract = lambda **rates: nnx.eval_shape(
        lambda: MonarchMixer(8, filter_order=8, **rates, rngs=nnx.Rngs(0))
    )
    mixer = abstract()
    one = mixer.residual_filter
    assert own_rates(one.z) == Rates(1e-5, None)
    assert own_rates(one.frequency) == Rates(1e-3, None)
    assert {own_rates(w) for w in one.forward.weights} == {Rates(1e-3, 0.1)}
    assert {own_rates(b) for b in one.forward.biases} == {Rates(1e-3, None)}
    assert own_rates(one.skip) is None and own_rates(mixer.in_proj.kernel) is None
    rates = dict(filter_lr=None, filter_pos_lr=None, filter_weight_decay=None)
    plain = abstract(**rates)
    assert all(own_rates(v) is None for _, v in nnx.to_flat_state(nnx.state(plain, nnx.Param)))


def test_a_shorter_kernel_is_the_first_part():
    made_by = ImplicitFilter(6, max_length=32, two_sided=True, order=8, rngs=nnx.Rngs(0))
    for whole, part in zip(made_by(32), made_by(11), strict=True):
        np.testing.assert_allclose(part, whole[:, :11], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(max_length=0), "max_length is 0"),
        (dict(filter_emb_dim=4), "filter_emb_dim is 4; it must be odd and at least 3"),
        (dict(filter_order=0), "filter_order is 0"),
        (dict(conv_form="fast"), "conv_form is 'fast'; allowed: auto, direct, fft, monarch"),
        (dict(filter_lr=-1.0), "lr is -1.0; it must be 0 or more"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MonarchMixer(8, **keywords, rngs=nnx.Rngs(0))


def test_longer_than_the_filter():
    mixer = MonarchMixer(8, max_length=4, filter_order=8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="5 tokens are more than the filter has lags: max_length"):
        mixer(jnp.ones((1, 5, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 8, 1)])
def test_spread_over_eight_devices(shape, causal):
    """Each operator call stands in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(
        MonarchMixer(32, max_length=37, filter_order=8, causal=causal, rngs=nnx.Rngs(0))
    )
    x = jax.random.normal(jax.random.key(0), (8, 37, 32))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + (jnp.sum(state.long.conv.v) if causal else 0)

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
