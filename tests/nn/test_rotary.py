"""Positions of tokens in packed documents and streams."""

import jax.numpy as jnp
import numpy as np

from seqzoo.nn.rotary import count_positions

IDS = np.array([[1, 1, 0, 2, 2, 2], [0, 0, 5, 5, 6, 0], [0, 0, 0, 0, 0, 0]], np.int32)


def test_positions_of_packed_documents():
    count, last_id = jnp.asarray([4, 7, 3]), jnp.asarray([1, 4, 2])
    positions, after = count_positions(jnp.asarray(IDS), count, last_id, 6)
    want = np.array([[4, 5, -1, 0, 1, 2], [-1, -1, 0, 1, 0, -1], [-1] * 6])
    np.testing.assert_array_equal(np.where(IDS > 0, positions, -1), want)
    np.testing.assert_array_equal(after, [3, 1, 3])


def test_positions_without_ids_go_on():
    positions, after = count_positions(None, jnp.asarray([0, 9]), jnp.zeros(2, jnp.int32), 3)
    np.testing.assert_array_equal(positions, [[0, 1, 2], [9, 10, 11]])
    np.testing.assert_array_equal(after, [3, 12])
