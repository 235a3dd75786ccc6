"""One update of the parameters, compiled once for everything that does not change shapes.

The learning rate, weight decay, clipping norm, EMA decay and the seed are arguments of the compiled
step: a sweep over them compiles once. Losses are summed over microbatches and devices and divided
by the total weight, so that a batch gives the same update however it is cut.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqzoo.nn.param import Rates
from seqzoo.nn.sharding import Rules, use_mesh
from seqzoo.tasks.task import Sums, Task
from seqzoo.train import optimizer as optimizers
from seqzoo.train.state import Abstract, Path, TrainState, decay_mask, merge

# Purposes of random keys: key = fold_in(fold_in(seed, purpose), step ...).
INIT, DROPOUT = 0, 1

# What names of metrics begin with that count skipped updates; then comes the reason.
SKIPPED = "skipped/"


class Spec(NamedTuple):
    """What a compiled program depends on; hashable.

    Attributes:
        graphdef: the model's static part.
        task: what is asked.
        optimizer: without its run-time values.
        decayed: paths of the parameters under optimizer.weight_decay.
        rated: paths of the parameters with rates of their own, and those.
        grad_accum_steps: microbatches per update.
        state: shapes and places of the state.
        mesh: where it runs.
        rules: what is spread over the mesh.
        precision: of float32 matrix products.
    """

    graphdef: Any
    task: Task
    optimizer: optimizers.Optimizer
    decayed: tuple[Path, ...]
    rated: tuple[tuple[Path, Rates], ...]
    grad_accum_steps: int
    state: Abstract
    mesh: Mesh
    rules: Rules
    precision: str

    @property
    def hyper_names(self) -> tuple[str, ...]:
        """The run-time values of an update, in the order in which they are passed."""
        return ("ema_decay", "peak_lr", *sorted(self.optimizer.hyper()))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pairs", "finite"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What an update tells, in one small array.

    Attributes:
        names: of the rows of pairs.
        pairs: float32 [k, 2], a sum and its weight each.
        finite: bool [], whether the loss and the gradients are, or the update was skipped.
    """

    names: tuple[str, ...]
    pairs: jax.Array
    finite: jax.Array


def run_key(seed: jax.Array, purpose: int) -> jax.Array:
    """The key of one purpose in a run with this seed (uint32 [])."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


@functools.lru_cache(maxsize=64)
def train_step(spec: Spec):
    """The jitted step: `(state, batch, hyper, seed) -> (state, Metrics)`; state is donated.

    hyper is float32 [k], the values of `spec.hyper_names`; seed uint32 [].
    """
    whole = NamedSharding(spec.mesh, PartitionSpec())
    return jax.jit(update(spec), donate_argnums=0, out_shardings=(spec.state.shardings, whole))


def update(spec: Spec):
    """The step as a plain function, to be traced."""

    def objective(params, rest, batch, key):
        sums = spec.task.sums(merge(spec.graphdef, params, rest), batch, key=key)
        auxiliary = sum(sums.reports.losses.values()) if sums.reports is not None else 0.0
        return sums.loss + sums.weight * auxiliary, _totals(sums) | _skips(sums)

    def gradients(params, rest, batch, key):
        grads, totals = jax.grad(objective, has_aux=True)(params, rest, batch, key)
        return grads, totals

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
        shapes = jax.eval_shape(gradients, params, rest, first, key)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(one, zeros, (parts, jnp.arange(n)))[0]

    def step(state: TrainState, batch, hyper, seed):
        values = dict(zip(spec.hyper_names, hyper, strict=True))
        key = jax.random.fold_in(run_key(seed, DROPOUT), state.step)
        grads, totals = accumulated(state.params, state.rest, batch, key)
        weight = jnp.maximum(totals["loss"][1], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        mask = decay_mask(state.params, spec.decayed)
        transform = spec.optimizer.transform(values, mask)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        updates = optimizers.with_own_rates(updates, state.params, spec.rated, values)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            keep = values["ema_decay"]
            ema = jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, ema, params)
        grad_norm = optax.tree.norm(grads)
        totals |= {
            "grad_norm": (grad_norm, 1.0),
            "update_norm": (optax.tree.norm(updates), 1.0),
            "param_norm": (optax.tree.norm(params), 1.0),
        }
        finite = jnp.isfinite(totals["loss"][0]) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, params, state.rest, opt_state, ema)
        refusals = [value for name, (value, _) in totals.items() if name.startswith(SKIPPED)]
        if refusals:  # asked of models that may refuse; others have nothing to choose from
            skip = sum(refusals) > 0
            totals = {name: _unless(skip, name, pair) for name, pair in totals.items()}
            new = jax.tree.map(lambda a, b: jnp.where(skip, a, b), state, new)
            new, finite = new._replace(step=state.step + 1), finite | skip
        pairs = jnp.stack([jnp.stack([jnp.float32(v), jnp.float32(w)]) for v, w in totals.values()])
        return new, Metrics(tuple(totals), pairs, finite)

    return _in_force(spec, step)


@functools.lru_cache(maxsize=64)
def eval_step(spec: Spec, chunk_length: int | None = None):
    """The jitted evaluation of a batch: `(params, rest, batch) -> {name: (sum, weight)}`.

    With a chunk_length rows are read in chunks (seqzoo.tasks.rows).
    """
    more: dict[str, Any] = {} if chunk_length is None else {"chunk_length": chunk_length}

    def evaluate(params, rest, batch):
        return _totals(spec.task.sums(merge(spec.graphdef, params, rest), batch, **more))

    whole = NamedSharding(spec.mesh, PartitionSpec())
    return jax.jit(_in_force(spec, evaluate), out_shardings=whole)


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
        for name, value in sums.reports.values.items():
            # A name with parts stands for itself: each part by layer would be too many lines.
            by_layer = "/" not in name and jnp.ndim(value) > 0 and len(value) > 1
            for layer, one in enumerate(value if by_layer else ()):
                totals[f"report/{name}/layer_{layer}"] = (jnp.mean(one) * sums.weight, sums.weight)
    return totals


def _skips(sums: Sums) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How many layers refuse the update, by reason (seqzoo.nn.report.skip_update)."""
    told = {} if sums.reports is None else sums.reports.skips
    return {SKIPPED + reason: (count, jnp.float32(1)) for reason, count in told.items()}


def _unless(skip: jax.Array, name: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """A skipped update adds nothing to any mean but that of skipped updates."""
    if name.startswith(SKIPPED):
        return jnp.minimum(pair[0], 1.0), 1.0
    return jnp.where(skip, 0.0, pair[0]), jnp.where(skip, 0.0, pair[1])


def _in_force(spec: Spec, function):
    """Traces with the spec's mesh, rules and precision in force."""

    @functools.wraps(function)
    def inside(*args):
        precision = None if spec.precision == "default" else spec.precision
        with use_mesh(spec.mesh, spec.rules), jax.default_matmul_precision(precision):
            return function(*args)

    return inside


def hyper_array(spec: Spec, values: Mapping[str, float]) -> np.ndarray:
    """Run-time values as the step takes them."""
    return np.array([values[name] for name in spec.hyper_names], np.float32)
