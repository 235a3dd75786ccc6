"""simple_gla and gla state what their references do."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gla, simple_gla
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.costs import Cost, count_flops
from pallas_kernels.core.testing import letters_of

SIZES = {
    simple_gla: dict(b=2, t=64, h=4, g=2, k=16, v=32),
    gla: dict(b=2, t=64, h=4, k=16, v=32),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", SIZES, ids=lambda op: op.__name__)
def test_stated_is_what_the_reference_does(op, backward):
    sizes = SIZES[op]
    shapes = [tuple(sizes[x] for x in letters_of(op)[n]) for n in testing.required(op)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = lambda *arrays: op(*arrays)[0].sum()
    with dispatch.forced("reference"):
        forward = count_flops(run, *arrays)
        whole = count_flops(jax.grad(run, argnums=(0, 1, 2, 3)), *arrays)
    counted = forward
    if backward:
        counted = Cost(*(w - f for w, f in zip(whole, forward, strict=True)))
    stated = op.cost(**sizes, backward=backward)
    # The reference masks (more work), but keeps its states (less in the backward pass).
    assert 0.7 < counted.flops / stated.flops < 1.6
    if not backward:
        assert forward.transcendentals == stated.transcendentals
        assert forward.bytes < 1.1 * stated.bytes
