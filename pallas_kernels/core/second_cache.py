"""Bytes of a Mosaic GPU call that go through device memory: a model of the second-level cache.

What blocks ask for (core/copies.py) goes through the second-level cache first; a piece that lies
there is not fetched again, and one that is written over and over is stored once. The model is small
and, where it does not know, counts more bytes rather than fewer:

- Blocks start in the order of the grid, as many at once as the device has room for, the next when
  one ends (clusters as a whole). They walk in step, one copy a turn; the warpgroups of a block and
  the blocks of a cluster, which wait for one another, spread their copies evenly over its turns.
- An H200 has 50 MiB in two halves, each of which holds what its own half of the processors asked
  for (blocks take turns): private data lie there once, shared data twice. Counted on are 20 MiB of
  each 25, as other data come by and pieces may not lie anywhere. What was not used for longest is
  dropped first.
- A read of what lies in neither half counts, in pieces of at least a sector. What is written counts
  when it is dropped, or at the end: results and scratch alike, read later or not.
- Each call finds the cache empty, though what the call before wrote may still be there.
"""

import collections
import heapq
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.core import touches
from pallas_kernels.core.touches import Touch, Touches, UnknownPlace

PROCESSORS, SECTOR = 132, 32
HALF = 20 * 2**20  # bytes that a kernel can count on
# Of a multiprocessor (Hopper); a block takes 1 KiB of shared memory for itself.
REGISTERS, SHARED, THREADS, PER_BLOCK = 65_536, 233_472, 2048, 1024
_MOST_PIECES = 40_000_000
_READS, _WRITES = 1, 2


class ThroughMemory(NamedTuple):
    """What goes through device memory.

    Attributes:
        arrays: shape and dtype of each array that is touched, and its bytes read and written.
    """

    arrays: tuple[tuple[Any, int, int], ...]

    @property
    def read(self) -> int:
        return sum(read for _, read, _ in self.arrays)

    @property
    def written(self) -> int:
        return sum(written for _, _, written in self.arrays)

    @property
    def bytes(self) -> int:
        return self.read + self.written


def of_call(
    equation: Any, *, registers: int | None = None, shared: int | None = None
) -> ThroughMemory | None:
    """Counts an `mpmd_map` equation of a jaxpr; None where its copies cannot be followed.

    Args:
        equation: as core/copies.py takes it.
        registers: per thread.
        shared: bytes of shared memory per block; with both, more than one block may share a
            multiprocessor.
    """
    try:
        found = touches.of_call(equation)
        threads = 128 * len(found.threads)
        return through(found, at_once=PROCESSORS * residents(threads, registers, shared))
    except UnknownPlace:
        return None


def residents(threads: int, registers: int | None, shared: int | None) -> int:
    """Blocks that one multiprocessor holds; one where it is not known."""
    if not registers or shared is None:
        return 1
    room = (
        REGISTERS // (threads * 8 * math.ceil(registers / 8)),
        SHARED // (shared + PER_BLOCK),
        THREADS // threads,
    )
    return max(1, min(room))


def through(found: Touches, *, at_once: int = PROCESSORS, half: int = HALF) -> ThroughMemory:
    """Runs the model.

    Args:
        found: what a call touches.
        at_once: blocks that run at the same time.
        half: bytes of each half of the cache.

    Raises:
        UnknownPlace: copies fall into too many pieces.
    """
    pieces = _Pieces(found)
    sizes, whose = pieces.sizes.tolist(), pieces.whose.tolist()
    read, written = collections.Counter[int](), collections.Counter[int]()
    # What lies in a half, the longest unused first, and whether it is yet to be stored.
    caches: tuple[collections.OrderedDict[int, bool], ...]
    caches = (collections.OrderedDict(), collections.OrderedDict())
    used = [0, 0]
    for piece, kind, side in pieces.inorder(*_order(found, at_once)):
        mine, other = caches[side], caches[1 - side]
        changed = mine.pop(piece, None)
        if changed is None:
            size = sizes[piece]
            used[side] += size
            if kind & _READS and piece not in other:
                read[whose[piece]] += size
            while used[side] > half and mine:
                old, stored = mine.popitem(last=False)
                used[side] -= sizes[old]
                if stored:
                    written[whose[old]] += sizes[old]
        if kind & _WRITES:
            changed = True
            if other.pop(piece, None) is not None:
                used[1 - side] -= sizes[piece]
        mine[piece] = bool(changed)
    for piece, changed in (*caches[0].items(), *caches[1].items()):
        written[whose[piece]] += sizes[piece] if changed else 0
    touched = sorted({*whose})
    return ThroughMemory(tuple((found.arrays[n], read[n], written[n]) for n in touched))


