"""What a configuration is before it runs: parameters, decoding state, FLOPs, memory.

Everything is traced on abstract arrays: nothing is allocated, whatever the size of the model.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from pallas_kernels.core import dispatch
from pallas_kernels.core.costs import count_flops
from seqzoo.config.build import build
from seqzoo.errors import DataError
from seqzoo.tasks import Task

LENGTHS = (256, 1024, 4096, 16_384, 65_536)


class Parameters(NamedTuple):
    """How many there are.

    Attributes:
        total: all of them, rows of a padded vocabulary included.
        active: those that one token uses; fewer than total where a mixer routes.
        without_embeddings: total less the tables: of tokens, at the input and (untied) output, and
            of positions.
        by_part: embedding (where vectors come in: input, which is no table), positions,
            mixers.NAME, channel_mixers, norms, head.
    """

    total: int
    active: int
    without_embeddings: int
    by_part: dict[str, int]


class Flops(NamedTuple):
    """Floating-point operations per token, at one length of sequence.

    Attributes:
        forward: of logits and loss.
        training: forward and backward, without what remat computes again.
    """

    forward: float
    training: float


class Memory(NamedTuple):
    """Bytes that must be kept while training, on one device that holds everything.

    Temporaries of single operations come on top: XLA's own account on a CPU was 1 to 1.4 times the
    total, and twice with remat=full, where a layer's activations live for a moment.

    Attributes:
        parameters, gradients, optimizer: as their names say (EMA counts as optimizer).
        activations: kept between forward and backward for one microbatch.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def abstract_model(node: Mapping[str, Any]) -> nnx.Module:
    """Builds the model of a `model` node with shapes in place of arrays.

    Raises:
        ConfigError: a constructor refused a value.
    """
    return nnx.eval_shape(lambda: build(plain(node), rngs=nnx.Rngs(0)))


def plain(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node as plain containers."""
    if isinstance(node, DictConfig):
        return OmegaConf.to_container(node, resolve=True)
    return dict(node)


def parameters(model: nnx.Module) -> Parameters:
    """Counts the parameters of an abstract (or a real) model by part."""
    by_part: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = _part(path, model)
        by_part[part] = by_part.get(part, 0) + math.prod(variable.get_value().shape)
    total = sum(by_part.values())
    tables = by_part.get("embedding", 0) + by_part.get("positions", 0)
    tables += by_part.get("head", 0) if _is_a_table(model, "head") else 0
    return Parameters(total, total - _idle(model), total - tables, by_part)


def _part(path: tuple, model: nnx.Module) -> str:
    if path[:2] == ("stack", "runs"):
        run, place, kind = model.stack.plan[int(path[2])], int(path[3]), path[4]
        if kind == "mixer":
            return f"mixers.{run.period[place]}"
        return "channel_mixers" if kind == "channel_mixer" else "norms"
    read = "embedding" if _is_a_table(model, "embed") else "input"
    names = {"embed": read, "norm": "norms", "embed_norm": "norms"}
    return names.get(path[0], str(path[0]))


def _is_a_table(model: nnx.Module, name: str) -> bool:
    return isinstance(getattr(model, name, None), nnx.Embed)


def _idle(model: nnx.Module) -> int:
    """Parameters that a token does not use, of mixers that say so (`idle_parameters`)."""
    idle = 0
    for run, blocks in zip(model.stack.plan, model.stack.runs, strict=True):
        for block in blocks:
            for part in (block.mixer, block.channel_mixer):
                count = getattr(part, "idle_parameters", None)
                idle += run.repeats * count() if count is not None else 0
    return idle


def state_bytes(model: nnx.Module, lengths=LENGTHS) -> dict[int, dict[str, int]]:
    """Bytes kept per sequence while decoding, {length: {recurrent, total}}."""
    return {length: model.state_bytes(length) for length in lengths}


def flops_per_token(config: Mapping[str, Any], length: int) -> Flops:
    """Counts what the definitions of the operators compute (their "reference" form), per token.

    Args:
        config: a resolved configuration with `model`, `task` and `data`.
        length: tokens in the sequence; attention's share grows with it.
    """
    node = plain(config["model"])
    if "remat" in node:
        node["remat"] = "none"
    loss, params, batch = _loss(node, _task(config), 1, length)
    with dispatch.counting():
        forward = count_flops(loss, params, batch)
        training = count_flops(jax.value_and_grad(loss), params, batch)
    return Flops(forward.flops / length, training.flops / length)


def memory(config: Mapping[str, Any], length: int) -> Memory:
    """Estimates what training needs, from shapes alone.

    Args:
        config: a resolved configuration.
        length: tokens per row.
    """
    trainer = config["trainer"]
    rows = math.ceil(trainer["global_batch_size"] / (trainer.get("grad_accum_steps") or 1))
    loss, params, batch = _loss(plain(config["model"]), _task(config), rows, length)
    held, pure = _nbytes(params), nnx.as_pure(params)
    optimizer = build(plain(config["optimizer"]))
    mask = jax.tree.map(lambda _: True, pure)
    moments = jax.eval_shape(optimizer.transform(optimizer.hyper(), mask).init, pure)
    averaged = held if trainer.get("ema_decay") else 0
    return Memory(held, held, _nbytes(moments) + averaged, _kept(loss, params, batch))


def _task(config: Mapping[str, Any]) -> Task:
    """The task as training has it: it knows from the data at how many places logits are needed."""
    task = build(plain(config["task"]))
    try:
        return task.for_data(build(plain(config["data"])))
    except DataError:  # files that are not here: of those nothing is known
        return task


def _loss(node: Mapping[str, Any], task: Task, rows: int, length: int):
    """The summed loss as a function of pure parameters and a batch, with both as shapes."""
    graphdef, params, rest = nnx.split(abstract_model(node), nnx.Param, ...)
    batch = {"label": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    shape = (rows, 2, length) if node.get("documents") == 2 else (rows, length)
    if node.get("input_dim") is not None:
        batch["inputs"] = jax.ShapeDtypeStruct((*shape, node["input_dim"]), jnp.float32)
    else:
        batch["tokens"] = batch["targets"] = jax.ShapeDtypeStruct(shape, jnp.int32)

    def loss(params, batch):
        # What is no parameter (constants of a mixer) has no value here: zeros of its shape.
        others = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)
        model = nnx.merge(graphdef, params, others, copy=True)
        found = task.sums(model, batch)
        return found.loss + sum(found.reports.losses.values())

    return loss, params, batch


def _kept(loss, params, batch) -> int:
    """Bytes of what the forward pass keeps for the backward pass, beside the parameters."""
    forward = lambda params, batch: jax.vjp(functools.partial(loss, batch=batch), params)[1]
    jaxpr = jax.make_jaxpr(forward)(params, batch).jaxpr
    given, kept = set(map(id, jaxpr.invars)), {}
    for var in jaxpr.outvars:
        if hasattr(var, "aval") and id(var) not in given:
            kept[id(var)] = math.prod(var.aval.shape) * var.aval.dtype.itemsize
    return sum(kept.values())


def _nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
