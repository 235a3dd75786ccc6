"""selective_scan passes the operators' suite."""

import pytest

from pallas_kernels import selective_scan
from pallas_kernels.core import testing
from pallas_kernels.selective_scan.arg_specs import named

BARE, WHOLE, EXTREME = map(named, ("bare", "whole", "extreme"))


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("spec", [BARE, WHOLE], ids=lambda s: s.name)
def test_agrees(spec, documents, length):
    testing.check_agrees(selective_scan, spec, length, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_more_lengths(documents, dtype, length):
    testing.check_agrees(selective_scan, WHOLE, length, dtype=dtype, documents=documents)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(selective_scan, WHOLE, 130, dtype=dtype, documents=True)


def test_agrees_at_the_edge_of_the_domain():
    testing.check_agrees(selective_scan, EXTREME, 130, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(selective_scan, WHOLE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_alone(implementation):
    testing.check_documents_alone(selective_scan, WHOLE, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(selective_scan, WHOLE)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off(documents):
    testing.check_hand_off(selective_scan, WHOLE, 130, 51, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(selective_scan, WHOLE, 130, cut, documents=True)


def test_vmap():
    testing.check_vmap(selective_scan, WHOLE, 37)


def test_deterministic():
    testing.check_deterministic(selective_scan, WHOLE, 130)


def test_program_size():
    testing.check_program_size(selective_scan, WHOLE, 130, 1001, 20_001)
