"""dilated_conv's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dilated_conv
from pallas_kernels.core import testing
from pallas_kernels.dilated_conv.arg_specs import named
from pallas_kernels.dilated_conv.pallas_tpu import PallasTpuConfig, refuses_options

CONFIG = PallasTpuConfig(interpret=True, block=16, rows=8, segment=48)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
WHOLE, THREE, LINEAR, SYMMETRIC = map(named, ("whole", "three_levels", "linear", "symmetric"))
slow = pytest.mark.slow


def op(x, weight, bias=None, *, initial_state=None, segment_ids=None, **how):
    """The operator without a past, as its kernels take it."""
    del initial_state
    return dilated_conv(x, weight, bias, segment_ids=segment_ids, **how)


op.axes = dilated_conv.axes


@pytest.mark.parametrize("documents", [pytest.param(False, marks=slow), True])
@pytest.mark.parametrize("spec", [THREE, SYMMETRIC], ids=lambda s: s.name)
def test_agrees(spec, documents):
    """130 tokens: nine blocks; causal, three segments."""
    testing.check_agrees(op, spec, 130, documents=documents, **HOW)


@slow
@pytest.mark.parametrize("length", [2, 37, 128, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["whole", "linear", "one_level", "one_tap", "symmetric", "symmetric_linear", "three_levels"],
)
def test_agrees_at_more_lengths(name, dtype, length):
    testing.check_agrees(op, named(name), length, dtype=dtype, documents=True, **HOW)


def test_agrees_at_one_token():
    """A symmetric stack; a causal one steps."""
    testing.check_agrees(op, SYMMETRIC, 1, documents=True, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(op, LINEAR, 50, dtype="bfloat16", **HOW)


@pytest.mark.parametrize("spec", [WHOLE, pytest.param(SYMMETRIC, marks=slow)], ids=lambda s: s.name)
def test_documents_alone(spec):
    testing.check_documents_alone(op, spec, 40, **HOW)


@slow
def test_vmap():
    testing.check_vmap(op, WHOLE, 40, **HOW)


def test_deterministic():
    testing.check_deterministic(op, WHOLE, 40, **HOW)


def test_two_lengths_in_one_process():
    """jax 0.11 keeps pl.num_programs of another grid; nothing here reads it."""
    one_level = named("one_level")
    for length in (20, 60):
        testing.check_agrees(op, one_level, length, **HOW)


@pytest.mark.parametrize("spec", [WHOLE, pytest.param(SYMMETRIC, marks=slow)], ids=lambda s: s.name)
def test_no_races(spec):
    """Nor reads of what was never written, or out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", block=8, rows=8, segment=8)
    testing.check_agrees(op, spec, 16, implementation="pallas_tpu", config=config)
    assert not interpreter.races.races_found


@pytest.mark.parametrize("documents", [pytest.param(False, marks=slow), True])
def test_agrees_with_a_past(documents):
    """The state before, the one after, and gradients through both."""
    testing.check_agrees(dilated_conv, WHOLE, 50, documents=documents, **HOW)


@slow
@pytest.mark.parametrize("length", [2, 37, 130])
@pytest.mark.parametrize("name", ["linear", "one_tap", "three_levels", "one_level"])
def test_agrees_with_a_past_at_more_lengths(name, length):
    testing.check_agrees(dilated_conv, named(name), length, documents=True, **HOW)


@slow
def test_hand_off_and_padding_only():
    testing.check_hand_off(dilated_conv, WHOLE, 40, 17, documents=True, **HOW)
    testing.check_padding_only(dilated_conv, WHOLE, **HOW)


def test_single_tokens_and_far_levels_are_refused():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = (f32(1, 2**20, 128), f32(2, 16, 128))
    how = dict(activation="linear", symmetric=False)
    refused = lambda **more: refuses_options(shapes, "TPU7x", **how, **more)
    assert refused(dilations=(1, 16), fresh=False) is None
    assert "MiB of vector memory" in refused(dilations=(1, 8192), fresh=True)
    assert refused(dilations=(1, 256), fresh=True) is None
    arrays = testing.draw_case(op, WHOLE, 1).arrays
    with pytest.raises(NotImplementedError, match="one token"):
        dilated_conv(**arrays, **WHOLE.options, **HOW)


def test_bad_config():
    with pytest.raises(ValueError, match="block must|block of rows"):
        PallasTpuConfig(block=100, rows=64)
