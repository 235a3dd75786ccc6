"""gated_delta_rule's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule
from pallas_kernels.core import dispatch, testing
from pallas_kernels.gated_delta_rule import GatedDeltaRuleState
from pallas_kernels.gated_delta_rule.arg_specs import named
from pallas_kernels.gated_delta_rule.pallas_gpu import PallasGpuConfig

HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
WHOLE, REPEATED, EXTREME = map(named, ("whole", "repeated", "extreme"))
slow = pytest.mark.slow


def one_head(spec: testing.ArgSpec, **sizes: int) -> testing.ArgSpec:
    """Fewer blocks of threads: each takes the interpreter half a second."""
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, "h": 1, **sizes})


def agrees(spec: testing.ArgSpec, length: int, **more):
    testing.check_agrees(gated_delta_rule, spec, length, dtype="bfloat16", **more, **HOW)


def test_agrees():
    agrees(one_head(WHOLE), 130, documents=True)


@slow
@pytest.mark.parametrize("length", [7, 64, 200])
def test_lengths_in_one_process(length):
    """Of one token dbeta is one number, a difference: 1.2 % off, where the mean of many is 0.5."""
    agrees(one_head(WHOLE), length)


@slow
@pytest.mark.parametrize("spec", [WHOLE, EXTREME], ids=lambda s: s.name)
def test_agrees_with_packed_rows(spec):
    agrees(dataclasses.replace(spec, sizes={**spec.sizes, "h": 1}), 130, documents=True)


@slow
def test_agrees_at_a_real_width():
    """Several blocks of keys to each half, and of values."""
    agrees(one_head(WHOLE, k=256, v=128), 130, documents=True)


@slow
def test_repeated_keys():
    """One key at beta 0.99, where a product of powers loses all: y and states as bfloat16 can."""
    case = testing.draw_case(gated_delta_rule, one_head(REPEATED), 130, dtype="bfloat16")
    expected = testing.oracle(gated_delta_rule, REPEATED)(case)
    got = testing.results(gated_delta_rule, REPEATED, **HOW)(case)
    for name, allowed in (("y", 0.02), ("state.s", 0.02), ("grad.v", 0.05), ("grad.q", 0.05)):
        off = got[name].astype(np.float64) - expected[name]
        assert np.sqrt(np.mean(off**2) / np.mean(expected[name] ** 2)) <= allowed, name


@slow
def test_hand_off():
    spec = one_head(WHOLE)
    testing.check_hand_off(gated_delta_rule, spec, 130, 51, dtype="bfloat16", documents=True, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(gated_delta_rule, one_head(WHOLE), 70, dtype="bfloat16", **HOW)


@slow
def test_memories():
    """Memories of two blocks and of one, and one without; a document that begins in one's midst."""
    rng, blocks, memories = np.random.default_rng(0), 3, 3
    t = 64 * blocks
    arrays = testing.draw_case(gated_delta_rule, one_head(WHOLE), t, dtype="bfloat16").arrays
    block_memory = np.array([[0, 0, 2]], np.int32)
    ids = np.ones((1, t), np.int32)
    ids[:, 69:], ids[:, 125:128] = 2, 0
    s = rng.normal(size=(1, memories, 1, 6, 4)).astype(np.float32)
    dy = rng.normal(size=arrays["v"].shape).astype(arrays["v"].dtype)
    ds = rng.normal(size=s.shape).astype(np.float32)

    def run(arrays, dy, **how):
        def call(arrays, s):
            state = GatedDeltaRuleState(s, jnp.zeros((1, memories), jnp.int32))
            y, after = gated_delta_rule(
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
def test_no_races():
    """The interpreter of 0.10 takes waits for what they are worth: see accelerators' notes."""
    name = "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    interpreter = importlib.import_module(name)
    config = PallasGpuConfig(interpret="races")
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(gated_delta_rule, one_head(WHOLE), 130, dtype="bfloat16", **how)
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize(
    "sizes, dtype, block, reason",
    [
        (dict(k=320, v=64), "bfloat16", None, "keys have 320 columns; states of up to 256 fit"),
        (dict(k=64, v=64), "float32", None, "q, k or v is float32"),
        (dict(k=64, v=64), "float16", None, "float16"),
        (dict(k=64, v=64), "bfloat16", 32, "blocks of memories have fewer than 64 tokens"),
    ],
    ids=["size", "float32", "float16", "blocks"],
)
def test_refuses(sizes, dtype, block, reason):
    k, v = sizes["k"], sizes["v"]
    shapes = [(1, 64, 1, k), (1, 64, 1, k), (1, 64, 1, v), (1, 64, 1), (1, 64, 1)]
    given: dict = {}
    if block:
        given["block_memory"] = jnp.zeros((1, 64 // block), jnp.int32)
        given["initial_state"] = (jnp.zeros((1, 2, 1, k, v)), jnp.zeros((1, 2), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with dispatch.compiling_for("NVIDIA H200"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            lambda *a: gated_delta_rule(*a, **given, implementation="pallas_gpu"), *arrays
        )


def test_refuses_another_device():
    with dispatch.compiling_for("NVIDIA A100-SXM4-80GB"):
        shapes = [
            jax.ShapeDtypeStruct((1, 64, 1, *x), jnp.bfloat16) for x in ((64,),) * 3 + ((),) * 2
        ]
        reasons = dispatch.explain(gated_delta_rule, *shapes)
    assert "written for Hopper" in reasons["pallas_gpu"]
