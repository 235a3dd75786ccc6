"""Optimizers by config: each goes downhill, and what varies in a sweep is an argument."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqzoo.errors import ConfigError
from seqzoo.nn.param import Rates
from seqzoo.train import manifest
from seqzoo.train import optimizer as optimizers
from seqzoo.train.optimizer import SGD, Adafactor, AdamW, Lion, Muon

ALL = (
    AdamW(lr=0.05, weight_decay=0.0),
    AdamW(lr=0.05, weight_decay=0.0, nesterov=True),
    SGD(lr=0.05),
    Lion(lr=0.04, weight_decay=0.0),
    Adafactor(lr=0.05, min_dim_size_to_factor=4),
    Muon(lr=0.05, weight_decay=0.0),
)
PARAMS = {"kernel": jnp.arange(32.0).reshape(4, 8) / 16 - 1, "bias": jnp.arange(4.0)}
DECAY = {"kernel": True, "bias": False}


def update(optimizer, params, state, hyper=None):
    """One step on the sum of squares."""
    hyper = optimizer.hyper() if hyper is None else hyper
    grads = jax.grad(lambda p: sum(jnp.sum(a**2) for a in p.values()))(params)
    updates, state = optimizer.transform(hyper, DECAY).update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_it_goes_downhill(optimizer):
    params, state = PARAMS, optimizers.init(optimizer, PARAMS, DECAY)
    step = jax.jit(lambda params, state: update(optimizer, params, state))
    for _ in range(60):
        params, state = step(params, state)
    assert sum(float(jnp.sum(a**2)) for a in params.values()) < 4.0


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_rates_are_arguments(optimizer):
    other = dataclasses.replace(optimizer, lr=0.003, weight_decay=0.7, clip_norm=None)
    assert optimizer.structure() == other.structure()
    assert hash(optimizer.structure()) == hash(other.structure())
    state = optimizers.init(optimizer, PARAMS, DECAY)
    by_argument, _ = update(optimizer.structure(), PARAMS, state, other.hyper())
    directly, _ = update(other, PARAMS, optimizers.init(other, PARAMS, DECAY))
    for name in PARAMS:
        np.testing.assert_allclose(by_argument[name], directly[name], rtol=1e-6)
        assert not np.allclose(by_argument[name], PARAMS[name])


def test_muon_is_for_stacked_kernels_alone():
    params = {"kernel": jnp.ones((3, 4, 8)), "embedding": jnp.ones((8, 4)), "A_log": jnp.ones(4)}
    state = optimizers.init(Muon(), params, jax.tree.map(lambda a: True, params))
    names = {name: a.shape for name, a in manifest.flatten(state).items() if a.ndim}
    muon = [shape for name, shape in names.items() if "muon" in name and len(shape) > 1]
    assert muon == [(3, 4, 8)]
    adam = sorted(shape for name, shape in names.items() if "muon" not in name)
    assert adam == [(4,), (4,), (8, 4), (8, 4)]


def test_decay_takes_what_declares_it_by_the_rate():
    still = SGD(lr=0.1, weight_decay=0.5, momentum=0.0)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    transform = still.transform(still.hyper(), DECAY)
    updates, _ = transform.update(zero, transform.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * PARAMS["kernel"], rtol=1e-6)
    assert not updates["bias"].any()


def test_clipping_is_by_the_norm_of_all_gradients():
    clipped = SGD(lr=1.0, clip_norm=0.25, momentum=0.0)
    transform = clipped.transform(clipped.hyper(), DECAY)
    updates, _ = transform.update(PARAMS, transform.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.25, rel=1e-5)
    free = dataclasses.replace(clipped, clip_norm=None)
    assert free.hyper()["clip_norm"] == math.inf
    transform = free.transform(free.hyper(), DECAY)
    updates, _ = transform.update(PARAMS, transform.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"], -PARAMS["kernel"], rtol=1e-6)


def test_adamw_is_the_published_one():
    ours = AdamW(lr=0.01, weight_decay=0.1, clip_norm=None, b2=0.99)
    theirs = optax.adamw(0.01, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, mask=DECAY)
    params, state = PARAMS, optimizers.init(ours, PARAMS, DECAY)
    reference, other = PARAMS, theirs.init(PARAMS)
    for _ in range(5):
        params, state = update(ours, params, state)
        grads = jax.tree.map(lambda a: 2 * a, reference)
        updates, other = theirs.update(grads, other, reference)
        reference = optax.apply_updates(reference, updates)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], reference[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0; it must be above 0"),
        ({"lr": math.inf}, "optimizer.lr=inf; it must be above 0, and finite"),
        ({"weight_decay": math.inf}, "optimizer.weight_decay=inf; it must be 0 or more, and fin"),
        ({"eps": -1.0}, "optimizer.eps=-1.0; it must be above 0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0; it must be 0 or more"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0; it must be above 0, or null"),
        ({"b1": 1.0}, r"optimizer.b1=1.0; it must lie in \[0, 1\)"),
    ],
)
def test_values_out_of_range(wrong, said):
    with pytest.raises(ConfigError, match=said):
        AdamW(**wrong)


def test_muon_iterates():
    with pytest.raises(ConfigError, match="optimizer.ns_steps=-3; it must be at least 1"):
        Muon(ns_steps=-3)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_rates_of_its_own_are_those_of_another_optimizer(optimizer, ratio):
    """A parameter with an lr and a decay of its own moves as under an optimizer with these."""
    optimizer = dataclasses.replace(optimizer, weight_decay=0.3)
    other = dataclasses.replace(optimizer, lr=0.02, weight_decay=0.7)
    grads = jax.tree.map(lambda a: 2 * a, PARAMS)

    def moved(optimizer, rated):
        shared = {"kernel": "kernel" not in dict(rated), "bias": False}
        hyper = optimizer.hyper() | {"lr": ratio * optimizer.lr, "peak_lr": optimizer.lr}
        state = optimizers.init(optimizer, PARAMS, shared)
        updates, _ = optimizer.transform(hyper, shared).update(grads, state, PARAMS)
        paths = [((name,), rates) for name, rates in rated]
        return optimizers.with_own_rates(updates, PARAMS, paths, hyper)

    whole, theirs = moved(optimizer, []), moved(other, [])
    own = moved(optimizer, [("kernel", Rates(0.02, 0.7))])
    np.testing.assert_allclose(own["kernel"], theirs["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(own["bias"], whole["bias"])
    frozen = moved(optimizer, [("bias", Rates(0.0, None))])
    assert not frozen["bias"].any()
