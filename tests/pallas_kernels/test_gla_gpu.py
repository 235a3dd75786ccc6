"""gla's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gla
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.gpu_chunks import CHUNK, LEAST
from pallas_kernels.gla import GLAState, gpu_parts
from pallas_kernels.gla.arg_specs import named
from pallas_kernels.gla.pallas_gpu import PallasGpuConfig

HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
NARROW, SCALED, EXTREME = map(named, ("narrow", "scaled", "extreme"))
slow = pytest.mark.slow


def one_row(spec: testing.ArgSpec, **sizes: int) -> testing.ArgSpec:
    """Fewer blocks of threads: each takes the interpreter half a second."""
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, "h": 1, **sizes})


def agrees(spec: testing.ArgSpec, length: int, **more):
    testing.check_agrees(gla, spec, length, dtype="bfloat16", **more, **HOW)


def test_agrees():
    agrees(one_row(SCALED), 130, documents=True)


def test_levels_hold_what_lies_between():
    """A pair's two sums hold each token after j up to i once; every pair is of one level."""
    pairs = np.zeros((CHUNK, CHUNK), int)
    for n in range(gpu_parts.LEVELS):
        within, across = (np.asarray(x) for x in (gpu_parts.within(n), gpu_parts.across(n)))
        assert np.array_equal(within.T, np.asarray(gpu_parts.within(n, turned=True)))
        for i, j in zip(*np.nonzero(across), strict=True):
            between = (np.arange(CHUNK) > j) & (np.arange(CHUNK) <= i)
            assert np.array_equal(within[i].astype(int) + within[j], between)
        pairs += across
    assert np.array_equal(pairs, np.tri(CHUNK, k=-1))


@slow
@pytest.mark.parametrize("length", [1, 64, 200])
def test_lengths_in_one_process(length):
    agrees(one_row(SCALED), length)


@slow
@pytest.mark.parametrize("spec", [NARROW, EXTREME], ids=lambda s: s.name)
def test_agrees_with_packed_rows(spec):
    agrees(spec, 130, documents=True)


@slow
@pytest.mark.parametrize("k", [128, 200])
def test_agrees_at_a_real_width(k):
    """Several blocks of keys, two warpgroups; several blocks of values."""
    agrees(one_row(SCALED, k=k, v=128), 130, documents=True)


@slow
def test_decays_in_float32():
    """Two parts in bfloat16: y, the state and gradients are as right as with decays in bfloat16."""
    case = testing.draw_case(gla, one_row(SCALED), 130, dtype="bfloat16")
    rng = np.random.default_rng(1)
    g = -np.exp(rng.uniform(-7, 1, size=case.arrays["g"].shape)).astype(np.float32)
    case = case._replace(arrays={**case.arrays, "g": g})
    want, got = testing.oracle(gla, SCALED)(case), testing.results(gla, SCALED, **HOW)(case)
    testing.assert_close(got, want, "bfloat16", implementation="pallas_gpu")


@slow
def test_weak_decays_after_strong_ones_keep_their_digits():
    """Sums of a running sum's differences would lose them: -56 at a time, then -0.01."""
    case = testing.draw_case(gla, one_row(SCALED), 64, dtype="bfloat16")
    g = np.where(np.arange(64) % 16 < 12, LEAST + 4, -0.01)[None, :, None, None]
    g = np.broadcast_to(g, case.arrays["g"].shape).astype(case.arrays["g"].dtype)
    case = case._replace(arrays={**case.arrays, "g": g})
    want, got = testing.oracle(gla, SCALED)(case), testing.results(gla, SCALED, **HOW)(case)
    testing.assert_close(got, want, "bfloat16", implementation="pallas_gpu")


@slow
def test_hand_off():
    spec = one_row(SCALED)
    testing.check_hand_off(gla, spec, 130, 51, dtype="bfloat16", documents=True, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(gla, one_row(SCALED), 70, dtype="bfloat16", **HOW)


@slow
def test_memories():
    """Memories of two blocks and of one, and one without; a document that begins in one's midst."""
    rng, blocks, memories = np.random.default_rng(0), 3, 3
    t = 64 * blocks
    arrays = testing.draw_case(gla, one_row(SCALED), t, dtype="bfloat16").arrays
    block_memory = np.array([[0, 0, 2]], np.int32)
    ids = np.ones((1, t), np.int32)
    ids[:, 69:], ids[:, 125:128] = 2, 0
    s = rng.normal(size=(1, memories, 1, 4, 6)).astype(np.float32)
    dy = rng.normal(size=arrays["v"].shape).astype(arrays["v"].dtype)
    ds = rng.normal(size=s.shape).astype(np.float32)

    def run(arrays, dy, **how):
        def call(arrays, s):
            state = GLAState(s, jnp.zeros((1, memories), jnp.int32))
            y, after = gla(
                **arrays, initial_state=state, block_memory=block_memory, segment_ids=ids, **how
            )
            return (y, after.s), after.last_id

        (y, after), pull, last_id = jax.vjp(call, arrays, s, has_aux=True)
        darrays, dfirst = pull((dy, ds))
        found = {"y": y, "state.s": after, "state.last_id": last_id, "grad_state.s": dfirst}
        found |= {f"grad.{k}": v for k, v in darrays.items()}
        return jax.tree.map(np.asarray, found)

    wide = {k: v.astype(np.float32) for k, v in arrays.items()}
    want = run(wide, dy.astype(np.float32), implementation="reference")
    got = run(arrays, dy, **HOW)
    testing.assert_close(got, want, "bfloat16", implementation="pallas_gpu")
    assert np.array_equal(got["state.s"][0, 1], s[0, 1])
    assert np.array_equal(got["grad_state.s"][0, 1], ds[0, 1])


@slow
@pytest.mark.parametrize("k", [4, 128])
def test_no_races(k):
    name = "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    interpreter = importlib.import_module(name)
    how = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret="races"))
    testing.check_agrees(gla, one_row(SCALED, k=k), 130, dtype="bfloat16", **how)
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize(
    "k, dtype, block, reason",
    [
        (320, "bfloat16", None, "keys have 320 columns; states of up to 256 fit"),
        (64, "float32", None, "q, k or v is float32"),
        (64, "float16", None, "float16"),
        (64, "bfloat16", 32, "blocks of memories have fewer than 64 tokens"),
    ],
    ids=["size", "float32", "float16", "blocks"],
)
def test_refuses(k, dtype, block, reason):
    shapes = [(1, 64, 1, k), (1, 64, 1, k), (1, 64, 1, 64), (1, 64, 1, k)]
    given: dict = {}
    if block:
        given["block_memory"] = jnp.zeros((1, 64 // block), jnp.int32)
        given["initial_state"] = (jnp.zeros((1, 2, 1, k, 64)), jnp.zeros((1, 2), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with dispatch.compiling_for("NVIDIA H200"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *a: gla(*a, **given, implementation="pallas_gpu"), *arrays)


def test_refuses_another_device():
    with dispatch.compiling_for("NVIDIA A100-SXM4-80GB"):
        reasons = dispatch.explain(gla, *[jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)] * 4)
    assert "written for Hopper" in reasons["pallas_gpu"]
