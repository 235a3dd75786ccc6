"""Every operator call goes through here: inside shard_map over the mesh in force.

GSPMD refuses to partition Pallas calls, so the axes that an operator declares independent (batch,
heads, channels) are cut by hand: each device runs the operator on its part. Tokens are cut too
where the mesh says so and the operator has a rule for it (seqzoo/nn/sequence_parallel.py).
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.core.axes import SEGMENT_IDS, Letters
from seqzoo.errors import MeshError
from seqzoo.nn.sequence_parallel import Call, Rule, rule_of
from seqzoo.nn.sharding import axes_over, mesh_in_force, spec_of
from seqzoo.nn.shards import Documents, Shard, last_shard

_LOG = logging.getLogger(__name__)

# Axis letters of operators to the logical names of the mesh rules. Heads of keys that several query
# heads share (g) are cut as those are, or a device would hold heads that do not belong together.
_LOGICAL = {"b": "batch", "e": "inner", "h": "heads", "g": "heads"}


def sharded(
    op: Any,
    *args: jax.Array | None,
    initial_state: Any = None,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Calls `op(*args, ...)` on each device's part of the arguments.

    Args:
        op: an operator with `.axes` (pallas_kernels.core.axes.Axes).
        *args: its arrays, in order; None for optional ones.
        initial_state: its state, a NamedTuple; None = fresh.
        segment_ids: int32 `[b t]` or None.
        **options: everything else, static.

    Returns:
        What the operator returns; without a mesh in force simply that.
    """
    mesh = mesh_in_force()

    def call(args, initial_state, segment_ids):
        # One that takes each token alone knows neither.
        given = dict(initial_state=initial_state, segment_ids=segment_ids)
        return op(*args, **{k: v for k, v in given.items() if v is not None}, **options)

    if mesh is None:
        return call(args, initial_state, segment_ids)

    axes = op.axes
    name = op.__name__
    sizes = {}
    for letters, array in zip(axes.arguments, args, strict=False):
        if array is not None:
            sizes.update(zip(letters, array.shape, strict=True))
    split = _split(op, sizes, options, segment_ids is not None, mesh)

    def spec(letters: Letters, what: str) -> PartitionSpec:
        # A letter that is no argument's (the w-1 inputs a state keeps) is never cut: any size does.
        # One head is not cut either: of queries, or of keys for all query heads.
        whole = {x for x in "hg" if sizes.get(x) == 1}
        names = [_LOGICAL.get(x) if x in axes.independent - whole else None for x in letters]
        if split is not None and what != "segment_ids":
            names = ["length" if x == "t" else name for x, name in zip(letters, names, strict=True)]
        found = spec_of(names, [sizes.get(x, 1) for x in letters], mesh, what=f"{what} of {name}")
        return found if split is None else split.traded(found, letters)

    arguments = tuple(
        None if array is None else spec(letters, "an argument")
        for letters, array in zip(axes.arguments, args, strict=False)
    )
    state = tuple(spec(letters, "the state") for letters in axes.state)
    state_in = None if initial_state is None else type(initial_state)(*state)
    segments = None if segment_ids is None else spec(SEGMENT_IDS, "segment_ids")
    shapes = jax.eval_shape(call, args, initial_state, segment_ids)
    stacked = split is not None and split.rule.trades is None
    out: Any = spec(axes.results, "the result")
    kind = None
    if axes.state:  # one that looks ahead has none
        kind = None if shapes[1] is None else type(shapes[1])
        each = (PartitionSpec(split.axis, *one) for one in state) if stacked else state
        out = (out, None if kind is None else kind(*each))
    local = call if split is None else functools.partial(_on_shard, call, op, options, split)
    found = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(arguments, state_in, segments),
        out_specs=out,
        check_vma=False,
    )(args, initial_state, segment_ids)
    if kind is None or not stacked:
        return found
    y, states = found
    return y, _of_last(states, segment_ids, split.n)


class _Split(NamedTuple):
    """How a row is cut: by which rule, over which mesh axis, in how many parts."""

    rule: Rule
    axis: str
    n: int

    def traded(self, spec: PartitionSpec, letters: Letters) -> PartitionSpec:
        """The letter that a rule trades for time is cut further where there is no time."""
        if self.rule.trades is None or "t" in letters:
            return spec
        more = lambda over: () if over is None else (over,) if isinstance(over, str) else over
        return PartitionSpec(
            *(
                (*more(over), self.axis) if x == self.rule.trades else over
                for x, over in zip(letters, spec, strict=True)
            )
        )


def _split(op, sizes: Mapping[str, int], options, has_ids: bool, mesh) -> _Split | None:
    """How the rows of a call are cut; None = they are whole."""
    over = axes_over("length", mesh)
    n = math.prod(mesh.shape[axis] for axis in over)
    if n == 1 or sizes.get("t", 0) < n:  # a step, or a few tokens, is everybody's
        return None
    if len(over) > 1:
        raise MeshError(f"mesh.rules.length names {list(over)}; tokens are cut over one mesh axis")
    rule = rule_of(op)
    reason = "it has no rule" if rule is None else rule.refuses(sizes, options, has_ids, n)
    if rule is not None and rule.trades is not None:
        inner = axes_over(_LOGICAL[rule.trades], mesh)
        ways = n * math.prod(mesh.shape[axis] for axis in inner)
        if sizes[rule.trades] % ways:
            reason = f"its {sizes[rule.trades]} channels are no multiple of {ways}"
    if reason is not None:
        _gathers(op.__name__, reason)
        return None
    return _Split(rule, over[0], n)


@functools.cache
def _gathers(name: str, reason: str) -> None:
    _LOG.warning("mesh.sequence: %s reads whole rows on every device: %s", name, reason)


def _on_shard(call, op, options, split: _Split, args, state, segment_ids):
    """Inside shard_map: the operator on the tokens here; its state with an axis of devices."""
    letters = op.axes.arguments
    length = next(
        x.shape[axes.index("t")]
        for x, axes in zip(args, letters, strict=False)
        if x is not None and "t" in axes
    )
    shard = Shard(split.axis, split.n, jax.lax.axis_index(split.axis), length)
    none = jnp.zeros((args[0].shape[letters[0].index("b")],), jnp.int32)
    last_id = none if state is None else state.last_id
    count = none if state is None or "count" not in state._fields else state.count
    documents = Documents.of(segment_ids, last_id, count)
    y, after = split.rule.run(Call(call, op.axes, options), args, state, documents, shard)
    if not op.axes.state:
        return y
    if split.rule.trades is None:
        after = jax.tree.map(lambda x: x[None], after)
    return y, after


def _of_last(states: Any, segment_ids: jax.Array | None, n: int) -> Any:
    """Out of the states of all shards `[n b ...]` that behind the last token of each row."""
    if segment_ids is None:
        return jax.tree.map(lambda x: x[-1], states)
    rows = segment_ids.shape[0]
    which = last_shard(segment_ids, rows, n)
    return jax.tree.map(lambda x: x[which, jnp.arange(rows)], states)
