"""monarch_matmul's Mosaic GPU kernels, interpreted: agreement, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import monarch_matmul
from pallas_kernels.core import testing
from pallas_kernels.monarch_matmul.arg_specs import draw, named
from pallas_kernels.monarch_matmul.pallas_gpu import PallasGpuConfig, refuses

HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
slow = pytest.mark.slow
HOPPER = "NVIDIA H200"


def op(x, w1, w2=None, *, initial_state=None, segment_ids=None, **how):
    """The operator as the suite calls one: with documents, which tokens alone do not know, and a
    state, which is empty."""
    del initial_state, segment_ids
    return monarch_matmul(x, w1, w2, **how), ()


op.axes = monarch_matmul.axes


def spec(name: str, b: int, first: tuple[int, ...], second: tuple[int, ...] = ()):
    """The smallest calls that the kernels take."""
    sizes = dict(b=b, n=first[0] * first[2], **dict(zip("kqp", first, strict=True)))
    sizes |= dict(zip("lsr", second, strict=False))
    return testing.ArgSpec(
        name=name, sizes=sizes, draw=draw, given=("w2",) if second else (), tags=frozenset()
    )


TWO = spec("two", 1, (2, 64, 64), (2, 64, 64))
FOUR = spec("four", 1, (4, 64, 128), (4, 128, 64))
WIDER = spec("wider", 2, (3, 128, 64), (2, 192, 192))
BLOCKS = spec("blocks", 1, (2, 64, 128))
MORE_BLOCKS = spec("more_blocks", 2, (3, 192, 192))


@pytest.mark.parametrize(
    "spec",
    [TWO, BLOCKS, *(pytest.param(s, marks=slow) for s in (FOUR, WIDER, MORE_BLOCKS))],
    ids=lambda s: s.name,
)
def test_agrees(spec):
    """130 tokens: three chunks, the last one filled up."""
    testing.check_agrees(op, spec, 130, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("spec", [TWO, BLOCKS], ids=lambda s: s.name)
@pytest.mark.parametrize("length", [1, 64, 200])
def test_agrees_at_more_lengths(spec, length):
    testing.check_agrees(op, spec, length, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("spec", [FOUR, MORE_BLOCKS], ids=lambda s: s.name)
def test_rounds_as_xla_does(spec):
    """What is rounded, and where, is the same; sums are in another order."""
    arrays = testing.draw_case(op, spec, 128, dtype="bfloat16").arrays

    def both(**how):
        y, pull = jax.vjp(lambda *a: monarch_matmul(*a, **how), *arrays.values())
        return y, *pull(jnp.cos(y))

    for got, want in zip(both(**HOW), both(implementation="xla"), strict=True):
        got, want = (np.asarray(a, np.float64) for a in (got, want))
        assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 1e-3


@slow
@pytest.mark.parametrize("spec", [TWO, BLOCKS], ids=lambda s: s.name)
def test_no_races(spec):
    interpreter = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    config = PallasGpuConfig(interpret="races")
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(op, spec, 128, dtype="bfloat16", **how)
    assert not interpreter.get_races().races_found


def test_what_is_refused():
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    x, w1, w2 = shape(1, 8, 768), shape(4, 192, 192), shape(4, 1536, 192)
    assert refuses((x, w1, w2), HOPPER) is None
    assert refuses((x, shape(4, 1536, 192), None), HOPPER) is None
    assert "TF32" in refuses((shape(1, 8, 768, dtype=jnp.float32), w1, w2), HOPPER)
    assert "multiples of 64" in refuses((x, shape(24, 32, 32), None), HOPPER)
    assert "turns round 2 or 4" in refuses((x, w1, shape(12, 64, 64)), HOPPER)
    assert "outputs" in refuses((x, shape(2, 384, 384), shape(4, 192, 192)), HOPPER)
    wide = shape(1, 8, 1024), shape(8, 128, 128), shape(4, 256, 256)
    assert "shared memory" in refuses(wide, HOPPER)
    # Operands of the first factor beside Z', which are more than the second's: 245,808 bytes.
    first = shape(1, 8, 576), shape(3, 256, 192), shape(4, 64, 192)
    assert "shared memory" in refuses(first, HOPPER)
    assert refuses((shape(1, 8, 384), shape(3, 256, 128), shape(4, 64, 192)), HOPPER) is None
    assert "Hopper" in refuses((x, w1, w2), "NVIDIA A100-SXM4-80GB")


def test_tagged_calls_are_served():
    for name in ("m2_bert_80m_up", "m2_bert_80m_monarch_up", "m2_bert_80m_monarch_down"):
        sizes = named(name).sizes
        every = [[sizes.get(a, 0) for a in axes] for axes in ("btn", "kqp", "lsr")]
        x, w1, w2 = (jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16) for shape in every)
        assert refuses((x, w1, w2 if w2.size else None), HOPPER) is None


def test_bad_config():
    with pytest.raises(ValueError, match="stages"):
        PallasGpuConfig(stages=1)
