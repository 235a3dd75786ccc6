"""From a configuration to the objects of a run: model, task, data, optimizer, schedule, mesh."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from omegaconf import DictConfig

from seqzoo.config.build import build
from seqzoo.data import pipeline
from seqzoo.data.source import Dataset, Split
from seqzoo.nn.sharding import Rules, param_shardings, use_mesh
from seqzoo.tasks.task import Task
from seqzoo.train import manifest
from seqzoo.train import mesh as meshes
from seqzoo.train import optimizer as optimizers
from seqzoo.train.identity import plain
from seqzoo.train.settings import LoggerSettings, TrainerSettings
from seqzoo.train.state import (
    Abstract,
    Structure,
    TrainState,
    arrays_of,
    decay_mask,
    decayed_paths,
    rated_paths,
    structure_of,
)
from seqzoo.train.step import INIT, Spec, hyper_array, run_key
from seqzoo.train.values import values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The objects of a run; no arrays yet.

    Attributes:
        config: plain, resolved.
        trainer: settings of the section of that name.
        logger: the same.
        data: where rows come from.
        task: what is asked of them.
        optimizer: with its run-time values.
        schedule: `schedule(step, steps)` is the factor of the learning rate.
        structure: the model without arrays.
        spec: what compiled programs depend on.
    """

    config: Mapping[str, Any]
    trainer: TrainerSettings
    logger: LoggerSettings
    data: Dataset
    task: Task
    optimizer: optimizers.Optimizer
    schedule: Any
    structure: Structure
    spec: Spec

    @property
    def microbatch(self) -> int:
        """Rows that are computed at once, of all devices together."""
        return self.trainer.global_batch_size // self.trainer.grad_accum_steps

    @property
    def state(self) -> TrainState:
        """The state as ShapeDtypeStructs that say where each array lies."""
        return self.spec.state.tree

    def lr(self, step: int) -> float:
        """The learning rate of update number `step`, from 0."""
        return self.optimizer.lr * self.schedule(step, self.trainer.steps)

    def hyper(self, step: int) -> np.ndarray:
        """The run-time values of update number `step`, as the compiled step takes them."""
        values = self.optimizer.hyper() | {"lr": self.lr(step), "peak_lr": self.optimizer.lr}
        return hyper_array(self.spec, values | {"ema_decay": self.trainer.ema_decay or 0.0})


def build_data(config: DictConfig | Mapping[str, Any]) -> Dataset:
    """The data set alone: needs no jax."""
    return build(plain(config)["data"])


def setup(
    config: DictConfig | Mapping[str, Any],
    *,
    data: Dataset | None = None,
    devices: list | None = None,
) -> Setup:
    """Builds everything but arrays.

    Args:
        config: resolved and checked.
        data: the data set, where it was built already.
        devices: None = all.

    Raises:
        ConfigError: something does not fit together.
    """
    config = plain(config)
    trainer, mesh_settings, logger, data, task, optimizer, schedule = values_of(config, data=data)
    mesh, rules = meshes.make_mesh(mesh_settings, devices), meshes.rules_of(mesh_settings)
    rows = trainer.global_batch_size // trainer.grad_accum_steps
    meshes.check_batch(rows, mesh, rules, "trainer.global_batch_size / trainer.grad_accum_steps")
    meshes.check_length(data.seq_len, mesh, rules, "data.seq_len")
    if trainer.eval_chunk_length is not None:
        meshes.check_length(trainer.eval_chunk_length, mesh, rules, "trainer.eval_chunk_length")
    structure = _structure(json.dumps(config["model"], sort_keys=True))
    decayed = decayed_paths(structure)
    state = _abstract_state(
        structure, optimizer, decayed, trainer.ema_decay is not None, mesh, rules
    )
    spec = Spec(
        graphdef=structure.graphdef,
        task=task,
        optimizer=optimizer.structure(),
        decayed=decayed,
        rated=rated_paths(structure),
        grad_accum_steps=trainer.grad_accum_steps,
        state=Abstract(state),
        mesh=mesh,
        rules=rules,
        precision=trainer.precision,
    )
    return Setup(
        config=config,
        trainer=trainer,
        logger=logger,
        data=data,
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        structure=structure,
        spec=spec,
    )


