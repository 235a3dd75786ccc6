"""What a run carries from step to step, as pure trees of arrays with clean names."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from seqzoo.nn.param import decays


class TrainState(NamedTuple):
    """Everything that an update reads and writes; a checkpoint is exactly this.

    Attributes:
        step: int32 [], updates so far.
        params: the parameters, float32.
        rest: whatever else the model holds.
        opt_state: the optimizer's.
        ema: moving average of the parameters, or None.
    """

    step: jax.Array
    params: Any
    rest: Any
    opt_state: Any
    ema: Any


class Structure(NamedTuple):
    """A model without its arrays.

    Attributes:
        graphdef: its static part.
        params: its parameters as variables of abstract arrays, with what they declare.
        rest: the same of everything else.
    """

    graphdef: Any
    params: Any
    rest: Any


def structure_of(make_model) -> Structure:
    """Builds the model abstractly; nothing is allocated.

    Args:
        make_model: `make_model(rngs=...)` gives the module.
    """
    model = nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0)))
    return Structure(*nnx.split(model, nnx.Param, ...))


def decayed_paths(structure: Structure) -> tuple[tuple, ...]:
    """The paths of the parameters under weight decay: hashable, unlike a tree."""
    flat = nnx.to_flat_state(structure.params)
    return tuple(path for path, variable in flat if decays(variable))


def decay_mask(params: Any, decayed: tuple[tuple, ...]) -> Any:
    """A tree like params of True and False."""
    chosen = set(decayed)
    return nnx.from_flat_state(
        [(path, path in chosen) for path, _ in nnx.to_flat_state(params)]
    )


def merge(graphdef: Any, params: Any, rest: Any) -> nnx.Module:
    """The model with these arrays; changes to it stay in it."""
    return nnx.merge(graphdef, params, rest, copy=True)
