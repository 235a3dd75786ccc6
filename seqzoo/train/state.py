"""What a run carries from step to step, as plain nested dicts of arrays with clean names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from seqzoo.nn.param import Rates, decays, own_rates

Path = tuple[Any, ...]


class TrainState(NamedTuple):
    """Everything that an update reads and writes; a checkpoint is exactly this.

    Attributes:
        step: int32 [], updates so far.
        params: the parameters, float32.
        rest: whatever else the model holds.
        opt_state: the optimizer's.
        ema: moving average of the parameters, or None.
    """

    step: Any
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
    params: nnx.State
    rest: nnx.State


class Abstract:
    """A tree of ShapeDtypeStructs as a key: equal where structure, shapes and shardings are."""

    def __init__(self, tree: Any):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._key = (structure, tuple((a.shape, a.dtype, a.sharding) for a in leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Abstract) and self._key == other._key

    @property
    def shardings(self) -> Any:
        return jax.tree.map(lambda a: a.sharding, self.tree)


def structure_of(make_model) -> Structure:
    """Builds the model abstractly; nothing is allocated.

    Args:
        make_model: `make_model(rngs=...)` gives the module.
    """
    model = nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0)))
    return Structure(*nnx.split(model, nnx.Param, ...))


def arrays_of(model: nnx.Module) -> tuple[Any, Any]:
    """The parameters of a model and everything else that it holds, as plain dicts."""
    split: Any = nnx.split(model, nnx.Param, ...)
    _, params, rest = split
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def merge(graphdef: Any, params: Any, rest: Any) -> nnx.Module:
    """The model with these arrays."""
    return nnx.merge(graphdef, params, rest)


def decayed_paths(structure: Structure) -> tuple[Path, ...]:
    """The paths of the parameters under optimizer.weight_decay: hashable, unlike a tree."""
    flat: Any = nnx.to_flat_state(structure.params)
    shared = lambda variable: (own_rates(variable) or Rates(None, None)).weight_decay is None
    return tuple(path for path, variable in flat if decays(variable) and shared(variable))


def rated_paths(structure: Structure) -> tuple[tuple[Path, Rates], ...]:
    """The paths of the parameters with rates of their own, and those."""
    flat: Any = nnx.to_flat_state(structure.params)
    found = ((path, own_rates(variable)) for path, variable in flat)
    return tuple((path, rates) for path, rates in found if rates is not None)


def decay_mask(params: Mapping[str, Any], decayed: tuple[Path, ...]) -> Any:
    """A tree like params of True and False."""
    chosen = set(decayed)
    return unflatten_dict({path: path in chosen for path in flatten_dict(params)})
