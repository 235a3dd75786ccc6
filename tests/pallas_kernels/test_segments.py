"""Segment ids: boundaries, padding, what the state carries."""

import jax
import numpy as np
import pytest

from pallas_kernels.core.segments import boundaries, from_lengths


def bounds(ids, last_id):
    return [
        np.asarray(x).tolist() for x in jax.jit(boundaries)(np.int32([ids]), np.int32([last_id]))
    ]


def test_boundary_is_a_change_of_id():
    reset, valid, last_id = bounds([1, 1, 2, 2, 5], 0)
    assert reset == [[False, False, True, False, True]]
    assert valid == [[True] * 5]
    assert last_id == [5]


def test_padding_carries_the_id_across():
    # The same document on both sides of padding goes on; another one begins.
    reset, valid, last_id = bounds([0, 3, 0, 3, 0, 4, 0], 3)
    assert reset == [[False, False, False, False, False, True, False]]
    assert valid == [[False, True, False, True, False, True, False]]
    assert last_id == [4]


def test_state_without_an_id_goes_on():
    assert bounds([7, 7], 0)[0] == [[False, False]]
    assert bounds([7, 7], 6)[0] == [[True, False]]


def test_padding_only():
    assert bounds([0, 0], 6) == [[[False, False]], [[False, False]], [6]]


def test_from_lengths():
    ids = from_lengths([[2, 1], [0, 3], []], 4)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[1, 1, 2, 0], [2, 2, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("lengths", [[[3, 2]], [[-1]]])
def test_from_lengths_refuses(lengths):
    with pytest.raises(ValueError, match="do not fit into 4 tokens"):
        from_lengths(lengths, 4)
