"""Bytes that kernels move at the shapes of real models, by their BlockSpecs; traced, never run.

The figure of the project: at most 1.3 times the least that a pass has to move.
"""

import functools

import jax
import pytest

from pallas_kernels import OPERATORS
from pallas_kernels.core import dispatch, kernel_check

MOST = 1.3
WRITTEN = [name for name, op in OPERATORS.items() if kernel_check.has_kernel(op)]
# jax's own attention: every block of queries reads the keys that it sees anew.
NOT_OURS = ("chunk_attention",)


@pytest.mark.parametrize("name", WRITTEN)
def test_kernels_move_little_more_than_they_must(name):
    op = OPERATORS[name]
    (spec, *_) = kernel_check.specs_of(op, primary=True)
    arrays = tuple(kernel_check.arguments(op, spec).values())
    y = jax.eval_shape(functools.partial(kernel_check._y, op, spec, "xla"), *arrays)
    forward = functools.partial(kernel_check._y, op, spec, kernel_check.KERNEL)
    with dispatch.compiling_for("TPU v5 lite"):
        traced = kernel_check.trace_passes(forward, arrays)
    for part, one in kernel_check.count_passes(*traced, arrays, y).items():
        assert one.kernels, part
        assert one.bytes >= 0.9 * one.least, part
        assert name in NOT_OURS or one.bytes <= MOST * one.least, part
