"""simple_gla's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import simple_gla
from pallas_kernels.core import dispatch, testing
from pallas_kernels.simple_gla import SimpleGLAState
from pallas_kernels.simple_gla.arg_specs import named
from pallas_kernels.simple_gla.pallas_gpu import PallasGpuConfig

HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
OWN, SHARED, EXTREME = map(named, ("own_heads", "shared_heads", "extreme"))
slow = pytest.mark.slow


def one_row(spec: testing.ArgSpec, **sizes: int) -> testing.ArgSpec:
    """Fewer blocks of threads: each takes the interpreter half a second."""
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, "h": 2, "g": 1, **sizes})


def agrees(spec: testing.ArgSpec, length: int, **more):
    testing.check_agrees(simple_gla, spec, length, dtype="bfloat16", **more, **HOW)


def test_agrees():
    agrees(one_row(SHARED), 130, documents=True)


@slow
@pytest.mark.parametrize("length", [1, 64, 200])
def test_lengths_in_one_process(length):
    agrees(one_row(SHARED), length)


@slow
@pytest.mark.parametrize("spec", [OWN, EXTREME], ids=lambda s: s.name)
def test_agrees_with_packed_rows(spec):
    agrees(spec, 130, documents=True)


@slow
@pytest.mark.parametrize("k", [128, 200])
def test_agrees_at_a_real_width(k):
    """Two blocks of keys to a warpgroup, two warpgroups to a walk; several blocks of values."""
    agrees(one_row(SHARED, k=k, v=128), 130, documents=True)


@slow
def test_hand_off():
    spec = one_row(SHARED)
    testing.check_hand_off(simple_gla, spec, 130, 51, dtype="bfloat16", documents=True, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(simple_gla, one_row(SHARED), 70, dtype="bfloat16", **HOW)


@slow
def test_memories():
    """Memories of two blocks and of one, and one without; a document that begins in one's midst."""
    rng, blocks, memories = np.random.default_rng(0), 3, 3
    t, spec = 64 * blocks, one_row(SHARED, h=1)
    arrays = testing.draw_case(simple_gla, spec, t, dtype="bfloat16").arrays
    block_memory = np.array([[0, 0, 2]], np.int32)
    ids = np.ones((1, t), np.int32)
    ids[:, 69:], ids[:, 125:128] = 2, 0
    s = rng.normal(size=(1, memories, 1, 4, 6)).astype(np.float32)
    dy = rng.normal(size=arrays["v"].shape).astype(arrays["v"].dtype)
    ds = rng.normal(size=s.shape).astype(np.float32)

    def run(arrays, dy, **how):
        def call(arrays, s):
            state = SimpleGLAState(s, jnp.zeros((1, memories), jnp.int32))
            y, after = simple_gla(
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
    testing.check_agrees(simple_gla, one_row(SHARED, k=k), 130, dtype="bfloat16", **how)
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
    shapes = [(1, 64, 1, k), (1, 64, 1, k), (1, 64, 1, 64), (1, 64, 1)]
    given: dict = {}
    if block:
        given["block_memory"] = jnp.zeros((1, 64 // block), jnp.int32)
        given["initial_state"] = (jnp.zeros((1, 2, 1, k, 64)), jnp.zeros((1, 2), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with dispatch.compiling_for("NVIDIA H200"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *a: simple_gla(*a, **given, implementation="pallas_gpu"), *arrays)


def test_refuses_another_device():
    with dispatch.compiling_for("NVIDIA A100-SXM4-80GB"):
        shapes = [(1, 64, 1, 64)] * 3 + [(1, 64, 1)]
        reasons = dispatch.explain(
            simple_gla, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        )
    assert "written for Hopper" in reasons["pallas_gpu"]