def check_model(config: DictConfig | Mapping[str, Any]) -> None:
    """Builds the model without arrays: its run will not have to. Starts no device.

    Raises:
        ConfigError: a constructor refused a value.
    """
    _structure(json.dumps(plain(config)["model"], sort_keys=True))


@functools.lru_cache(maxsize=16)
def _structure(model_json: str) -> Structure:
    """Runs of a sweep share it: building a model takes a while, even an abstract one."""
    return structure_of(functools.partial(build, json.loads(model_json)))


def check_data(run: Setup) -> None:
    """Asks every split that the run will read for what it will be asked for, and reads nothing.

    Raises:
        ConfigError: a split is missing or endless, or batches do not fit it.
    """
    trainer = run.trainer
    part = meshes.feed(run.spec.mesh, run.spec.rules)
    parts = {"process_index": part.index, "process_count": part.count, "workers": 0}
    pipeline.batches(
        run.data, "train", global_batch_size=trainer.global_batch_size, stop_step=0, **parts
    ).close()
    rows = trainer.eval_batch_size or run.microbatch
    meshes.check_batch(rows, run.spec.mesh, run.spec.rules, "trainer.eval_batch_size")
    looks: dict[Split, int | None] = {"valid": trainer.eval_samples, "test": trainer.test_samples}
    for split, samples in looks.items():
        if samples != 0:
            pipeline.eval_batches(
                run.data, split, batch_size=rows, max_samples=samples, **parts
            ).close()


def _abstract_state(
    structure: Structure,
    optimizer: optimizers.Optimizer,
    decayed: tuple,
    with_ema: bool,
    mesh: Mesh,
    rules: Rules,
) -> TrainState:
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = nnx.to_pure_dict(param_shardings(structure.params, mesh, rules))
    params = jax.tree.map(_struct, nnx.to_pure_dict(structure.params), shardings)
    rest = jax.tree.map(lambda a: _struct(a, whole), nnx.to_pure_dict(structure.rest))
    mask = decay_mask(params, decayed)
    opt_state = jax.eval_shape(lambda p: optimizers.init(optimizer, p, mask), params)
    return TrainState(
        step=jax.ShapeDtypeStruct((), np.dtype("int32"), sharding=whole),
        params=params,
        rest=rest,
        opt_state=_like_params(opt_state, params, whole),
        ema=params if with_ema else None,
    )


def initial_state(run: Setup) -> TrainState:
    """Draws the initial values, each where it will lie."""
    return initializer(run)(np.uint32(run.trainer.seed))


def initializer(run: Setup):
    """The jitted program `seed -> state`; runs that differ in seeds and rates share it."""
    return _initializer(json.dumps(run.config["model"], sort_keys=True), run.spec)


@functools.lru_cache(maxsize=64)
def _initializer(model_json: str, spec: Spec):
    def draw(seed):
        with use_mesh(spec.mesh, spec.rules):
            model = build(json.loads(model_json), rngs=nnx.Rngs(run_key(seed, INIT)))
        params, rest = arrays_of(model)
        opt_state = optimizers.init(spec.optimizer, params, decay_mask(params, spec.decayed))
        # The average is an array of its own: the step donates both.
        ema = None if spec.state.tree.ema is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, rest, opt_state, ema)

    return jax.jit(draw, out_shardings=spec.state.shardings)


def _struct(a: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _like_params(opt_state: Any, params: Any, whole: NamedSharding) -> Any:
    """Moments lie as their parameters do: a leaf whose name ends in a parameter's, of its shape."""
    known = manifest.flatten(params)

    def place(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        words = name.split("/")
        for start in range(len(words)):
            param = known.get("/".join(words[start:]))
            if param is not None and param.shape == leaf.shape:
                return _struct(leaf, param.sharding)
        return _struct(leaf, whole)

    placed = {name: place(name, leaf) for name, leaf in manifest.flatten(opt_state).items()}
    return manifest.unflatten(opt_state, placed)
