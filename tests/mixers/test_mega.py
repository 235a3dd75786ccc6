"""MEGA: the contract of a mixer, golden values, chunk boundaries, its size, its settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.mixers import Mega
from seqzoo.nn.linear import NORMS
from seqzoo.nn.mlp import SiLU
from seqzoo.nn.relative_bias import SimpleBias
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, STREAMS, Subject, check_promise

SMALL = dict(d_state=4, z_dim=6, v_dim=12, chunk_size=20)
SUBJECTS = {
    "rotary": Subject(build=functools.partial(Mega, **SMALL), d_model=16),
    "laplace": Subject(
        build=functools.partial(Mega, **SMALL, attention="laplace", rel_pos_bias="simple"),
        d_model=16,
    ),
    "post_norm": Subject(
        build=functools.partial(
            Mega, **SMALL, form="fft", attention="relu2", norm="scalenorm", prenorm=False
        ),
        d_model=16,
    ),
    "truncated": Subject(
        build=functools.partial(Mega, **SMALL, form="monarch", truncation=24), d_model=16
    ),
    "both_ways": Subject(
        build=functools.partial(Mega, **(SMALL | dict(chunk_size=None)), causal=False), d_model=16
    ),
}
FAST = ("rotary",)


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SUBJECTS]
)
def test_promise(name, promise):
    result = check_promise(promise, SUBJECTS[name])
    declines = name == "both_ways" and promise in STREAMS
    assert result.outcome == ("declined" if declines else "kept"), result.detail


# --- Golden values -------------------------------------------------------------------------------

MATRICES = ("v_proj", "mx_proj", "h_proj")


def off(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / max(np.max(np.abs(want)), 1e-5)


def golden_names(flags):
    """The source's parameter names by ours, and how theirs become ours."""
    d, n, z = flags["D"], flags["ndim"], flags["zdim"]
    table = {("gamma",): ("gamma", (2, z)), ("beta",): ("beta", (2, z))}
    for name in ("delta", "alpha", "beta", "gamma"):
        table["move", name] = (f"move.{name}", (-1, d, n))
    table["move", "omega"] = ("move.omega", (d,))
    for name in MATRICES:
        table[name, "kernel"] = (f"{name}.weight", None)  # transposed
        table[name, "bias"] = (f"{name}.bias", (-1,))
    if flags["norm"] == "scalenorm":
        table["norm", "scale"] = ("norm.norm.scalar", ())
    else:
        table["norm", "scale"] = ("norm.norm.weight", (d,))
        table["norm", "bias"] = ("norm.norm.bias", (d,))
    if flags["rel_pos_bias"] == "simple":
        table["rel_pos_bias", "weight"] = ("rel_pos_bias.rel_pos_bias", (-1,))
    else:
        for name in ("alpha", "beta"):
            table["rel_pos_bias", name] = (f"rel_pos_bias.{name}", (z,))
    return table


