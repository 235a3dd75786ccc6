"""Where copies into tiles of shared memory begin, looked at while kernels are lowered for a GPU.

The copy engine (TMA) takes row r of an array in tiles of 8 as coordinates (r // 8, r % 8), and a
box counts along each: one that begins at r % 8 = 3 gets rows 3 to 7 of its tiles and zeros behind
them. jax sees to it where it searches for layouts itself (Warpgroup semantics), not in bodies with
Lane semantics, and its interpreter copies plain rows: a kernel would pass every test on a CPU and
read zeros on the device. Hence

    with copy_starts.checked():
        lowered = jax.jit(function).lower(*shapes)

The starts are in the hands of private functions of jax. Where those are not what is known here,
that breaks the check as well: nothing passes unseen.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax.experimental.mosaic.gpu import launch_context, utils
from jaxlib.mlir import ir

_DEPTH = 30  # operations that a start is followed through
_NOT_SEEN = "nobody can see where copies begin; teach core/copy_starts.py this jax"


class MisplacedCopy(Exception):
    """A copy may begin within a tile, or nobody can tell."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Looks at every copy between device memory and tiles, either way, that is lowered inside.

    Raises:
        MisplacedCopy: at the end, with kernel, array and dimension of each copy whose start is not
            known to be a multiple of its tile.
    """
    context = getattr(launch_context, "LaunchContext", None)
    tiles = getattr(launch_context, "TileTransform", None)
    prepare = getattr(context, "_prepare_async_copy", None)
    index = getattr(tiles, "transform_index", None)
    if not (prepare and index and hasattr(utils, "is_known_divisible")):
        names = "LaunchContext._prepare_async_copy, TileTransform.transform_index or"
        raise MisplacedCopy(f"jax has no {names} is_known_divisible: {_NOT_SEEN}")
    found: dict[str, None] = {}
    copies: list[tuple[Any, Any]] = []  # array and slice of the one that is prepared now

    def preparing(self: Any, gmem_ref: Any, gmem_slice: Any, *more: Any, **named: Any) -> Any:
        copies.append((gmem_ref, gmem_slice))
        try:
            return prepare(self, gmem_ref, gmem_slice, *more, **named)
        finally:
            copies.pop()

    def indexing(self: Any, starts: Any) -> Any:
        try:
            found.update(dict.fromkeys(_misplaced(*copies[-1], starts, self.tiling)))
        except Exception as error:  # a NotImplementedError would pass for the kernel's refusal
            found[f"{_NOT_SEEN}: {error!r}"] = None
        return index(self, starts)

    context._prepare_async_copy, tiles.transform_index = preparing, indexing  # type: ignore[union-attr]
    try:
        yield
    finally:
        context._prepare_async_copy, tiles.transform_index = prepare, index  # type: ignore[union-attr]
    if found:
        raise MisplacedCopy("; ".join(found))


def _misplaced(array: Any, slices: Any, starts: Any, tile: Any) -> Iterator[str]:
    """What stands against each of the last `starts`, those along the tile's dimensions."""
    shape = list(ir.MemRefType(array.type).shape)
    single = (int, ir.Value, ir.OpView, ir.Operation)
    sliced = [d for d in range(len(shape)) if d >= len(slices) or not isinstance(slices[d], single)]
    n = len(tile)
    for dimension, start, size in zip(sliced[-n:], starts[-n:], tile, strict=True):
        if not utils.is_known_divisible(start, size, _DEPTH):
            yield (
                f"{_kernel()}: a copy of {shape} into tiles of {tuple(tile)} begins along "
                f"dimension {dimension} at what may be no multiple of {size}: rows would be zeros "
                f"on the device; begin at i * {size}, or have XLA bring the rows to tiles first"
            )


def _kernel() -> str:
    """The kernel that is being lowered, by the name of its module."""
    operation = ir.InsertionPoint.current.block.owner
    while operation.parent is not None:
        operation = operation.parent
    return ir.StringAttr(operation.attributes["sym_name"]).value
