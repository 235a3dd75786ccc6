"""The states of several runs in one array each, and one program that updates them all.

Every array of the state gets a leading dimension, the place of the run. Runs share nothing else: a
number that is not finite stays in its place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from seqzoo.train.state import TrainState
from seqzoo.train.step import Spec, update

# How the places are carried: one after the other by a loop inside the program, or by jax.vmap.
FORMS = ("map", "vmap")


@functools.lru_cache(maxsize=64)
def group_step(spec: Spec, by: str):
    """The jitted step of a group: `(states, batches, hypers, seeds, active) -> (states, Metrics)`.

    All have the place first; states are donated. Where `active`, bool [n], is false, the state
    stays as it was and the metrics mean nothing.
    """
    one = update(spec)
    form = {"map": _mapped, "vmap": _batched}[by]
    whole = NamedSharding(spec.mesh, PartitionSpec())
    return jax.jit(functools.partial(form, one), donate_argnums=0, out_shardings=whole)


def _batched(one, states, batches, hypers, seeds, active):
    new, metrics = jax.vmap(one)(states, batches, hypers, seeds)

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(chosen, new, states), metrics


def _mapped(one, states, batches, hypers, seeds, active):
    """Each place is read, updated and written where it lies; one that rests costs nothing."""
    shapes = jax.eval_shape(one, *(at(tree, 0) for tree in (states, batches, hypers, seeds)))[1]
    n = len(active)
    metrics = jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), shapes)

    def run(i, carry):
        states, metrics = carry
        new = one(at(states, i), at(batches, i), hypers[i], seeds[i])
        put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0)
        return jax.tree.map(put, (states, metrics), new)

    def body(i, carry):
        return jax.lax.cond(active[i], run, lambda i, carry: carry, i, carry)

    return jax.lax.fori_loop(0, n, body, (states, metrics))


def at(tree: Any, place: Any) -> Any:
    """The arrays of one place."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), tree)


taken = jax.jit(at)


@functools.lru_cache(maxsize=64)
def empty(spec: Spec, n: int):
    """The jitted program that makes the states of n places, all zero."""
    whole = NamedSharding(spec.mesh, PartitionSpec())
    zeros = lambda: jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), spec.state.tree)
    return jax.jit(zeros, out_shardings=whole)


@functools.partial(jax.jit, donate_argnums=0)
def put(states: TrainState, state: TrainState, place: jax.Array) -> TrainState:
    """The states with one of them in its place."""
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, place, 0), states, state
    )
