"""LSSL: the contract of a mixer, stored values, three forms in float64, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import LSSL
from seqzoo.nn import hippo, krylov
from seqzoo.nn.param import own_rates
from seqzoo.nn.report import captured
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.nn.stack import Stack
from seqzoo.nn.state_space import convolution, stream
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=functools.partial(LSSL, d_state=8, n_outputs=2, bias=True), d_model=8)
LAYERS = (
    "legs_N16_L63",
    "legt_N8_L37",
    pytest.param("legs_N64_L130", marks=pytest.mark.slow),
    pytest.param("lagt_N12_L50", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


def layer(u, A, B, log_dt, C, D, weight, bias):
    """The whole layer as a function of what the stored files name; u `[b t e]`."""
    step = lambda dt: krylov.bilinear(A, B, dt)
    dt, t = jnp.exp(log_dt), u.shape[1]
    kernel, _ = krylov.in_blocks(lambda dt, C: krylov.kernel(step(dt), C, t), (dt, C), A.shape[0])
    absorb = lambda u, count, x: krylov.absorb(step(dt), u, count, x)
    y, _, _ = stream(u, convolution(kernel, D, None, None), respond=None, absorb=absorb)
    return jax.nn.gelu(y, approximate=False) @ weight.T + bias, (kernel, y)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_gradients_are_the_stored_ones(golden, name):
    stored = golden(f"lssl/layer_{name}")
    names = ("u", "A", "B", "log_dt", "C", "D", "output_weight", "output_bias")
    arrays = [jnp.asarray(stored[f"in.{n}"]) for n in names]
    arrays[0] = jnp.swapaxes(arrays[0], 0, 1)

    def run(*arrays):
        y, more = layer(*arrays)
        y = jnp.swapaxes(y, 0, 1)
        return jnp.sum(y * stored["ct.y"]), (y, *more)

    grads, (y, kernel, y_ssm) = jax.jit(jax.grad(run, range(8), has_aux=True))(*arrays)
    b, t, e = arrays[0].shape
    y_ssm = jnp.swapaxes(y_ssm, 0, 1).reshape(t, b, e, -1)
    for what, got in dict(y=y, kernel=kernel, y_ssm=y_ssm).items():
        want = stored[f"out64.{what}"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=what)
    for what, got in zip(names, grads, strict=True):
        want = stored[f"grad64.{what}"]
        got = jnp.swapaxes(got, 0, 1) if what == "u" else got
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=what)


@pytest.mark.parametrize("name, learn", [("legs_N16_L63", 0), ("legt_N8_L37", 2)])
def test_mixer_gives_the_stored_output(golden, name, learn):
    """A and B by the mixer's own measure; trained vectors start there (but for legt's noise)."""
    stored = golden(f"lssl/layer_{name}")
    get = lambda what: jnp.asarray(stored[f"in.{what}"])
    e, m, n = get("C").shape
    mixer = LSSL(e, d_state=n, n_outputs=m, measure=name[:4], learn=learn, rngs=nnx.Rngs(0))
    mixer.log_dt[...], mixer.C[...], mixer.D[...] = get("log_dt"), get("C"), get("D")
    mixer.out_proj.kernel[...], mixer.out_proj.bias[...] = (
        get("output_weight").T,
        get("output_bias"),
    )
    if learn:
        exact = hippo.transition("legt", n).d
        assert 1e-4 < float(jnp.abs(mixer.transition["d"][...] - exact).max()) < 0.05
        mixer.transition["d"][...] = jnp.broadcast_to(exact, (e, n))
    y, _ = jax.jit(mixer.__call__)(jnp.swapaxes(get("u"), 0, 1))
    want = np.swapaxes(stored["out64.y"], 0, 1)
    np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "keywords",
    [
        dict(learn=1, measure="legt", n_outputs=2, conv="chunk"),
        pytest.param(dict(learn=0), marks=pytest.mark.slow),
    ],
)
def test_three_forms_in_float64(keywords):
    """Steps = kernel and convolution = chunks, with documents and padding, to 1e-10."""
    with jax.enable_x64(True):
        mixer = LSSL(4, d_state=16, dtype="float64", **keywords, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(1), (2, 60, 4), jnp.float64)
        ids = np.where(np.arange(60) < 47, 1, 2)[None].repeat(2, 0).astype(np.int32)
        ids[1, :3] = ids[1, 58:] = 0
        call = jax.jit(mixer.__call__)
        whole, end = call(x)
        packed, packed_end = call(x, segment_ids=ids)
        state = packed_state = mixer.init_state(2)
        chunks, packed_chunks = [], []
        for i in range(0, 60, 20):
            y, state = call(x[:, i : i + 20], state=state)
            chunks.append(y)
            y, packed_state = call(
                x[:, i : i + 20], segment_ids=ids[:, i : i + 20], state=packed_state
            )
            packed_chunks.append(y)
        ready = mixer.prepared()
        one = lambda state, x_t: ready.step(x_t, state)[::-1]
        last, steps = jax.jit(lambda s, x: jax.lax.scan(one, s, x))(
            mixer.init_state(2), jnp.swapaxes(x, 0, 1)
        )
    assert whole.dtype == jnp.float64 and state.x.dtype == jnp.float64
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max())
    close(jnp.swapaxes(steps, 0, 1), whole)
    close(jnp.concatenate(chunks, 1), whole)
    close(jnp.concatenate(packed_chunks, 1), packed)
    for other in (last.x, state.x):
        close(other, end.x)
    close(packed_state.x, packed_end.x)
    np.testing.assert_array_equal(packed_state.last_id, [2, 2])
    close(packed[0, :47], whole[0, :47])


def test_what_is_trained_and_how():
    """Shapes by learn, and the learning rates of their own."""
    e, m, n = 6, 2, 8
    vectors = 5 * n + 2 * (n + 1)
    base = e * m * (n + 1) + e + e * m * e + e
    for learn, more in enumerate((0, vectors, e * vectors)):
        mixer = LSSL(e, d_state=n, n_outputs=m, learn=learn, rngs=nnx.Rngs(0))
        leaves = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
        assert sum(v[...].size for _, v in leaves) == base + more
        own = {path[-1]: own_rates(v).lr for path, v in leaves if own_rates(v)}
        want = dict.fromkeys(hippo.Transition._fields, 1e-4) if learn else {}
        assert own == want | {"log_dt": 1e-3 if learn else 0.0}
        assert not any(v.get_metadata()["decay"] for p, v in leaves if p[-1] in own)


def test_step_sizes_that_are_not_learned_get_no_gradient():
    def gradient(dt_learn):
        mixer = LSSL(4, d_state=4, learn=0, dt_learn=dt_learn, rngs=nnx.Rngs(0))
        loss = lambda m: jnp.sum(m._per_feature(lambda step: step.B))
        return jax.jit(nnx.grad(loss))(mixer)["log_dt"][...]

    assert not np.any(gradient(None)) and np.all(gradient(True))


def test_initial_values():
    random = LSSL(256, d_state=4, dt_min=1e-3, dt_max=0.1, rngs=nnx.Rngs(0))
    dt = np.exp(random.log_dt[...])
    assert 1e-3 <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.3
    even = LSSL(3, d_state=4, dt_init="uniform", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(even.log_dt[...]), [1e-3, 1e-2, 1e-1], rtol=1e-5)
    for normal in (random.C, random.D):
        assert abs(float(normal[...].std()) - 1) < 0.1
    assert 0.9 / 16 < float(jnp.abs(random.out_proj.kernel[...]).max()) <= 1 / 16


def test_resampling_is_another_step_size():
    def discrete(shift=0.0, **more):
        mixer = LSSL(4, d_state=4, learn=0, rngs=nnx.Rngs(0), **more)
        mixer.log_dt[...] += shift
        return jax.jit(lambda m: m._per_feature(lambda step: step))(mixer)

    plain, twice, legacy = (
        discrete(),
        discrete(resample=2.0),
        discrete(resample=2.0, resample_legacy=True),
    )
    for a, b in zip(twice, discrete(np.log(2.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(legacy.A, twice.A, rtol=1e-6)
    np.testing.assert_allclose(legacy.B, plain.B, rtol=1e-6)


@pytest.mark.slow
def test_both_ways_to_convolve_have_the_same_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 37, 4))
    ids = jnp.asarray(np.where(np.arange(37) < 30, 1, 0)[None].repeat(2, 0), jnp.int32)
    results = []
    for conv in ("long", "chunk"):
        graphdef, variables = nnx.split(
            LSSL(4, d_state=8, n_outputs=2, bias=True, conv=conv, rngs=nnx.Rngs(0))
        )

        def loss(variables, x, graphdef=graphdef):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, variables)(x, segment_ids=ids)[0]))

        results.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(nnx.as_pure(variables), x))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5 * float(jnp.abs(a).max()))


def test_what_it_reports():
    x = jnp.ones((1, 300, 4))
    run = jax.jit(lambda m: captured(m, lambda m: m(x))[1])
    mixer = LSSL(4, d_state=8, rngs=nnx.Rngs(0))
    told = run(mixer)
    assert 0.9 < float(told["value__rho"]) < 1.02 and told["skip__kernel_not_finite"] == 0
    mixer.transition["pl"][...] *= -4e3  # unstable: its powers overflow
    told = run(mixer)
    assert not float(told["value__rho"]) < 1.02 and told["skip__kernel_not_finite"] == 1


def test_a_stack_discretises_once_for_many_steps():
    stack = Stack(
        4,
        n_layers=2,
        pattern=("a",),
        mixers={"a": lambda rngs: LSSL(4, d_state=8, rngs=rngs)},
        rngs=nnx.Rngs(0),
    )
    apart = stack.unrolled()
    assert all(hasattr(block.mixer, "discrete") for run in apart.runs for block in run)
    x, state = jnp.ones((2, 4)), stack.init_state(2)
    step = jax.jit(lambda stack, x, state: stack.step(x, state))
    want, after = step(stack, x, state)
    got, apart_after = step(apart, x, stack.unrolled_state(state))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (apart_after, stack.unrolled_state(after))), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=0), "d_state is 0"),
        (dict(n_outputs=0), "n_outputs is 0"),
        (dict(measure="cheb"), "measure is 'cheb'; allowed: legs, legt, lagt"),
        (dict(learn=3), "learn is 3; allowed: 0"),
        (dict(dt_min=0.2), "dt_min is 0.2 and dt_max 0.1"),
        (dict(dt_init="log"), "dt_init is 'log'; allowed: random, uniform"),
        (dict(activation="tanh"), "activation is 'tanh'; allowed: gelu"),
        (dict(conv="fft"), "conv is 'fft'; allowed: long, chunk"),
        (dict(resample=0.0), "resample is 0.0"),
        (dict(transition_lr=-1.0), "transition_lr is -1.0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        LSSL(4, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 8, 1)])
def test_spread_over_eight_devices(shape):
    """Outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(LSSL(16, d_state=8, learn=2, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.x)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(grad)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        got = jax.jit(lambda p, x: grad(p, x))(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
