"""simple_gla's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import simple_gla
from pallas_kernels.core import dispatch, testing
from pallas_kernels.simple_gla.arg_specs import named
from pallas_kernels.simple_gla.pallas_tpu import PallasTpuConfig

# Two chunks to a block, three blocks at 130 tokens; the last one is not full.
CONFIG = PallasTpuConfig(interpret=True, chunk=32, block=64)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
OWN, SHARED, EXTREME = map(named, ("own_heads", "shared_heads", "extreme"))
slow = pytest.mark.slow


@pytest.mark.parametrize("spec", [SHARED, EXTREME], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "documents", [pytest.param(False, marks=slow), True], ids=["one", "packed"]
)
def test_agrees(documents, spec):
    testing.check_agrees(simple_gla, spec, 130, documents=documents, **HOW)


@slow
def test_agrees_with_heads_of_their_own():
    testing.check_agrees(simple_gla, OWN, 130, **HOW)


def test_agrees_on_one_token():
    testing.check_agrees(simple_gla, SHARED, 1, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(simple_gla, OWN, 130, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_more_lengths(dtype, length):
    testing.check_agrees(simple_gla, SHARED, length, dtype=dtype, documents=True, **HOW)


@slow
def test_state_dtypes():
    testing.check_state_dtypes(simple_gla, SHARED, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(simple_gla, SHARED, 130, **HOW)


def test_padding_only():
    testing.check_padding_only(simple_gla, SHARED, **HOW)


@slow
def test_hand_off():
    testing.check_hand_off(simple_gla, SHARED, 130, 51, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(simple_gla, SHARED, 37, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(simple_gla, SHARED, 130, **HOW)


@slow
def test_configs():
    of = lambda chunk, block: PallasTpuConfig(interpret=True, chunk=chunk, block=block)
    configs = (of(8, 8), of(160, 160), of(16, 64), of(128, 256))
    testing.check_configs(simple_gla, SHARED, 130, configs, implementation="pallas_tpu")


def test_weak_decays_after_strong_ones_keep_their_digits():
    """As in the other forms: no sum of decays holds a term from outside of its stretch."""
    q = k = v = jnp.ones((1, 32, 1, 1))
    g = jnp.where(jnp.arange(32) < 28, -1000.0, -0.01)[None, :, None]
    y, _ = simple_gla(q, k, v, g, **HOW)
    expected = np.cumsum(np.exp(-0.01 * np.arange(5)))
    np.testing.assert_allclose(y[0, 27:, 0, 0], expected, rtol=1e-6)


def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    rng = np.random.default_rng(0)

    def everything(how, arrays):
        def total(q, k, v, g):
            y, state = simple_gla(q, k, v, -jnp.abs(g[..., 0]), **how)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state.s))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*arrays)

    for steps in (1, 3):
        arrays = [rng.normal(size=(1, 64 * steps, 1, 2)).astype(np.float32) for _ in range(4)]
        got, want = everything(HOW, arrays), everything(dict(implementation="xla"), arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


def test_without_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", chunk=8, block=16)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(simple_gla, SHARED, 20, documents=True, **how)
    assert not interpreter.races.races_found


def test_blocks_follow_from_sizes_and_device():
    of = lambda kind, k, v, shared, itemsize: PallasTpuConfig.heuristic(
        dict(t=8192, k=k, v=v, shared=shared, itemsize=itemsize), kind
    )
    v5e = "TPU v5 lite"
    assert [of(v5e, 128, 64, 24, n).block for n in (2, 4)] == [2048, 1024]
    assert of(v5e, 128, 64, 24, 2).vmem_limit_bytes is None
    assert of(v5e, 256, 512, 1, 2).block == 1024
    assert of(v5e, 256, 512, 1, 2).vmem_limit_bytes > 2**24


@pytest.mark.parametrize(
    "k, dtype, keywords, reason",
    [
        (4096, "float32", {}, "MiB of vector memory"),
        (4, "float16", {}, "float16; TPU kernels take float32 and bfloat16"),
        (4, "float32", dict(block_memory=jnp.zeros((1, 1), jnp.int32)), "serves one memory"),
    ],
)
def test_refuses(k, dtype, keywords, reason):
    of = lambda *shape: jax.ShapeDtypeStruct((1, 8, 1, *shape), dtype)
    if keywords:
        state = (jax.ShapeDtypeStruct((1, 2, 1, k, k), dtype), jax.ShapeDtypeStruct((1, 2), int))
        keywords = dict(keywords, initial_state=state)
    with dispatch.compiling_for("TPU v5 lite"):
        reasons = dispatch.explain(simple_gla, of(k), of(k), of(k), of(), **keywords)
    assert reason in reasons["pallas_tpu"]


@pytest.mark.parametrize("keywords", [dict(chunk=64), dict(chunk=0), dict(block=200)])
def test_bad_configs(keywords):
    with pytest.raises(ValueError, match="chunk must be a multiple of 128, and block one of"):
        PallasTpuConfig(**keywords)
