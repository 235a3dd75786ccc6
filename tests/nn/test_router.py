"""Routing: the authors' choices, the loss against sums by hand, and what bad logits do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.nn import router
from seqzoo.nn.report import captured
from seqzoo.nn.router import load_balance, report_routing

# Compiled as one: run eagerly, each operation would compile alone.
route = jax.jit(router.route, static_argnames=("k", "normalize"))
load = jax.jit(router.load)


def test_choices_of_the_authors(golden):
    have = golden("mom/routing")
    routed = route(jnp.asarray(have["in.router_logits"][0]), 2)
    np.testing.assert_array_equal(routed.chosen, have["out.topk_indices"])
    np.testing.assert_allclose(routed.weights, have["out.topk_weights"], atol=1e-6)


def test_loss_of_the_authors(golden):
    """Theirs pools the layers; ours takes whatever it is given as one set of tokens."""
    have = golden("mom/routing")
    logits = jnp.asarray(have["in.router_logits"])
    valid = jnp.broadcast_to(have["in.attention_mask"] > 0, logits.shape[:3])
    loss = jax.jit(lambda logits, valid=None: load_balance(route(logits, 2), valid))
    np.testing.assert_allclose(loss(logits), have["out.aux_loss"], rtol=1e-6)
    np.testing.assert_allclose(loss(logits, valid), have["out.aux_loss_masked"], rtol=1e-6)
    gradient = jax.jit(jax.grad(loss))(logits)
    np.testing.assert_allclose(gradient, have["grad.router_logits_of_aux"], atol=1e-6)


@pytest.mark.parametrize("m, k", [(4, 2), (5, 1), (3, 3)])
def test_an_even_router_loses_k(m, k):
    routed = route(jnp.zeros((7, m)), k)
    np.testing.assert_allclose(jax.jit(load_balance)(routed), k, rtol=1e-6)


def test_load_counts_tokens():
    logits = np.random.default_rng(0).standard_normal((2, 9, 4))
    valid = np.ones((2, 9), bool)
    valid[0, :4] = False
    used, mean = load(route(jnp.asarray(logits), 2), jnp.asarray(valid))
    order = np.argsort(-logits, axis=-1)[valid][:, :2]
    np.testing.assert_allclose(used, [np.mean(np.any(order == i, -1)) for i in range(4)], rtol=1e-6)
    np.testing.assert_allclose([used.sum(), mean.sum()], [2, 1], rtol=1e-6)


def test_one_choice_leaves_the_router_without_gradient():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    total = lambda logits, **how: jnp.sum(jnp.sin(route(logits, 1, **how).weights))
    assert not np.any(jax.grad(total)(logits))
    assert np.all(np.any(jax.grad(lambda z: total(z, normalize=False))(logits), axis=-1))


def test_probabilities_that_underflow_are_no_tie():
    routed = route(jnp.asarray([[0.0, -200.0, 300.0, -150.0]]), 3)
    np.testing.assert_array_equal(routed.chosen, [[2, 0, 3]])
    np.testing.assert_array_equal(routed.weights, [[1, 0, 0]])


def test_nan_logits_choose_different_places_and_give_nan():
    """A token whose logits are nan is seen in its output, and in no other token's."""
    logits = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    logits[2] = np.nan
    logits[4, 1] = np.nan
    routed = route(jnp.asarray(logits), 2)
    assert all(len(set(map(int, row))) == 2 for row in routed.chosen)
    assert np.all((routed.chosen >= 0) & (routed.chosen < 4))
    bad = np.isnan(np.asarray(routed.weights)).any(-1)
    np.testing.assert_array_equal(bad, [0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must lie in 1 .. 4"):
        route(jnp.zeros((2, 4)), k)


class Router(nnx.Module):
    def __call__(self, logits):
        report_routing(self, route(logits, 2))


def test_what_is_reported():
    logits = jnp.asarray([[9.0, 8.0, 0.0, 0.0], [9.0, 8.0, 0.0, 0.0]])
    told = jax.jit(lambda logits: captured(Router(), lambda router: router(logits))[1])(logits)
    told = {name.removeprefix("value__"): float(value) for name, value in told.items()}
    assert [told[f"router_load/{i}"] for i in range(4)] == [1, 1, 0, 0]
    assert told["router_load/max"] == 1
    assert told["router_entropy/load"] == pytest.approx(math.log(2) / math.log(4))
    p = np.exp(np.array([9.0, 8.0, 0.0, 0.0]))
    p /= p.sum()
    assert told["router_entropy/token"] == pytest.approx(-np.sum(p * np.log(p)) / math.log(4))
