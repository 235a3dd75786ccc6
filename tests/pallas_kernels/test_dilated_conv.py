"""dilated_conv passes the operators' suite, and agrees with explicit kernels and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dilated_conv
from pallas_kernels.core import testing
from pallas_kernels.dilated_conv import level, stack
from pallas_kernels.dilated_conv.arg_specs import SPECS, named

WHOLE, LINEAR, SYMMETRIC = map(named, ("whole", "linear", "symmetric"))
TESTED = [spec for spec in SPECS if "test" in spec.tags]


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
def test_agrees(length):
    testing.check_agrees(dilated_conv, WHOLE, length, documents=True)


@pytest.mark.parametrize("spec", [WHOLE, SYMMETRIC], ids=lambda s: s.name)
def test_agrees_with_and_without_documents(spec):
    testing.check_agrees(dilated_conv, spec, 130, documents=spec is SYMMETRIC)


@pytest.mark.parametrize("spec", [WHOLE, SYMMETRIC], ids=lambda s: s.name)
def test_agrees_in_many_tiles(spec, monkeypatch):
    """Rows, phases and the batch cut: as long sequences are."""
    monkeypatch.setattr(level, "_TILE", 40)
    monkeypatch.setattr(level, "_SUMS_TILE", 8)
    monkeypatch.setattr(level, "_GROUPS", 4)
    monkeypatch.setattr(stack, "_PART", 100)
    monkeypatch.setattr(stack, "_CHANNELS", 1)
    assert level.tile_of(4, 130, 4, 3, taps=3) == level.Tile(1, 12, 1, 36)
    assert level.tile_of(4, 19, 1, 1, taps=3) == level.Tile(2, 20, 1, 20)
    assert level.tile_of(1, 41, 1, 100, taps=34) == level.Tile(1, 36, 1, 72)
    assert level.tile_of(4, 4, 4, 3, taps=1) == level.Tile(4, 1, 4, 1)
    finer = lambda rows, e, taps: level.finer(level.Tile(4, rows, 4, 2 * rows), e, taps)
    assert finer(36, 1, 3) == level.Tile(1, 12, 1, 72)  # a multiple of the parts
    assert finer(36, 1, 34) == level.Tile(1, 36, 1, 72)  # neighbours hold what taps reach
    assert finer(1, 1, 1) == level.Tile(2, 1, 4, 2)
    testing.check_agrees(dilated_conv, spec, 130, documents=spec is WHOLE)
    case = testing.draw_case(dilated_conv, spec, 130)
    fresh = lambda implementation: jax.tree.map(
        np.asarray,
        jax.jit(
            jax.value_and_grad(
                lambda a: jnp.vdot(
                    case.dy,
                    dilated_conv(**a, **spec.options, implementation=implementation)[0],
                )
            )
        )(case.arrays),
    )
    for got, want in zip(*(jax.tree.leaves(fresh(f)) for f in ("xla", "reference")), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("length", (*testing.FAST_LENGTHS, *testing.SLOW_LENGTHS))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", TESTED, ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    for documents in (False, True):
        testing.check_agrees(dilated_conv, spec, length, dtype=dtype, documents=documents)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(dilated_conv, LINEAR, 130, dtype=dtype, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(dilated_conv, WHOLE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_alone(implementation):
    testing.check_documents_alone(dilated_conv, WHOLE, 130, implementation=implementation)


def test_documents_alone_both_ways():
    testing.check_documents_alone(dilated_conv, SYMMETRIC, 130)


def test_padding_only():
    testing.check_padding_only(dilated_conv, WHOLE)


@pytest.mark.parametrize("length, cut, documents", [(130, 51, True), (4, 1, False)])
def test_hand_off(documents, length, cut):
    testing.check_hand_off(dilated_conv, WHOLE, length, cut, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off_at_more_cuts(cut, documents):
    testing.check_hand_off(dilated_conv, WHOLE, 130, cut, documents=documents)


def test_vmap():
    testing.check_vmap(dilated_conv, WHOLE, 37)


def test_deterministic():
    testing.check_deterministic(dilated_conv, WHOLE, 130)


def test_program_size():
    testing.check_program_size(dilated_conv, WHOLE, 130, 1001, 20_001)
    testing.check_program_size(dilated_conv, named("issue"), 16_384, 131_072)


@pytest.mark.parametrize(
    "shape, keywords, message",
    [
        ((1, 2, 3), dict(dilations=()), "must be integers, one per level"),
        ((1, 2, 3), dict(dilations=(True,)), "must be integers, one per level"),
        ((1, 2, 3), dict(dilations=(0,)), "each must be at least 1"),
        ((2, 2, 3), dict(dilations=(1,)), "j=1 was expected"),
        ((1, 0, 3), dict(dilations=(1,)), "no taps"),
        ((1, 2, 3), dict(dilations=(1,), symmetric=True), "2 taps with symmetric=True"),
        ((1, 2, 3), dict(dilations=(1,), activation="tanh"), "activation='tanh'"),
    ],
)
def test_bad_calls(shape, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dilated_conv(jnp.zeros((1, 5, 3)), jnp.zeros(shape), **keywords)


def test_a_symmetric_stack_refuses_a_state():
    x, weight = jnp.zeros((1, 5, 3)), jnp.zeros((1, 3, 3))
    y, state = dilated_conv(x, weight, dilations=(1,))
    assert dilated_conv(x, weight, dilations=(1,), symmetric=True)[1] is None
    with pytest.raises(ValueError, match="cannot go on from a state"):
        dilated_conv(x, weight, dilations=(1,), symmetric=True, initial_state=state)
