"""Every operator call goes through here: inside shard_map over the mesh in force.

GSPMD refuses to partition Pallas calls, so the axes that an operator declares independent (batch,
heads, channels) are cut by hand: each device runs the operator on its part.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.core.axes import SEGMENT_IDS, Letters
from seqzoo.nn.sharding import mesh_in_force, spec_of

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

    def spec(letters: Letters, what: str) -> PartitionSpec:
        # A letter that is no argument's (the w-1 inputs a state keeps) is never cut: any size does.
        # One head is not cut either: of queries, or of keys for all query heads.
        whole = {x for x in "hg" if sizes.get(x) == 1}
        names = [_LOGICAL.get(x) if x in axes.independent - whole else None for x in letters]
        return spec_of(names, [sizes.get(x, 1) for x in letters], mesh, what=f"{what} of {name}")

    arguments = tuple(
        None if array is None else spec(letters, "an argument")
        for letters, array in zip(axes.arguments, args, strict=False)
    )
    state = tuple(spec(letters, "the state") for letters in axes.state)
    state_in = None if initial_state is None else type(initial_state)(*state)
    segments = None if segment_ids is None else spec(SEGMENT_IDS, "segment_ids")
    shapes = jax.eval_shape(call, args, initial_state, segment_ids)
    results = spec(axes.results, "the result")
    out = results
    if axes.state:  # one that looks ahead has none
        out = (results, None if shapes[1] is None else type(shapes[1])(*state))
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(arguments, state_in, segments),
        out_specs=out,
        check_vma=False,
    )(args, initial_state, segment_ids)
