"""dilated_conv's Mosaic GPU kernels, interpreted: the operators' suite, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dilated_conv
from pallas_kernels.core import testing
from pallas_kernels.dilated_conv.arg_specs import named, spec
from pallas_kernels.dilated_conv.pallas_gpu import PallasGpuConfig, refuses

HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
slow = pytest.mark.slow
HOPPER = "NVIDIA H200"
SMALL = dict(b=1, e=3)
TWO = spec("two", dilations=(1, 2), w=3, sizes=SMALL)
SYMMETRIC = spec("symmetric", dilations=(3,), w=3, symmetric=True, sizes=SMALL)


@pytest.mark.parametrize(
    "spec, length",
    [(TWO, 130), (SYMMETRIC, 40), pytest.param(SYMMETRIC, 130, marks=slow)],
    ids=lambda x: getattr(x, "name", None),
)
def test_agrees(spec, length):
    """With documents, and of a causal stack with a past."""
    testing.check_agrees(dilated_conv, spec, length, documents=True, **HOW)


@slow
@pytest.mark.parametrize("length", [2, 37, 128, 200])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "name",
    ["whole", "linear", "one_level", "one_tap", "symmetric", "symmetric_linear", "three_levels"],
)
def test_agrees_at_more_lengths(name, documents, length):
    testing.check_agrees(dilated_conv, named(name), length, documents=documents, **HOW)


@slow
@pytest.mark.parametrize("spec", [TWO, SYMMETRIC], ids=lambda s: s.name)
def test_agrees_over_several_parts(spec):
    """Rows are cut: what the neighbours of a part have is read again."""
    testing.check_agrees(dilated_conv, spec, 768, **HOW)
    testing.check_documents_alone(dilated_conv, spec, 60, **HOW)


def test_agrees_in_bfloat16():
    one = spec("linear", dilations=(4,), w=2, given=(), activation="linear", sizes=SMALL)
    testing.check_agrees(dilated_conv, one, 20, dtype="bfloat16", **HOW)


@slow
def test_the_rest_of_the_suite():
    testing.check_vmap(dilated_conv, TWO, 40, **HOW)
    testing.check_deterministic(dilated_conv, TWO, 40, **HOW)
    testing.check_hand_off(dilated_conv, TWO, 40, 17, documents=True, **HOW)
    testing.check_padding_only(dilated_conv, TWO, **HOW)


@slow
@pytest.mark.parametrize("spec", [TWO, SYMMETRIC], ids=lambda s: s.name)
def test_no_races(spec):
    interpreter = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    config = PallasGpuConfig(interpret="races")
    testing.check_agrees(dilated_conv, spec, 100, implementation="pallas_gpu", config=config)
    assert not interpreter.get_races().races_found


def test_what_is_refused():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    assert refuses((f32(1, 64, 128), f32(2, 16, 128)), HOPPER) is None
    assert "40 taps" in refuses((f32(1, 64, 128), f32(2, 40, 128)), HOPPER)
    assert "Hopper" in refuses((f32(1, 64, 128), f32(2, 16, 128)), "NVIDIA A100-SXM4-80GB")
    arrays = testing.draw_case(dilated_conv, TWO, 1).arrays
    with pytest.raises(NotImplementedError, match="one token"):
        dilated_conv(**arrays, **TWO.options, **HOW)
