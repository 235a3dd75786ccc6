"""monarch_matmul's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import monarch_matmul
from pallas_kernels.core import dispatch, testing
from pallas_kernels.monarch_matmul.arg_specs import SPECS, named
from pallas_kernels.monarch_matmul.pallas_tpu import PallasTpuConfig, refuses


def op(x, w1, w2=None, *, initial_state=None, segment_ids=None, **how):
    """The operator as the suite calls one: with documents, which tokens alone do not know, and a
    state, which is empty."""
    del initial_state, segment_ids
    return monarch_matmul(x, w1, w2, **how), ()


op.axes = monarch_matmul.axes

CONFIG = PallasTpuConfig(interpret=True)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
SMALL = [spec for spec in SPECS if "test" in spec.tags]
RECTANGULAR, BLOCKS = map(named, ("rectangular", "blocks"))
slow = pytest.mark.slow


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_agrees(spec):
    testing.check_agrees(op, spec, 5, **HOW)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=slow)])
@pytest.mark.parametrize("spec", [RECTANGULAR, BLOCKS], ids=lambda s: s.name)
@pytest.mark.parametrize("length", [pytest.param(1, marks=slow), 130])
def test_agrees_over_several_steps(spec, length, dtype):
    testing.check_agrees(op, spec, length, dtype=dtype, **HOW)


@slow
def test_agrees_with_several_parts_in_a_step():
    config = PallasTpuConfig(interpret=True, tokens=256, backward_tokens=384)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(op, RECTANGULAR, 300, **how)
    testing.check_agrees(op, BLOCKS, 300, **how)


def test_channels_in_several_parts():
    """Blocks of a real width: groups of them, and outputs part by part."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 9, 64)).astype(np.float32)
    w = rng.normal(size=(4, 640, 16)).astype(np.float32) / 4
    second = rng.normal(size=(2, 1024, 1280)).astype(np.float32) / 36
    for factors in ((w,), (w, second)):
        assert_same_as_xla(x, *factors)


def assert_same_as_xla(*arrays):
    def both(implementation, config=None):
        call = functools.partial(monarch_matmul, implementation=implementation, config=config)
        y, pull = jax.vjp(call, *arrays)
        return y, *pull(jnp.cos(y))

    for got, want in zip(both("pallas_tpu", CONFIG), both("xla"), strict=True):
        off = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert off < 1e-5


def test_vmap():
    testing.check_vmap(op, RECTANGULAR, 3, **HOW)


def test_deterministic():
    testing.check_deterministic(op, RECTANGULAR, 7, **HOW)


@pytest.mark.parametrize("spec", [RECTANGULAR, BLOCKS], ids=lambda s: s.name)
def test_two_lengths_in_one_process(spec):
    """jax 0.11 keeps pl.num_programs of another grid; nothing here reads it."""
    for length in (3, 33):  # 4 rows each: 1 and 2 steps of 128 tokens
        testing.check_agrees(op, spec, length, **HOW)


@pytest.mark.parametrize("spec", [RECTANGULAR, BLOCKS], ids=lambda s: s.name)
def test_no_races(spec):
    """Nor reads of what was never written, or out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races")
    testing.check_agrees(op, spec, 33, implementation="pallas_tpu", config=config)
    assert not interpreter.races.races_found


def test_large_factors_are_refused():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    reason = refuses((f32(1, 8, 4096), f32(4, 4096, 1024), f32(4, 4096, 4096)), "TPU v5 lite")
    assert "MiB of vector memory" in reason
    assert refuses((f32(1, 8, 768), f32(4, 192, 192), f32(4, 1536, 192)), "TPU v5 lite") is None


def test_other_dtypes_are_refused():
    arrays = testing.draw_case(op, BLOCKS, 3, dtype="float64").arrays
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        monarch_matmul(**arrays, **HOW)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU7x"])
def test_the_heuristic_takes_what_fits(kind):
    sizes = dict(k=4, q=192, p=192, l=4, s=1536, r=192, rows=4096, itemsize=2)
    config = PallasTpuConfig.heuristic(sizes, kind)
    assert config.tokens % 128 == 0 == config.backward_tokens % 128
    with dispatch.compiling_for(kind):
        assert (
            dispatch.explain(
                monarch_matmul,
                *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 128, 768), (4, 192, 192))),
            )["pallas_tpu"]
            is None
        )
