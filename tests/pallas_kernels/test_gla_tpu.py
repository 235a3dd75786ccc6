"""gla's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gla
from pallas_kernels.core import dispatch, testing
from pallas_kernels.gla.arg_specs import named
from pallas_kernels.gla.pallas_tpu import PallasTpuConfig

# Two chunks to a block, the last block not full. Short chunks compile faster than real ones.
SMALL = PallasTpuConfig(interpret=True, chunk=8, block=16)
CONFIG = PallasTpuConfig(interpret=True, chunk=32, block=64)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
FAST = dict(implementation="pallas_tpu", config=SMALL)
NARROW, SCALED, EXTREME = map(named, ("narrow", "scaled", "extreme"))
slow = pytest.mark.slow


def test_agrees():
    testing.check_agrees(gla, EXTREME, 37, documents=True, **FAST)


@slow
@pytest.mark.parametrize("spec", [SCALED, EXTREME], ids=lambda s: s.name)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_130(documents, spec):
    testing.check_agrees(gla, spec, 130, documents=documents, **HOW)


@slow
def test_agrees_on_one_token():
    testing.check_agrees(gla, SCALED, 1, **FAST)


@slow
def test_agrees_in_bfloat16():
    testing.check_agrees(gla, NARROW, 130, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_more_lengths(dtype, length):
    testing.check_agrees(gla, SCALED, length, dtype=dtype, documents=True, **HOW)


@slow
def test_agrees_at_whole_chunks_of_a_real_width():
    """Strips of 32 channels, two parts of the values, chunks of 128 tokens."""
    spec = testing.ArgSpec(name="wide", sizes=dict(b=1, h=1, k=64, v=256), draw=NARROW.draw)
    config = PallasTpuConfig(interpret=True, chunk=128, block=256)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(gla, spec, 384, **how)
    testing.check_agrees(gla, spec, 384, dtype="bfloat16", **how)


def test_state_dtypes():
    testing.check_state_dtypes(gla, SCALED, **FAST)


@slow
def test_documents_alone():
    testing.check_documents_alone(gla, SCALED, 130, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(gla, SCALED, **FAST)


@slow
def test_hand_off():
    testing.check_hand_off(gla, SCALED, 130, 51, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(gla, SCALED, 37, **FAST)


@slow
def test_deterministic():
    testing.check_deterministic(gla, SCALED, 130, **HOW)


@slow
def test_configs():
    of = lambda chunk, block: PallasTpuConfig(interpret=True, chunk=chunk, block=block)
    configs = (of(8, 8), of(1, 2), of(16, 64), of(128, 256))
    testing.check_configs(gla, SCALED, 130, configs, implementation="pallas_tpu")


@slow
def test_weak_decays_after_strong_ones_keep_their_digits():
    """As in the other forms: no sum of decays holds a term from outside of its stretch."""
    ones = jnp.ones((1, 32, 1, 1))
    g = jnp.where(jnp.arange(32) < 28, -1000.0, -0.01)[None, :, None, None]
    y, _ = gla(ones, ones, ones, g, **HOW)
    expected = np.cumsum(np.exp(-0.01 * np.arange(5)))
    np.testing.assert_allclose(y[0, 27:, 0, 0], expected, rtol=1e-6)


@slow
def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    rng = np.random.default_rng(0)

    def everything(how, arrays):
        def total(q, k, v, g):
            y, state = gla(q, k, v, -jnp.abs(g), **how)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state.s))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*arrays)

    for steps in (1, 3):
        arrays = [rng.normal(size=(1, 16 * steps, 1, 2)).astype(np.float32) for _ in range(4)]
        got, want = everything(FAST, arrays), everything(dict(implementation="xla"), arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


@slow
def test_without_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", chunk=8, block=16)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(gla, SCALED, 20, documents=True, **how)
    assert not interpreter.races.races_found


def test_blocks_follow_from_sizes_and_device():
    of = lambda kind, k, v, itemsize: PallasTpuConfig.heuristic(
        dict(t=8192, k=k, v=v, itemsize=itemsize, gates=itemsize), kind
    )
    v5e = "TPU v5 lite"
    assert [of(v5e, 128, 256, n).block for n in (2, 4)] == [1024, 512]
    assert of(v5e, 128, 256, 2).vmem_limit_bytes is None
    assert of("TPU v6 lite", 128, 256, 2).block == 2048
    assert of(v5e, 256, 512, 2).vmem_limit_bytes > 2**24


@pytest.mark.parametrize(
    "k, dtype, keywords, reason",
    [
        (4096, "float32", {}, "MiB of vector memory"),
        (4, "float16", {}, "float16; TPU kernels take float32 and bfloat16"),
        (4, "float32", dict(block_memory=jnp.zeros((1, 1), jnp.int32)), "serves one memory"),
    ],
)
def test_refuses(k, dtype, keywords, reason):
    of = jax.ShapeDtypeStruct((1, 8, 1, k), dtype)
    if keywords:
        state = (jax.ShapeDtypeStruct((1, 2, 1, k, k), dtype), jax.ShapeDtypeStruct((1, 2), int))
        keywords = dict(keywords, initial_state=state)
    with dispatch.compiling_for("TPU v5 lite"):
        reasons = dispatch.explain(gla, of, of, of, of, **keywords)
    assert reason in reasons["pallas_tpu"]


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=64), "chunk is 64; it must be a power of two, and at least 128"),
        (dict(chunk=384), "chunk is 384"),
        (dict(block=200), "block is 200; it must be a multiple of the chunk of 128"),
    ],
)
def test_bad_configs(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasTpuConfig(**keywords)
