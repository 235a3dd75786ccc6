"""Based: the contract of a mixer, the authors' numbers, its initial values, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import Based
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

# fan-in weights: with the released 0.02 scores would be too small to show an error
SUBJECT = Subject(
    build=functools.partial(Based, n_heads=2, feature_dim=4, use_bias=True, init_std=None),
    d_model=16,
)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


WEIGHTS = ("proj_q", "proj_k", "proj_v", "out_proj")


def layer_of(file):
    """Our layer with the file's weights (torch's are transposed)."""
    mixer = Based(32, n_heads=4, feature_dim=8, eps=1e-12, rngs=nnx.Rngs(0))
    ours = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj)
    for name, linear in zip(WEIGHTS, ours, strict=True):
        linear.kernel[...] = jnp.asarray(file[f"in.w.{name}.weight"].T)
    return mixer


def test_golden_layer(golden):
    """LinearAttention of HazyResearch/based: outputs and every gradient."""
    file = golden("based/linear_attention_layer")
    graphdef, variables = nnx.split(layer_of(file))

    @jax.jit
    def everything(variables, x, dy):
        run = lambda v, x: nnx.merge(graphdef, v)(x)[0]
        y, pull = jax.vjp(run, variables, x)
        return y, *pull(dy)

    y, by_weight, by_x = everything(variables, file["in.x"], file["ct.y"])
    assert off(y, file["out64.y"]) < 1e-5
    assert off(by_x, file["grad64.x"]) < 1e-4
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    for theirs, name in zip(WEIGHTS, names, strict=True):
        got = by_weight[name]["kernel"][...].T
        assert off(got, file[f"grad64.w.{theirs}.weight"]) < 1e-4, name


def test_golden_decoding(golden):
    """The state after a prompt is theirs, whose map is not packed; steps give what theirs give."""
    file = golden("based/linear_attention_layer")
    mixer = layer_of(file)
    step = nnx.jit(lambda mixer, x_t, state: mixer.step(x_t, state))
    _, state = nnx.jit(lambda mixer, x: mixer(x))(mixer, file["in.x"])

    def same(state, when):
        kv, z = file[f"out.{when}_kv_state"][:, :, 0], file[f"out.{when}_k_state"][:, :, 0, 0]
        assert off(unpacked(state.kv, 8), np.moveaxis(kv, 2, 3)) < 1e-5
        assert off(unpacked(state.z[..., None], 8)[..., 0], z) < 1e-5

    same(state, "prefill")
    for x_t, want in zip(
        *(np.moveaxis(file[n], 1, 0) for n in ("in.x_steps", "out.y_steps")), strict=True
    ):
        y, state = step(mixer, x_t, state)
        assert off(y, want) < 1e-5
    same(state, "final")


def unpacked(packed, k):
    """Rows `[b h f v]` in the authors' order: 1, x / k^1/4, all k^2 products / sqrt(2 k)."""
    packed = np.asarray(packed)
    ones, linear, squares, pairs = np.split(packed, [1, 1 + k, 1 + 2 * k], axis=2)
    full = np.zeros((*packed.shape[:2], k, k, packed.shape[-1]))
    each, (first, second) = np.arange(k), np.triu_indices(k, 1)
    full[:, :, each, each] = squares
    full[:, :, first, second] = full[:, :, second, first] = pairs / np.sqrt(2)
    full = full.reshape(*packed.shape[:2], k * k, -1) / np.sqrt(k)
    return np.concatenate([ones, linear / k**0.25, full], axis=2)


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


def test_size_and_initial_values():
    """As released: 2.62M parameters per layer of based-360m, standard deviations of 0.02."""
    count = lambda mixer: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    released = nnx.eval_shape(lambda: Based(1024, rngs=nnx.Rngs(0)))
    assert count(released) == 2 * 1024 * 256 + 2 * 1024**2 == 2_621_440
    assert released.state_bytes(2048) == dict(recurrent=636_480, total=636_484)
    mixer = Based(256, n_residuals=54, rngs=nnx.Rngs(0))
    for linear, std in (
        (mixer.q_proj, 0.02),
        (mixer.k_proj, 0.02),
        (mixer.v_proj, 0.02),
        (mixer.out_proj, 0.02 / 54**0.5),
    ):
        assert float(jnp.std(linear.kernel[...])) == pytest.approx(std, rel=0.02)
    by_inputs = Based(256, head_dim=32, n_residuals=4, init_std=None, rngs=nnx.Rngs(0))
    assert float(jnp.std(by_inputs.q_proj.kernel[...])) == pytest.approx(1 / 16, rel=0.02)
    assert float(jnp.std(by_inputs.out_proj.kernel[...])) == pytest.approx(2048**-0.5, rel=0.02)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=3), "no multiple of n_heads"),
        (dict(n_heads=0), "n_heads is 0"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(feature_dim=0), "feature_dim is 0; it must be 1 to 64"),
        (dict(feature_dim=65), "feature_dim is 65; it must be 1 to 64"),
        (dict(eps=-1.0), "eps is -1.0"),
        (dict(init_std=0.0), "init_std is 0.0"),
        (dict(n_residuals=0), "n_residuals is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Based(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 8, 1)])
def test_spread_over_eight_devices(shape):
    """The operator's call stands in shard_map: outputs and gradients are those of one device."""
    mixer = Based(16, n_heads=8, feature_dim=3, init_std=None, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.kv) + jnp.sum(state.z)

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
