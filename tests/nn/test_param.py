"""What parameters declare of themselves, through stacking too."""

import functools

import jax.numpy as jnp
import pytest
from flax import nnx

from seqzoo.nn.param import Rates, decays, declare, metadata, own_rates, param
from seqzoo.train.state import decayed_paths, rated_paths, structure_of


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.matrix = param(jnp.ones((2, 3)), axes=(None, None))
        self.slow = param(jnp.ones((2, 3)), axes=(None, None), lr=1e-3, weight_decay=0.5)
        self.vector = param(jnp.ones(3), axes=(None,), decay=False, lr=1e-4)
        self.plain = nnx.Param(jnp.ones(3))
        declared = metadata(None, None, weight_decay=0.0)
        self.linear = nnx.Linear(2, 3, use_bias=False, kernel_metadata=declared, rngs=rngs)


def test_rates_are_declared_and_found():
    layer = Layer(rngs=nnx.Rngs(0))
    declare(layer)
    assert own_rates(layer.matrix) is None and own_rates(layer.plain) is None
    assert own_rates(layer.slow) == Rates(1e-3, 0.5) and decays(layer.slow)
    assert own_rates(layer.vector) == Rates(1e-4, None) and not decays(layer.vector)
    structure = structure_of(functools.partial(Layer))
    assert decayed_paths(structure) == (("matrix",),)
    assert dict(rated_paths(structure)) == {
        ("slow",): Rates(1e-3, 0.5),
        ("vector",): Rates(1e-4, None),
        ("linear", "kernel"): Rates(None, 0.0),
    }


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(lr=-1.0), "lr is -1.0; it must be 0 or more"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; it must be 0 or more"),
        (dict(weight_decay=0.1, decay=False), "weight_decay is 0.1 and decay=False"),
    ],
)
def test_bad_rates(wrong, said):
    with pytest.raises(ValueError, match=said):
        param(jnp.ones(3), axes=(None,), **wrong)
