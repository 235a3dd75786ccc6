"""One update of the parameters, compiled once for everything that does not change shapes.

The learning rate, weight decay, clipping norm, EMA decay and the seed are arguments of the compiled
step: a sweep over them compiles once. Losses are summed over microbatches and devices and divided
by the total weight, so that a batch gives the same update however it is cut.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from seqzoo.nn.sharding import Rules, use_mesh
from seqzoo.tasks.task import Sums, Task
from seqzoo.train import optimizer as optimizers
from seqzoo.train.state import TrainState, decay_mask, merge

# Purposes of random keys: key = fold_in(fold_in(seed, purpose), step ...).
INIT, DROPOUT = 0, 1


class Spec(NamedTuple):
    """What a compiled step depends on; hashable.

    Attributes:
        graphdef: the model's static part.
        task: what is asked.
        optimizer: without its run-time values.
        decayed: paths of the parameters under weight decay.
        grad_accum_steps: microbatches per update.
        mesh: where it runs.
        rules: what is spread over the mesh.
        precision: of float32 matrix products.
    """

    graphdef: Any
    task: Task
    optimizer: optimizers.Optimizer
    decayed: tuple[tuple, ...]
    grad_accum_steps: int
    mesh: Mesh
    rules: Rules
    precision: str


def run_key(seed: jax.Array, purpose: int) -> jax.Array:
    """The key of one purpose in a run with this seed (uint32 or int32 [])."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


@functools.lru_cache(maxsize=64)
def train_step(spec: Spec):
    """The jitted step: `(state, batch, hyper, seed) -> (state, metrics)`; state is donated.

    hyper holds lr (of this step), weight_decay, clip_norm and ema_decay, float32 []; metrics maps
    names to float32 [].
    """

    def objective(params, rest, batch, key):
        model = merge(spec.graphdef, params, rest)
        sums = spec.task.sums(model, batch, key=key)
        auxiliary = sum(sums.reports.losses.values()) if sums.reports is not None else 0.0
        return sums.loss + sums.weight * auxiliary, sums

    def gradients(params, rest, batch, key):
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, rest, batch, key)
        return grads, _totals(sums)

    def accumulated(params, rest, batch, key):
        n = spec.grad_accum_steps
        if n == 1:
            return gradients(params, rest, batch, jax.random.fold_in(key, 0))
        # Row i goes to microbatch i % n: rows stay on the devices that hold them.
        parts = jax.tree.map(
            lambda a: jnp.swapaxes(a.reshape(a.shape[0] // n, n, *a.shape[1:]), 0, 1), batch
        )

        def one(carry, inputs):
            part, i = inputs
            new = gradients(params, rest, part, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, carry, new), None

        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(gradients, params, rest, first, key),
        )
        return jax.lax.scan(one, zeros, (parts, jnp.arange(n)))[0]

    def step(state: TrainState, batch, hyper, seed):
        key = jax.random.fold_in(run_key(seed, DROPOUT), state.step)
        grads, totals = accumulated(state.params, state.rest, batch, key)
        weight = jnp.maximum(totals["loss"][1], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        mask = decay_mask(state.params, spec.decayed)
        transform = spec.optimizer.transform(hyper, mask)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            keep = hyper["ema_decay"]
            ema = jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, ema, params)
        metrics = {name: value / jnp.maximum(w, 1.0) for name, (value, w) in totals.items()}
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["param_norm"] = optax.global_norm(params)
        metrics["weight"] = totals["loss"][1]
        return TrainState(state.step + 1, params, state.rest, opt_state, ema), metrics

    return jax.jit(_in_force(spec, step), donate_argnums=0)


@functools.lru_cache(maxsize=64)
def eval_step(spec: Spec):
    """The jitted evaluation of a batch: `(params, rest, batch) -> {name: (sum, weight)}`."""

    def evaluate(params, rest, batch):
        return _totals(spec.task.sums(merge(spec.graphdef, params, rest), batch))

    return jax.jit(_in_force(spec, evaluate))


def _totals(sums: Sums) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Everything that is added up over microbatches and batches, as (sum, weight) pairs."""
    totals = {"loss": (sums.loss, sums.weight), **sums.metrics}
    if sums.reports is not None:
        told: Mapping[str, jax.Array] = {
            **{f"loss/{name}": value for name, value in sums.reports.losses.items()},
            **{f"report/{name}": value for name, value in sums.reports.values.items()},
        }
        for name, value in told.items():
            totals[name] = (jnp.mean(value) * sums.weight, sums.weight)
    return totals


def _in_force(spec: Spec, function):
    """Traces with the spec's mesh, rules and precision in force."""

    @functools.wraps(function)
    def inside(*args):
        precision = None if spec.precision == "default" else spec.precision
        with use_mesh(spec.mesh, spec.rules), jax.default_matmul_precision(precision):
            return function(*args)

    return inside
