"""Mixers under what jax does with functions: ensembles by vmap, recomputing by remat."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from seqzoo import mixers

SETTINGS = {"MoM": dict(n_heads=2, head_dim=4), "MonarchMixer": dict(max_length=32)}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_ensemble_is_trained_with_remat(name):
    """Traced alone: a gradient for each of three sets of parameters, over the same rows."""
    build = lambda: getattr(mixers, name)(16, **SETTINGS[name], rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)

    def loss(params, rest, x):
        call = nnx.remat(lambda mixer, x: mixer(x)[0])
        return jnp.sum(call(nnx.merge(graphdef, params, rest), x))

    three = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), tree)
    x = jax.ShapeDtypeStruct((2, 20, 16), jnp.float32)
    ensemble = jax.vmap(jax.grad(loss), in_axes=(0, 0, None))
    grads = jax.eval_shape(ensemble, three(params), three(rest), x)
    assert grads == three(params)
