"""What operators state as the least bytes of a pass is what check-tpu holds their kernels against.

Forward: arguments read, y written; backward: arguments and the cotangent of y read, gradients
written. The statements also count the states before and after and their cotangents, and some of
them parameters in the dtype of the activations, or one kernel where a call has two.
"""

import functools
import inspect

import jax
import pytest

from pallas_kernels import OPERATORS
from pallas_kernels.core import kernel_check
from pallas_kernels.core.testing import letters_of

CALLS = [(name, s.name) for name, op in OPERATORS.items() for s in kernel_check.specs_of(op)]


def bytes_of(*arrays):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize("name, call", CALLS)
def test_the_statement_is_the_minimum(name, call):
    op = OPERATORS[name]
    spec = next(s for s in kernel_check.specs_of(op) if s.name == call)
    named = kernel_check.arguments(op, spec)
    arrays = tuple(named.values())
    parameters = [x for n, x in named.items() if "t" not in letters_of(op)[n]]
    run = functools.partial(kernel_check._call, op, spec, "xla")
    results = jax.eval_shape(run, *arrays)
    y, state = results if op.axes.state else (results, None)
    given = {**spec.sizes, **spec.options}
    taken = {k: v for k, v in given.items() if k in inspect.signature(op.cost).parameters}
    taken["itemsize"] = 4 if kernel_check.dtype_of(spec) == "float32" else 2
    for backward in (False, True):
        stated = op.cost(**taken, backward=backward).bytes
        least = (1 + backward) * bytes_of(arrays) + bytes_of(y)
        fewer = least - (1 + backward) * bytes_of(parameters)
        more = least + (4 if backward else 2) * bytes_of(state)
        assert 0.95 * fewer <= stated <= 1.05 * more


def test_there_are_calls_of_real_models():
    with_kernel = {name for name, op in OPERATORS.items() if kernel_check.has_kernel(op)}
    primary = {n for n, op in OPERATORS.items() if kernel_check.specs_of(op, primary=True)}
    assert primary == with_kernel
