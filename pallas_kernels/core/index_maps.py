"""Evaluating the index maps of a Pallas call over its whole grid at once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class UnknownIndex(ValueError):
    """An index map reads numbers that nobody gave."""


class _NoNumpy(Exception):
    """An operation that the table below does not have."""


def block_indices(
    mapping: Any, grid: tuple[int, ...], prefetched: Sequence[np.ndarray | None] = ()
) -> np.ndarray:
    """The index of the block at each step, int `[steps, axes]`; the last axis of the grid is inner.

    Args:
        mapping: BlockMapping of a pallas_call.
        grid: its steps.
        prefetched: what index maps may read; None where the numbers are not known.

    Raises:
        UnknownIndex: it reads one that is None.
    """
    steps = np.indices(grid).reshape(len(grid), -1).astype(np.int32)
    closed = mapping.index_map_jaxpr
    try:
        found = _run(closed.jaxpr, closed.consts, (*steps, *prefetched), _by_numpy)
    except _NoNumpy:
        found = jax.vmap(
            lambda *at: _run(closed.jaxpr, closed.consts, (*at, *prefetched), _by_jax),
            axis_size=steps.shape[1],
        )(*map(jnp.asarray, steps))
    return np.stack([np.broadcast_to(x, steps.shape[1:]) for x in found], axis=1)


def _run(jaxpr: Any, consts: Sequence, arguments: Sequence, one: Callable) -> list:
    """Evaluates a jaxpr whose references are given as arrays; `one` does an equation."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    value = lambda v: v.val if hasattr(v, "val") else values[v]
    for equation in jaxpr.eqns:
        inputs, params = [value(v) for v in equation.invars], equation.params
        if equation.primitive.name == "get":
            results = [_get(inputs, params, one)]
        elif "jaxpr" in params:
            results = _run(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs, one)
        elif any(x is None for x in inputs):
            raise UnknownIndex("its index map computes with unknown numbers")
        else:
            results = one(equation, inputs)
        values.update(zip(equation.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _get(inputs: list, params: dict[str, Any], one: Callable) -> Any:
    """ref[indices], the reference being an array."""
    array, *leaves = inputs
    if array is None:
        raise UnknownIndex("its index map reads prefetched numbers; give them as an array")
    array = np.asarray(array) if one is _by_numpy else jnp.asarray(array)
    for indexer in jax.tree.unflatten(params["tree"], leaves):
        indices = tuple(getattr(indexer, "indices", indexer))
        if any(not hasattr(x, "dtype") and not isinstance(x, int) for x in indices):
            raise _NoNumpy("a slice") if one is _by_numpy else NotImplementedError("a slice")
        array = array[indices]
    return array


def _by_jax(equation: Any, inputs: list) -> list:
    bound = equation.primitive.get_bind_params(equation.params)
    results = equation.primitive.bind(*inputs, **bound)
    return results if equation.primitive.multiple_results else [results]


def _truncated(a: Any, b: Any) -> Any:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


_NUMPY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _truncated,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sign": np.sign,
    "abs": np.abs,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "select_n": lambda which, *cases: np.choose(np.asarray(which, np.int32), cases),
}


def _by_numpy(equation: Any, inputs: list) -> list:
    """An equation on scalars, done on vectors of them."""
    name = equation.primitive.name
    if name == "convert_element_type":
        return [np.asarray(inputs[0]).astype(equation.params["new_dtype"])]
    if name not in _NUMPY:
        raise _NoNumpy(name)
    return [_NUMPY[name](*map(np.asarray, inputs))]
