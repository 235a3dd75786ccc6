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
# Relative to the largest entry; of gradients, where it is another number: (outputs, gradients).
# Training a Titans memory enlarges what rounding makes of its gradients, on any axis, that of rows
# too: measured up to (1.13e-5, 5.3e-4), (4e-7, 1.1e-5), (7e-7, 2.1e-5). Rounding is all it is: in
# float64 the same programs are within 4e-14, below for the two whose states can be float64.
TOLERANCES = {
    "titans_mac": (2e-5, 1e-3),
    "titans_mag": (1e-5, 3e-5),
    "titans_mal": (1e-5, 3e-5),
}
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


def documents():
    """Two or three documents and padding in most rows; rows differ."""
    rng, ids = np.random.default_rng(0), np.zeros((B, T), np.int32)
    for row in ids:
        begin, middle, end = np.sort(rng.integers(1, T, 3))
        row[:begin], row[begin:middle], row[middle:end] = 1, 2, 3
    ids[0] = 1
    return ids


@functools.cache
def one_device(name, dtype="float32"):
    """The mixer, its inputs, and what one device makes of them."""
    make, keywords = CASES[name]
    mixer = make(D, rngs=nnx.Rngs(0), **keywords, dtype=dtype)
    graphdef, variables, rest = nnx.split(mixer, nnx.Param, ...)
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(2))
    ids = jnp.asarray(documents())

    def run(params, x, weight, ids):
        def total(params, x):
            y, _ = nnx.merge(graphdef, params, rest)(x, segment_ids=ids)
            return jnp.sum(y * weight), y

        (_, y), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return y, *grads

    params = jax.tree.map(lambda a: a.astype(dtype), nnx.as_pure(variables))
    shardings = functools.partial(param_shardings, variables)
    return run, params, shardings, (x, weight, ids), jax.jit(run)(params, x, weight, ids)


@pytest.mark.parametrize(("name", "mesh"), NAMED)
def test_a_mixer_on_a_mesh(name, mesh):
    check(mesh, TOLERANCES.get(name, (1e-5, 1e-5)), *one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["titans_mag", "titans_mal"])
def test_what_differs_is_rounding(name):
    with jax.enable_x64(True):
        check("tensor", (1e-12, 1e-12), *one_device(name, "float64"))


def check(mesh, most, run, params, shardings, arrays, want):
    """Outputs and gradients on eight devices."""
    shape = [MESHES[mesh].get(axis, 1) for axis in MESH_AXES]
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(params, shardings(mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
    with use_mesh(mesh):
        got = jax.jit(lambda *a: run(*a))(params, *jax.device_put(arrays, rows))
    assert error_of(want[0], got[0]) <= most[0]
    leaves = [jax.tree.leaves(found[1:]) for found in (want, got)]
    # A gradient that is nothing but rounding (of a bias of keys) is compared with the others.
    largest = max(float(jnp.abs(a).max()) for a in leaves[0])
    for a, b in zip(*leaves, strict=True):
        assert error_of(a, b, 1e-3 * largest) <= most[1]


def error_of(a, b, least=0.0) -> float:
    """The largest difference, relative to the largest entry (to `least` at least)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(b).all()
    return float(np.abs(a - b).max() / max(np.abs(a).max(), least))