CASES = (
    "softmax_rotary_chunk8_causal",
    "laplace_simple_chunk8_bidir",
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            "softmax_simple_full_bidir",
            "laplace_rotary_full_causal",
            "softmax_simple_chunk8_padded",
        )
    ),
)


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
    """Outputs, every gradient, and steps where there are some, of the source's layer."""
    file = golden(f"tcnca/mega_{case}")
    flags = json.loads(str(file["meta"]))["flags"]
    causal, full = flags["causal"], flags["chunk_size"] < 0
    mixer = Mega(
        flags["D"],
        d_state=flags["ndim"],
        causal=causal,
        z_dim=flags["zdim"],
        v_dim=flags["hdim"],
        chunk_size=(flags["L"] if causal else None) if full else flags["chunk_size"],
        attention=flags["attention"],
        rel_pos_bias=flags["rel_pos_bias"],
        max_positions=flags["max_positions"],
        norm=flags["norm"],
        prenorm=flags["prenorm"],
        rngs=nnx.Rngs(0),
    )
    table = golden_names(flags)
    ours = lambda a, shape: a.T if shape is None else a.reshape(shape)
    flat = {path: jnp.asarray(ours(file[f"in.w.{n}"], shape)) for path, (n, shape) in table.items()}
    graphdef, variables = nnx.split(mixer)
    assert set(flat) == set(dict(nnx.to_flat_state(variables)))
    params = nnx.as_pure(nnx.from_flat_state(flat.items()))
    mask = file.get("in.padding_mask")
    ids = None if mask is None else jnp.asarray(~mask, jnp.int32)
    by_row = lambda name: jnp.asarray(np.swapaxes(file[name], 0, 1))
    x, ct = by_row("in.x"), by_row("ct.y")

    def run(params, x):
        y, _ = nnx.merge(graphdef, params)(x, segment_ids=ids)
        return jnp.sum(y * ct), y

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, y), (grads, dx) = run(params, x)
    assert off(np.swapaxes(y, 0, 1), file["out64.y"]) < 1e-5
    assert off(np.swapaxes(dx, 0, 1), file["grad64.x"]) < 1e-4
    grads = dict(nnx.to_flat_state(nnx.State(grads)))
    for path, (name, shape) in table.items():
        want = ours(file[f"grad64.w.{name}"], shape)
        assert off(grads[path], want) < 1e-4, name
    if "out.y_steps" in file:
        mixer = nnx.merge(graphdef, params)
        step = lambda state, x_t: mixer.step(x_t, state)[::-1]
        scan = jax.jit(lambda state, x: jax.lax.scan(step, state, x))
        _, stepped = scan(mixer.init_state(x.shape[0]), jnp.asarray(file["in.x"]))
        assert off(stepped, file["out.y_steps"]) < 1e-5


@pytest.mark.parametrize("case", ["prenorm_layernorm", "postnorm_rmsnorm"])
def test_golden_feed_forward(golden, case):
    """The channel mixer silu with the norm and the addition of a block."""
    file = golden(f"tcnca/mega_ffn_{case}")
    flags = json.loads(str(file["meta"]))["flags"]
    ffn = SiLU(flags["D"], d_ff=flags["F"], rngs=nnx.Rngs(0))
    norm = NORMS[flags["norm"]](flags["D"], rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(file["in.w.norm.norm.weight"])
    if flags["norm"] == "layernorm":
        norm.bias[...] = jnp.asarray(file["in.w.norm.norm.bias"])
    for layer, name in ((ffn.up, "fc1"), (ffn.down, "fc2")):
        layer.kernel[...] = jnp.asarray(file[f"in.w.{name}.weight"].T)
        layer.bias[...] = jnp.asarray(file[f"in.w.{name}.bias"])
    x = jnp.asarray(file["in.x"])
    y = x + ffn(norm(x)) if flags["prenorm"] else norm(x + ffn(x))
    assert off(y, file["out64.y"]) < 1e-5


# --- Who sees whom -------------------------------------------------------------------------------


def test_only_the_average_crosses_chunks():
    """With averages that read nothing, a chunk knows nothing of the one before it."""
    mixer = Mega(16, **(SMALL | dict(chunk_size=8)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 20, 16))
    call = jax.jit(lambda gamma, x: alone(gamma, x))
    graphdef, params = nnx.split(mixer)
    params = nnx.as_pure(params)

    def alone(gamma, x):
        moved = params | {"move": params["move"] | {"gamma": gamma}}
        return nnx.merge(graphdef, moved)(x)[0]

    gamma = params["move"]["gamma"]
    for weight, crosses in ((1.0, True), (0.0, False)):
        y = call(weight * gamma, x)
        changed = call(weight * gamma, x.at[:, 7].add(1.0))
        assert np.array_equal(y[:, :7], changed[:, :7])
        assert np.array_equal(y[:, 8:], changed[:, 8:]) != crosses
        assert not np.array_equal(y[:, 7], changed[:, 7])


def test_both_ways_sees_the_whole_row():
    mixer = Mega(16, **(SMALL | dict(chunk_size=None)), causal=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 20, 16))
    seen = jax.jit(jax.grad(lambda x: jnp.sum(mixer(x)[0][0, 5])))(x)
    assert np.all(np.any(seen != 0, axis=-1))


