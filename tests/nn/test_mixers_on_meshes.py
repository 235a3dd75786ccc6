"""Every mixer on every axis of the mesh: outputs and gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqzoo import mixers
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh

D, B, T = 16, 8, 64
HEADS = dict(n_heads=4, head_dim=4)
MEMORY = HEADS | dict(chunk=8, memory_expand=2.0)
CASES = {
    "attention": (mixers.Attention, dict(n_heads=4, n_kv_heads=2, use_bias=True)),
    "attention, both ways": (mixers.Attention, dict(n_heads=4, causal=False)),
    "base_conv": (mixers.BaseConv, {}),
    "based": (mixers.Based, dict(n_heads=4, feature_dim=4)),
    "gated_deltanet": (mixers.GatedDeltaNet, HEADS),
    "gla": (mixers.GLA, dict(n_heads=4)),
    "identity": (mixers.Identity, {}),
    "lssl": (mixers.LSSL, dict(d_state=8)),
    "lssl, chunks": (mixers.LSSL, dict(d_state=8, conv="chunk")),
    "mamba": (mixers.Mamba, dict(d_state=4)),
    "mamba2": (mixers.Mamba2, dict(d_state=4, head_dim=8)),
    "mega": (mixers.Mega, dict(d_state=4, chunk_size=12)),
    "mega, both ways": (mixers.Mega, dict(d_state=4, chunk_size=12, causal=False)),
    "mom": (mixers.MoM, HEADS | dict(num_memories=4, topk=2)),
    "monarch_mixer": (mixers.MonarchMixer, dict(max_length=T)),
    "monarch_mixer, both ways": (mixers.MonarchMixer, dict(max_length=T, causal=False)),
    "retention": (mixers.Retention, dict(n_heads=4)),
    "s4d": (mixers.S4D, dict(d_state=8)),
    "sliding_window_attention": (
        mixers.SlidingWindowAttention, dict(n_heads=4, n_kv_heads=1, window=9)
    ),
    "tcnca": (mixers.TCNCA, dict(kernel_size=5, dilation_growth=3, n_levels=2, chunk_size=12)),
    "titans_lmm": (mixers.TitansLMM, MEMORY),
    "titans_mac": (mixers.TitansMAC, MEMORY | dict(segment=16)),
    "titans_mag": (mixers.TitansMAG, MEMORY | dict(window=12)),
    "titans_mal": (mixers.TitansMAL, MEMORY | dict(window=12)),
}  # fmt: skip
# Training a memory enlarges what rounding makes of its gradients, on one device as on any mesh,
# that of rows alone too. These are held against float64, from which one device is far as well.
ENLARGED = ("titans_mac", "titans_mag", "titans_mal")
# Each on eight devices; rows are shared by those that the axis itself does not use.
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(data=2, tensor=4),
    "sequence": dict(data=2, sequence=4),
    "all": dict(fsdp=2, tensor=2, sequence=2),
}
QUICK = {("mamba", "all"), ("attention", "all"), ("sliding_window_attention", "tensor")}
NAMED = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
    for name in CASES
    for mesh in MESHES
]
EXACT = [("titans_mac", mesh) for mesh in MESHES] + [(name, "tensor") for name in ENLARGED[1:]]


def documents():
    """Two or three documents and padding in most rows; rows differ."""
    rng, ids = np.random.default_rng(0), np.zeros((B, T), np.int32)
    for row in ids:
        begin, middle, end = np.sort(rng.integers(1, T, 3))
        row[:begin], row[begin:middle], row[middle:end] = 1, 2, 3
    ids[0] = 1
    return ids


@pytest.mark.parametrize(("name", "mesh"), NAMED)
def test_a_mixer_on_a_mesh(name, mesh):
    """To 1e-5 of one device, or about as near to float64 as one device is (`pytest -rP` tells)."""
    want, most = one_device(name), (1e-5, 1e-5)
    if name in ENLARGED:
        exact = one_device(name, "float64")
        alone = errors(exact, want)
        assert max(alone) <= 1e-3
        print("one device to float64: outputs {:.1e}, gradients {:.1e}".format(*alone))
        want, most = exact, tuple(2 * error + 1e-5 for error in alone)
    found = errors(want, on_mesh(name, mesh))
    print("the mesh: outputs {:.1e}, gradients {:.1e}".format(*found))
    assert found[0] <= most[0] and found[1] <= most[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), EXACT)
def test_what_differs_is_rounding(name, mesh):
    """In float64 the same programs agree."""
    found = errors(one_device(name, "float64"), on_mesh(name, mesh, "float64"))
    print("in float64: outputs {:.1e}, gradients {:.1e}".format(*found))
    assert max(found) <= 1e-12


@functools.cache
def program(name, dtype):
    """The mixer as a function, its parameters, how they lie on a mesh, and inputs of float32."""
    make, keywords = CASES[name]
    build = lambda dtype: make(D, rngs=nnx.Rngs(0), **keywords, dtype=dtype)
    with jax.enable_x64(False):  # in float64 other initial values would be drawn
        drawn = nnx.as_pure(nnx.state(build("float32"), nnx.Param))
    graphdef, variables, rest = nnx.split(build(dtype), nnx.Param, ...)
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(rng.normal(size=(B, T, D)).astype(np.float32), dtype)
    arrays = draw(), draw(), jnp.asarray(documents())

    def run(params, x, weight, ids):
        def total(params, x):
            y, _ = nnx.merge(graphdef, params, rest)(x, segment_ids=ids)
            return jnp.sum(y * weight), y

        (_, y), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return y, *grads

    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), drawn)
    return run, params, functools.partial(param_shardings, variables), arrays


@functools.cache
def one_device(name, dtype="float32"):
    """Outputs and gradients of one device."""
    with jax.enable_x64(dtype == "float64"):
        run, params, _, arrays = program(name, dtype)
        return jax.tree.map(np.asarray, jax.jit(run)(params, *arrays))


def on_mesh(name, mesh, dtype="float32"):
    """Outputs and gradients of eight devices."""
    with jax.enable_x64(dtype == "float64"):
        run, params, shardings, arrays = program(name, dtype)
        shape = [MESHES[mesh].get(axis, 1) for axis in MESH_AXES]
        mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
        params = jax.device_put(params, shardings(mesh))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
        with use_mesh(mesh):
            got = jax.jit(lambda *a: run(*a))(params, *jax.device_put(arrays, rows))
        return jax.tree.map(np.asarray, got)


def errors(want, got) -> tuple[float, float]:
    """The largest difference of outputs, and of gradients, relative to the largest entry."""
    leaves = [jax.tree.leaves(found[1:]) for found in (want, got)]
    # A gradient that is nothing but rounding (of a bias of keys) is compared with the others.
    least = 1e-3 * max(float(np.abs(a).max()) for a in leaves[0])
    gradients = [error_of(a, b, least) for a, b in zip(*leaves, strict=True)]
    return error_of(want[0], got[0]), max(gradients)


def error_of(a, b, least=0.0) -> float:
    """The largest difference, relative to the largest entry (to `least` at least)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(b).all()
    return float(np.abs(a - b).max() / max(np.abs(a).max(), least))
