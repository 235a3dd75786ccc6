"""gated_delta_rule's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule
from pallas_kernels.core import dispatch, testing, tpu
from pallas_kernels.gated_delta_rule import GatedDeltaRuleState
from pallas_kernels.gated_delta_rule.arg_specs import named
from pallas_kernels.gated_delta_rule.pallas_tpu import PallasTpuConfig, vmem

# One tile of two chunks to a span: 130 tokens are two spans, the last of them all but empty.
CONFIG = PallasTpuConfig(interpret=True, span=128)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
BARE, WHOLE, REPEATED, EXTREME = map(named, ("bare", "whole", "repeated", "extreme"))
slow = pytest.mark.slow


def test_agrees():
    testing.check_agrees(gated_delta_rule, WHOLE, 130, documents=True, **HOW)


@slow
@pytest.mark.parametrize("spec", [WHOLE, EXTREME], ids=lambda s: s.name)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_with_more(documents, spec):
    testing.check_agrees(gated_delta_rule, spec, 130, documents=documents, **HOW)


@pytest.mark.parametrize("length", [1, 260])
def test_two_lengths_in_one_process(length):
    """jax 0.11 keeps pl.num_programs of another grid; nothing here reads it."""
    testing.check_agrees(gated_delta_rule, BARE, length, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_more_lengths(dtype, length):
    testing.check_agrees(gated_delta_rule, WHOLE, length, dtype=dtype, documents=True, **HOW)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_repeated_keys(documents):
    """A chunk of one key at beta 0.99: 1e-5 of the largest value, where a product of powers loses
    all."""
    case = testing.draw_case(gated_delta_rule, REPEATED, 130, documents=documents)
    expected = testing.oracle(gated_delta_rule, REPEATED)(case)
    got = testing.results(gated_delta_rule, REPEATED, **HOW)(case)
    for name, want in expected.items():
        if name != "state.last_id":
            assert np.max(np.abs(got[name] - want)) <= 1e-5 * np.max(np.abs(want)), name


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_a_real_width(dtype):
    """Several registers to a key and to a value, spans of two tiles, forward ones of one."""
    spec = dataclasses.replace(WHOLE, sizes=dict(b=1, h=1, k=256, v=512))
    config = PallasTpuConfig(interpret=True, span=256)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(gated_delta_rule, spec, 300, dtype=dtype, **how)


@slow
def test_configs():
    of = lambda chunk, span: PallasTpuConfig(interpret=True, chunk=chunk, span=span)
    configs = (of(16, 128), of(32, 384), of(128, 256))
    testing.check_configs(gated_delta_rule, WHOLE, 130, configs, implementation="pallas_tpu")


@slow
def test_documents_alone():
    testing.check_documents_alone(gated_delta_rule, WHOLE, 130, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(gated_delta_rule, WHOLE, **HOW)


@slow
@pytest.mark.parametrize("cut", [51, 128])
def test_hand_off(cut):
    testing.check_hand_off(gated_delta_rule, WHOLE, 130, cut, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(gated_delta_rule, BARE, 37, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(gated_delta_rule, WHOLE, 130, **HOW)


@slow
def test_state_dtypes():
    testing.check_state_dtypes(gated_delta_rule, WHOLE, **HOW)


@pytest.mark.parametrize("block", [64, pytest.param(16, marks=slow)])
def test_memories(block):
    """Memories that begin inside a span and between spans, and one without blocks; documents."""
    rng, blocks, memories = np.random.default_rng(0), 6, 4
    sizes = dict(b=2, h=1, k=6, v=4, t=blocks * block)
    spec = dataclasses.replace(WHOLE, sizes=sizes)
    arrays = testing.draw_case(gated_delta_rule, spec, sizes["t"]).arrays
    block_memory = np.array([[0, 0, 0, 1, 3, 3], [1, 1, 2, 2, 2, 3]], np.int32)
    ids = np.ones((2, sizes["t"]), np.int32)
    ids[:, 2 * block + 5 :] = 2  # in the midst of a memory
    ids[:, -3:] = 0
    s = rng.normal(size=(2, memories, 1, 6, 4)).astype(np.float32)
    dy = rng.normal(size=arrays["v"].shape).astype(np.float32)
    ds = rng.normal(size=s.shape).astype(np.float32)

    def run(**how):
        def call(arrays, s):
            state = GatedDeltaRuleState(s, jnp.zeros((2, memories), jnp.int32))
            y, after = gated_delta_rule(
                **arrays, initial_state=state, block_memory=block_memory, segment_ids=ids, **how
            )
            return (y, after.s), after.last_id

        (y, after), pull, last_id = jax.vjp(call, arrays, s, has_aux=True)
        darrays, dfirst = pull((dy, ds))
        found = {"y": y, "state.s": after, "state.last_id": last_id, "grad_state.s": dfirst}
        return found | {f"grad.{k}": v for k, v in darrays.items()}

    got = {k: np.asarray(v) for k, v in jax.jit(lambda: run(**HOW))().items()}
    want = {k: np.asarray(v) for k, v in jax.jit(lambda: run(implementation="reference"))().items()}
    testing.assert_close(got, want, "float32", implementation="pallas_tpu")
    assert np.array_equal(got["state.s"][0, 2], s[0, 2])
    assert np.array_equal(got["grad_state.s"][0, 2], ds[0, 2])


@slow
def test_no_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", chunk=128, span=128)
    how = dict(implementation="pallas_tpu", config=config)
    spec = dataclasses.replace(BARE, sizes=dict(b=1, h=1, k=3, v=5))
    testing.check_agrees(gated_delta_rule, spec, 130, **how)
    assert not interpreter.races.races_found


def test_spans_follow_from_sizes_and_device():
    of = lambda kind, **sizes: PallasTpuConfig.heuristic(
        dict(t=8192, k=256, v=256, m=1, itemsize=2) | sizes, kind
    )
    for kind, one in tpu.GENERATIONS.items():
        assert of(kind).span == 512, kind
        assert of(kind, t=6464, m=5).span == 512, kind
        assert of(kind, t=600).span == 384, kind  # two of equal length
        huge = of(kind, k=1024, v=2048)
        sizes = dict(k=1024, v=2048, m=1, itemsize=2)
        assert vmem(sizes, huge.span, 64, backward=True) < 0.85 * one.vmem, kind


@pytest.mark.parametrize(
    "sizes, dtype, keywords, reason",
    [
        (dict(k=4096, v=4096), "float32", {}, "take 496 MiB of vector memory"),
        (dict(k=4, v=4), "float16", {}, "float16; TPU kernels take float32 and bfloat16"),
        (dict(k=4, v=4), "float32", dict(block=8), "blocks of memories have fewer than 16 tokens"),
    ],
    ids=["size", "dtype", "blocks"],
)
def test_refuses(sizes, dtype, keywords, reason):
    k, v = sizes["k"], sizes["v"]
    shapes = [(1, 64, 1, k), (1, 64, 1, k), (1, 64, 1, v), (1, 64, 1), (1, 64, 1)]
    given: dict = {}
    if keywords:
        blocks = 64 // keywords["block"]
        given["block_memory"] = jnp.zeros((1, blocks), jnp.int32)
        given["initial_state"] = (jnp.zeros((1, 2, 1, k, v)), jnp.zeros((1, 2), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with (
        dispatch.compiling_for("TPU v5 lite"),
        pytest.raises(NotImplementedError, match=reason),
    ):
        jax.eval_shape(
            lambda *a: gated_delta_rule(*a, **given, implementation="pallas_tpu"), *arrays
        )


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=48), "chunk is 48; it must be 16, 32, 64 or 128"),
        (dict(span=200), "span is 200; it must be a multiple of 128"),
    ],
)
def test_bad_config(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasTpuConfig(**keywords)
