"""What tests of whole models run them with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


def _compiled(model, method="__call__"):
    graphdef, variables = nnx.split(model)
    static = ("return_state",) if method == "run" else ()
    call = lambda variables, *args, **kw: getattr(nnx.merge(graphdef, variables), method)(
        *args, **kw
    )
    return functools.partial(jax.jit(call, static_argnames=static), variables)


@pytest.fixture(scope="session")
def compiled():
    """A method as one compiled program; run eagerly, each operation would compile alone."""
    return _compiled


@pytest.fixture(scope="session")
def tokens_of():
    """Random tokens of a vocabulary of 13."""

    def draw(*shape, seed=0):
        return jnp.asarray(np.random.default_rng(seed).integers(0, 13, shape), jnp.int32)

    return draw