def _order(found: Touches, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of all blocks' copies, of a list of them thread by thread; and whose half it is."""
    turns = np.zeros((len(found.threads), found.blocks), np.int64)
    places = []
    for turn, thread in zip(turns, found.threads, strict=True):
        for touch in thread:
            places.append(turn[touch.blocks])
            turn[touch.blocks] += 1
    lengths = turns.max(axis=0, initial=0).reshape(-1, found.cluster).max(axis=1)
    begins, sides = _begins(lengths, max(1, at_once // found.cluster))
    ends, begins, sides = (np.repeat(x, found.cluster) for x in (lengths, begins, sides))
    keys, blocks = [np.zeros(0)], [np.zeros(0, np.int64)]
    places.reverse()
    for turn, thread in zip(turns, found.threads, strict=True):
        pace = ends / np.maximum(turn, 1)
        for touch in thread:
            keys.append(begins[touch.blocks] + places.pop() * pace[touch.blocks])
            blocks.append(touch.blocks)
    which = np.concatenate(blocks)
    order = np.lexsort((which, np.concatenate(keys)))
    return order, sides[which[order]]


def _begins(lengths: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """When each cluster starts, and in which half of the processors."""
    free = [(0, place) for place in range(at_once)]
    begins = []
    for length in lengths.tolist():
        begins.append(heapq.heappop(free))
        heapq.heappush(free, (begins[-1][0] + length, begins[-1][1]))
    found = np.array(begins, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1] % 2


class _Pieces:
    """Every array cut wherever a copy of it begins or ends, so that copies are of whole pieces.

    Attributes:
        sizes: bytes of each piece.
        whose: the number of its array.
    """

    def __init__(self, found: Touches):
        every = [touch for thread in found.threads for touch in thread]
        ends = np.cumsum([0, *(len(t.blocks) for t in every)])
        kinds = [_READS * t.reads + _WRITES * t.writes for t in every]
        self.kinds = np.repeat(np.array(kinds, np.int64), np.diff(ends))
        # Of each copy where its pieces stand in `cells`, and how many they are.
        self.first, self.counts = np.zeros_like(self.kinds), np.zeros_like(self.kinds)
        self.cells, self.sizes, self.whose = (np.zeros(0, np.int64) for _ in range(3))
        of: dict[int, list[int]] = {}
        for i, touch in enumerate(every):
            of.setdefault(touch.array, []).append(i)
        for number, mine in of.items():
            boxes = np.concatenate([_boxes(every[i], found.arrays[number]) for i in mine], axis=1)
            at = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in mine])
            self._cut(number, found.arrays[number], boxes, at)

    def _cut(self, number: int, aval: Any, boxes: np.ndarray, at: np.ndarray) -> None:
        """Pieces of one array; boxes are [ends and axes, copies]."""
        distinct, which = _distinct(boxes)
        begins, ends = distinct[: len(boxes) // 2], distinct[len(boxes) // 2 :]
        cuts = [np.unique(both) for both in zip(begins, ends, strict=True)]
        begins = np.array([np.searchsorted(c, x) for c, x in zip(cuts, begins, strict=True)])
        ends = np.array([np.searchsorted(c, x) for c, x in zip(cuts, ends, strict=True)])
        counts = np.prod(ends - begins, axis=0)
        if counts[which].sum() > _MOST_PIECES:
            raise UnknownPlace("copies of many kinds cut an array into too many pieces")
        # Places of each box's pieces among all, row by row.
        rest, cells, step = _inner(counts), np.zeros(counts.sum(), np.int64), 1
        for axis in reversed(range(len(cuts))):
            long = np.repeat(ends[axis] - begins[axis], counts)
            cells += step * (np.repeat(begins[axis], counts) + rest % long)
            rest, step = rest // long, step * max(1, len(cuts[axis]) - 1)
        kept, cells = np.unique(cells, return_inverse=True)
        shape = [max(1, len(c) - 1) for c in cuts]
        places = zip(cuts, np.unravel_index(kept, shape), strict=True)
        sizes = np.prod([np.diff(c)[i] for c, i in places], axis=0) * aval.dtype.itemsize
        self.first[at] = len(self.cells) + (np.cumsum(counts) - counts)[which]
        self.counts[at] = counts[which]
        self.cells = np.concatenate([self.cells, cells.reshape(-1) + len(self.sizes)])
        self.sizes = np.concatenate([self.sizes, sizes])
        self.whose = np.concatenate([self.whose, np.full(len(kept), number)])

    def inorder(self, order: np.ndarray, sides: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Each piece that is touched, what is done to it, and the half of who does it."""
        counts = self.counts[order]
        pieces = self.cells[np.repeat(self.first[order], counts) + _inner(counts)]
        kinds, sides = np.repeat(self.kinds[order], counts), np.repeat(sides, counts)
        return zip(pieces.tolist(), kinds.tolist(), sides.tolist(), strict=True)


def _inner(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... of each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _boxes(touch: Touch, aval: Any) -> np.ndarray:
    """Where each block's copy begins along the axes, then where it ends: whole sectors.

    Axes of one element are left out.
    """
    axes = [axis for axis, size in enumerate(aval.shape) if size > 1] or [0]
    shape = np.array([aval.shape[axis] if aval.shape else 1 for axis in axes])
    boxes = np.zeros((2, len(axes), len(touch.blocks)), np.int64)
    for i, axis in enumerate(axes if aval.shape else ()):
        boxes[:, i] = touch.starts[axis]
        boxes[1, i] += touch.sizes[axis]
    sector = max(1, SECTOR // aval.dtype.itemsize)
    boxes[0, -1] = boxes[0, -1] // sector * sector
    boxes[1, -1] = -(-boxes[1, -1] // sector) * sector
    return np.clip(boxes, 0, shape[:, None]).reshape(2 * len(axes), -1)


def _distinct(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes that differ, and which of them each is."""
    key = np.zeros(boxes.shape[1], np.int64)
    for row in boxes:
        values, at = np.unique(row, return_inverse=True)
        if len(values) > 1:  # numbers anew, so that they stay small
            key = np.unique(key * len(values) + at.reshape(-1), return_inverse=True)[1].reshape(-1)
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    return boxes[:, first], which.reshape(-1)
