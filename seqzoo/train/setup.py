"""From a configuration to the objects of a run: model, task, data, optimizer, schedule, mesh."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from omegaconf import DictConfig, OmegaConf

from seqzoo.config.build import build
from seqzoo.data.source import Dataset
from seqzoo.errors import ConfigError
from seqzoo.nn.sharding import param_shardings, use_mesh
from seqzoo.tasks.task import Task
from seqzoo.train import manifest
from seqzoo.train import mesh as meshes
from seqzoo.train import optimizer as optimizers
from seqzoo.train.settings import LoggerSettings, MeshSettings, TrainerSettings
from seqzoo.train.state import TrainState, decay_mask, decayed_paths, structure_of
from seqzoo.train.step import INIT, Spec, run_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The objects of a run.

    Attributes:
        config: plain, resolved.
        trainer, logger: settings.
        data: where rows come from.
        task: what is asked of them.
        optimizer: with its run-time values.
        schedule: `schedule(step, steps)` is the factor of the learning rate.
        structure: the model without arrays.
        spec: what the compiled step depends on.
    """

    config: Mapping[str, Any]
    trainer: TrainerSettings
    logger: LoggerSettings
    data: Dataset
    task: Task
    optimizer: optimizers.Optimizer
    schedule: Any
    structure: Any
    spec: Spec

    @property
    def mesh(self):
        return self.spec.mesh

    def hyper(self, step: int) -> dict[str, float]:
        """The run-time values of one update."""
        hyper = self.optimizer.hyper()
        hyper["lr"] *= self.schedule(step, self.trainer.steps)
        hyper["ema_decay"] = self.trainer.ema_decay or 0.0
        return hyper


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain dicts and lists."""
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    return dict(config)


def build_data(config: Mapping[str, Any]) -> Dataset:
    """The data set alone: needs no jax."""
    return build(config["data"])


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
    trainer = TrainerSettings(**config["trainer"])
    mesh_settings = MeshSettings(**config["mesh"])
    data = build_data(config) if data is None else data
    task = build(config["task"]).for_data(data)
    optimizer = build(config["optimizer"])
    mesh, rules = meshes.make_mesh(mesh_settings, devices), meshes.rules_of(mesh_settings)
    micro = trainer.global_batch_size // trainer.grad_accum_steps
    meshes.check_batch(micro, mesh, rules, "global_batch_size / grad_accum_steps")
    with use_mesh(mesh, rules):
        structure = structure_of(functools.partial(build, config["model"]))
    spec = Spec(
        graphdef=structure.graphdef,
        task=task,
        optimizer=optimizer.structure(),
        decayed=decayed_paths(structure),
        grad_accum_steps=trainer.grad_accum_steps,
        mesh=mesh,
        rules=rules,
        precision=trainer.precision,
    )
    return Setup(
        config=config,
        trainer=trainer,
        logger=LoggerSettings(**config["logger"]),
        data=data,
        task=task,
        optimizer=optimizer,
        schedule=build(config["schedule"]),
        structure=structure,
        spec=spec,
    )


def abstract_state(run: Setup) -> TrainState:
    """The state as ShapeDtypeStructs that say where each array lies."""
    mesh, rules = run.spec.mesh, run.spec.rules
    whole = NamedSharding(mesh, PartitionSpec())
    try:
        shardings = param_shardings(run.structure.params, mesh, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    params = jax.tree.map(_struct, nnx.as_pure(run.structure.params), shardings)
    rest = jax.tree.map(lambda a: _struct(a, whole), nnx.as_pure(run.structure.rest))
    mask = decay_mask(params, run.spec.decayed)
    opt_state = jax.eval_shape(lambda p: optimizers.init(run.optimizer, p, mask), params)
    opt_state = _like_params(opt_state, params, whole)
    return TrainState(
        step=jax.ShapeDtypeStruct((), "int32", sharding=whole),
        params=params,
        rest=rest,
        opt_state=opt_state,
        ema=None if run.trainer.ema_decay is None else params,
    )


def initial_state(run: Setup, abstract: TrainState) -> TrainState:
    """Draws the initial values, each where it will lie."""
    program = _initializer(json.dumps(run.config["model"], sort_keys=True), run.spec, _Tree(abstract))
    state = program(jax.numpy.uint32(run.trainer.seed))
    if abstract.ema is not None:  # arrays of its own: the step donates both
        state = state._replace(ema=jax.tree.map(jax.numpy.copy, state.params))
    return state


@functools.lru_cache(maxsize=64)
def _initializer(model_json: str, spec: Spec, abstract: "_Tree"):
    """The program that draws a state; runs that differ in seeds and rates share it."""

    def draw(seed):
        with use_mesh(spec.mesh, spec.rules):
            model = build(json.loads(model_json), rngs=nnx.Rngs(run_key(seed, INIT)))
        _, params, rest = nnx.split(model, nnx.Param, ...)
        params, rest = nnx.as_pure(params), nnx.as_pure(rest)
        opt_state = optimizers.init(spec.optimizer, params, decay_mask(params, spec.decayed))
        return TrainState(jax.numpy.int32(0), params, rest, opt_state, None)

    shardings = jax.tree.map(lambda a: a.sharding, abstract.tree._replace(ema=None))
    return jax.jit(draw, out_shardings=shardings)


class _Tree:
    """A tree of ShapeDtypeStructs as a key: equal where structure and shardings are."""

    def __init__(self, tree: Any):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._key = (structure, tuple((a.shape, a.dtype, a.sharding) for a in leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self._key == other._key


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
