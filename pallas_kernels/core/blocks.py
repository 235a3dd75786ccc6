"""What one Pallas call moves between memory and chip, by the arithmetic of its BlockSpecs.

The pipeline of a kernel copies a block when the block's index changes between one step of the grid
and the next, and leaves it where it is otherwise; results are written when their index changes, and
at the end. So the bytes follow from the grid, the block shapes and the index maps alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.core.index_maps import UnknownIndex, block_indices


class Kernel(NamedTuple):
    """What a Pallas call moves.

    Attributes:
        name: the call's.
        grid: its steps.
        read: bytes from memory.
        written: bytes to memory.
        times: how often it runs (in a loop).
        body: of a GPU kernel its equation in the jaxpr (core/second_cache.py follows it again).
    """

    name: str
    grid: tuple[int, ...]
    read: float
    written: float
    times: int = 1
    body: Any = None

    @property
    def bytes(self) -> float:
        return self.times * (self.read + self.written)


def of_call(equation: Any, prefetched: Sequence[np.ndarray | None]) -> Kernel:
    """Counts a pallas_call equation of a jaxpr.

    Operands that are not cut into blocks (memory space ANY or HBM) count as read, or written, once:
    what a body copies by hand is not seen.

    Args:
        equation: of the jaxpr.
        prefetched: its scalar-prefetched arrays, None where the numbers are not known.

    Raises:
        UnknownIndex: an index map reads an array that is None.
    """
    mapping, name = equation.params["grid_mapping"], _name(equation.params)
    grid = tuple(int(size) for size in mapping.grid)
    count = mapping.num_index_operands
    read = float(sum(_bytes(v.aval) for v in equation.invars[:count]))
    written = 0.0
    for place, one in enumerate(mapping.block_mappings):
        try:
            moved = _moved(one, grid, prefetched)
        except UnknownIndex as error:
            raise UnknownIndex(f"{name}, operand {place}: {error}") from None
        if place < mapping.num_inputs:
            read += moved
        else:
            written += moved
    return Kernel(name, grid, read, written)


def _moved(mapping: Any, grid: tuple[int, ...], prefetched: Sequence[np.ndarray | None]) -> float:
    array = mapping.array_aval
    space = str(getattr(mapping.transformed_block_aval, "memory_space", "")).lower()
    if space in ("any", "hbm"):
        return _bytes(array)
    if not math.prod(grid):
        return 0.0
    at = block_indices(mapping, grid, prefetched)
    changes = np.ones(len(at), bool)
    changes[1:] = np.any(at[1:] != at[:-1], axis=1)
    numbers = np.ones(int(changes.sum()))
    dims = zip(mapping.block_shape, array.shape, at[changes].T, strict=True)
    for block, size, index in dims:
        extent, by_element = _extent(block)
        begin = index if by_element else index * extent
        # A block that hangs over the end moves what is there.
        numbers *= np.clip(size - begin, 0, extent)
    return float(numbers.sum()) * array.dtype.itemsize


def _extent(block: Any) -> tuple[int, bool]:
    """Size of a block along an axis, and whether its index counts elements rather than blocks."""
    if block is None:
        return 1, False
    if isinstance(block, int):
        return block, False
    kind = type(block).__name__
    if kind == "Squeezed":
        return 1, False
    return int(block.block_size), kind in ("Element", "BoundedSlice")


def _name(params: dict[str, Any]) -> str:
    return params.get("name") or params["jaxpr"].debug_info.func_name


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape)) * aval.dtype.itemsize