def test_a_stream_does_not_narrow():
    """Layers that compute in bfloat16 leave a float32 stream one."""
    mixer = nnx.eval_shape(lambda: Mega(16, **SMALL, dtype="bfloat16", rngs=nnx.Rngs(0)))
    for given, want in (("float32", "float32"), ("bfloat16", "bfloat16")):
        y, _ = nnx.eval_shape(lambda m, x: m(x), mixer, jnp.zeros((1, 3, 16), given))
        assert y.dtype == want


# --- Size and settings ---------------------------------------------------------------------------


def test_initial_values():
    mixer = Mega(128, z_dim=64, rngs=nnx.Rngs(0))
    std = lambda x: float(jnp.std(x[...]))
    for name in MATRICES:
        assert std(getattr(mixer, name).kernel) == pytest.approx(0.02, rel=0.03)
        assert not np.any(getattr(mixer, name).bias[...])
    assert std(mixer.gamma) == pytest.approx(0.02, rel=0.3) and not np.any(mixer.beta[...])
    assert std(mixer.rel_pos_bias.alpha) == pytest.approx(0.02, rel=0.4)
    simple = SimpleBias(64, max_positions=500, rngs=nnx.Rngs(0))
    assert simple.weight.shape == (999,) and std(simple.weight) == pytest.approx(0.02, rel=0.1)


def test_enwik8_has_39_million_parameters():
    """The released model of 39.0M, 3.25M of them in each layer."""
    config = compose(["model=mega_enwik8"])
    model = nnx.eval_shape(lambda: build(config.model, rngs=nnx.Rngs(0)))
    sizes = lambda part: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))
    assert sizes(model) == pytest.approx(39.0e6, rel=5e-3)
    assert sizes(model.stack) / 12 == 3_252_608
    assert model.embed_scale == 512**0.5
    assert model.embed_scale * config.model.embed_std == pytest.approx(1)  # the source's variance
    assert config.model.dropout == config.model.embed_dropout == 0.1


@pytest.mark.slow
def test_decoding_the_small_model():
    """Steps of the whole model give what it reads in one piece, across chunks of 32."""
    model = build(compose(["model=mega_small", "model.d_model=16"]).model, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 70), 0, model.vocab_size)
    whole = jax.jit(lambda x: model(x))(tokens)
    step = lambda state, token: model.step(token, state)[::-1]
    scan = jax.jit(lambda state, x: jax.lax.scan(step, state, x))
    _, stepped = scan(model.init_state(2), tokens.T)
    np.testing.assert_allclose(jnp.swapaxes(stepped, 0, 1), whole, atol=2e-5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=0), "d_state is 0"),
        (dict(z_dim=0), "z_dim is 0"),
        (dict(z_dim=5), "z_dim is 5; rel_pos_bias=rotary turns pairs"),
        (dict(v_dim=0), "v_dim is 0"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(chunk_size=None), "chunk_size is null and the mixer is causal"),
        (dict(attention="cosine"), "attention is 'cosine'; allowed: softmax, laplace, relu2"),
        (dict(rel_pos_bias="none"), "rel_pos_bias is 'none'; allowed: simple, rotary"),
        (dict(norm="batchnorm"), "norm is 'batchnorm'; allowed: rmsnorm, layernorm, scalenorm"),
        (dict(form="scan"), "form is 'scan'"),
        (dict(max_positions=0), "max_positions is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Mega(16, **keywords, rngs=nnx.Rngs(0)))


def test_a_row_longer_than_the_simple_bias():
    mixer = Mega(
        16, causal=False, chunk_size=None, rel_pos_bias="simple", max_positions=9, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="10 tokens see each other .* max_positions=9; raise it"):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 10, 16))), mixer)


def test_both_ways_has_no_stream():
    mixer = Mega(16, **SMALL, causal=False, rngs=nnx.Rngs(0))
    for call in (
        lambda: mixer.init_state(1),
        lambda: mixer.step(jnp.zeros((1, 16)), None),
        lambda: mixer(jnp.zeros((1, 3, 16)), state=()),
        lambda: mixer.state_bytes(64),
    ):
        with pytest.raises(NotImplementedError, match="looks both ways"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 8, 1)])
def test_spread_over_eight_devices(shape):
    """Each operator call stands in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(Mega(16, **(SMALL | dict(v_dim=16)), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.move.h) + jnp.sum(state.attention.k)

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
