"""short_conv passes the operators' suite."""

import pytest

from pallas_kernels import short_conv
from pallas_kernels.core import testing
from pallas_kernels.short_conv.arg_specs import named

BARE, WHOLE, ONE_TAP = map(named, ("bare", "whole", "one_tap"))


@pytest.mark.parametrize("length", (*testing.FAST_LENGTHS, 2))
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("spec", [WHOLE, ONE_TAP], ids=lambda s: s.name)
def test_agrees(spec, documents, length):
    testing.check_agrees(short_conv, spec, length, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", [BARE, WHOLE], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(short_conv, spec, length, dtype=dtype, documents=True)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(short_conv, BARE, 130, dtype=dtype, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(short_conv, WHOLE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_alone(implementation):
    testing.check_documents_alone(short_conv, WHOLE, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(short_conv, WHOLE)


@pytest.mark.parametrize("length, cut", [(130, 51), (4, 2)])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off(documents, length, cut):
    testing.check_hand_off(short_conv, WHOLE, length, cut, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(short_conv, WHOLE, 130, cut, documents=True)


def test_vmap():
    testing.check_vmap(short_conv, WHOLE, 37)


def test_deterministic():
    testing.check_deterministic(short_conv, WHOLE, 130)


def test_program_size():
    testing.check_program_size(short_conv, WHOLE, 130, 1001, 20_001)
