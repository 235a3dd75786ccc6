"""Which pieces of which arrays the blocks of a Mosaic GPU call touch, in order, by its traced body.

core/copies.py counts bytes; here every copy keeps its place, so that a model of the second-level
cache (core/second_cache.py) can tell what of it goes through device memory. All blocks of the grid
are walked at once: what differs from block to block (its place in the grid, and what follows from
it) is an array of one number per block, and where a branch hangs on such an array each side is
walked by the blocks that take it.

Whole numbers that pass through scratch memory are followed too: kernels read a constant from there
to hide it from the compiler. So is a zero that comes with data, if it says so (gpu.hidden_zero).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.core import copies, gpu

_READS = ("get", "load", "copy_gmem_to_smem")
_WRITES = ("swap", "copy_smem_to_gmem")
_MOST_TOUCHES = 8_000_000  # by all blocks


class UnknownPlace(ValueError):
    """What a copy touches hangs on numbers that nobody knows before the kernel runs."""


class Touch(NamedTuple):
    """One copy of a body, by the blocks that come to it.

    Attributes:
        array: the operand's or result's number; those that are one array share it.
        starts: along its axes; an array where blocks differ, of one number for each in `blocks`.
        sizes: along its axes.
        reads: whether what was there is needed.
        writes: whether it changes.
        blocks: their numbers in the grid.
    """

    array: int
    starts: tuple[Any, ...]
    sizes: tuple[int, ...]
    reads: bool
    writes: bool
    blocks: np.ndarray


class Touches(NamedTuple):
    """What a call touches.

    Attributes:
        arrays: shape and dtype of what lies in memory, by number.
        threads: of each warpgroup of a block, its copies in order.
        blocks: in the grid; those of a cluster have numbers that follow one another.
        cluster: blocks of a cluster.
    """

    arrays: dict[int, Any]
    threads: list[list[Touch]]
    blocks: int
    cluster: int


def of_call(equation: Any) -> Touches:
    """Follows an `mpmd_map` equation of a jaxpr, which is what plgpu.kernel makes.

    Raises:
        UnknownPlace: where it copies from or to, or how often, cannot be told.
    """
    params = equation.params
    (jaxpr, *_), (mesh, *_) = params["jaxprs"], params["meshes"]
    cluster = tuple(int(n) for n in (getattr(mesh, "cluster", ()) or ()))
    sizes = (*(int(n) for n in (mesh.grid or ())), *cluster)
    names = (*(mesh.grid_names or ()), *(getattr(mesh, "cluster_names", ()) or ()))
    blocks = math.prod(sizes)
    places = np.unravel_index(np.arange(blocks), sizes) if sizes else ()
    axes = {
        name: 0 if size == 1 else place.astype(np.int64)
        for name, size, place in zip(names, sizes, places, strict=True)
    }
    inner = copies.opened(jaxpr)
    given = [id(v) for v in equation.invars]  # what is handed over twice lies there once
    numbers = [given.index(one) for one in given]
    numbers += range(len(numbers), len(inner.invars))
    refs = [_Ref(n) for n in numbers]
    walk = _Walk(axes, blocks)
    threads = []
    for thread in range(int(getattr(mesh, "num_threads", None) or 1)):
        walk.begin({getattr(mesh, "thread_name", None): thread})
        walk.run(jaxpr, refs)
        threads.append(walk.touches)
    arrays = {n: v.aval for n, v in zip(numbers, inner.invars, strict=True)}
    return Touches(arrays, threads, blocks, math.prod(cluster))


class _Ref:
    """An array in memory, by number, or scratch of a block, and the whole numbers put there."""

    def __init__(self, number: int | None = None):
        self.number = number
        self.kept: dict[tuple[int, ...], Any] = {}


class _Walk(copies.Walker):
    """The way of all blocks through a body."""

    def __init__(self, axes: dict[str, Any], blocks: int):
        super().__init__()
        self.grid, self.blocks = axes, blocks
        self.count = 0
        self._wanted: dict[int, bool] = {}
        self._plans: dict[tuple[int, int], list] = {}

    def begin(self, thread: dict[Any, int]) -> None:
        """From the body's start, as one warpgroup of each block."""
        self.axes = {**self.grid, **thread}
        self.touches: list[Touch] = []
        self._here(np.ones(self.blocks, bool))

    def _here(self, mask: np.ndarray) -> None:
        """Blocks that walk on."""
        self.mask, self.all = mask, bool(mask.all())
        self.here = np.flatnonzero(mask)

    def _wants(self, equation: Any) -> bool:
        """Whether it touches memory, or whole numbers in scratch, itself or within."""
        if any(copies.in_memory(v.aval) for v in equation.invars):
            return True
        if equation.primitive.name in ("swap", "addupdate", "copy_gmem_to_smem"):
            return copies.is_whole(equation.invars[0].aval)
        return any(self._inside_wants(x) for x in copies.inside(equation))

    def _inside_wants(self, jaxpr: Any) -> bool:
        inner = copies.opened(jaxpr)
        if id(inner) not in self._wanted:
            self._wanted[id(inner)] = any(map(self._wants, inner.eqns))
        return self._wanted[id(inner)]

    def _equation(self, equation: Any, given: list[Any]) -> list[Any] | None:
        name, params = equation.primitive.name, equation.params
        if name == "axis_index":
            return [self.axes.get(params["axis_name"])]
        if name in ("get", "load", "swap", "addupdate"):
            return self._reference(equation, given)
        if name == "copy_gmem_to_smem":
            given[1].kept.clear()
            self._copy(equation, given, 0, 0, reads=True)
        elif name == "copy_smem_to_gmem":
            before = params["src_transforms_treedef"].num_leaves
            self._copy(equation, given, 1, before, reads=bool(params.get("reduction_op")))
        elif name == "cond":
            return self._cond(params["branches"], given)
        elif name == "scan":
            return self._scan(params, given)
        elif name == "while":
            return self._while(params, given)
        elif name == "run_scoped":  # what it closes over comes as arguments of the equation
            inner = copies.opened(params["jaxpr"])
            return self.run(inner, [_Ref() for _ in inner.invars], given)
        else:
            return self._other(equation, given)
        return None

    def _other(self, equation: Any, given: list[Any]) -> list[Any] | None:
        found = copies.inside(equation)
        if len(found) == 1 and len(copies.opened(found[0]).invars) == len(given):
            return self.run(found[0], given)
        if found or any(isinstance(x, _Ref) and x.number is not None for x in given):
            raise UnknownPlace(f"{equation.primitive.name} is not followed")
        if equation.primitive.name == "convert_element_type" and given[0] is None:
            return [0] if gpu.HIDDEN_ZERO in str(equation.source_info.name_stack) else None
        return _computed(equation, given)

    def _copy(
        self, equation: Any, given: list[Any], operand: int, before: int, reads: bool
    ) -> None:
        """A copy: refs (two, or three with a barrier), then leaves of their transforms."""
        params = equation.params
        key = "dst_transforms_treedef" if operand else "src_transforms_treedef"
        refs = 2
        if not operand:
            refs += params.get("has_barrier", True)
        leaves = given[refs + before : refs + before + params[key].num_leaves]
        mask = self.mask
        if params.get("has_user_predicate") and given[-1] is not None:
            self._here(mask & given[-1])
        self._touch(equation, given[operand], params[key], leaves, reads, bool(operand))
        if self.mask is not mask:
            self._here(mask)

    def _reference(self, equation: Any, given: list[Any]) -> list[Any] | None:
        name, tree, (ref, *rest) = equation.primitive.name, equation.params["tree"], given
        is_read = name in ("get", "load")
        leaves = tuple(rest if is_read else rest[1:])
        if ref.number is not None:
            self._touch(equation, ref, tree, leaves, name != "swap", not is_read)
            return None
        single = equation.invars[1].aval.shape == () if not is_read else copies.is_scalar(equation)
        at = leaves if all(isinstance(x, int) for x in leaves) else None
        if is_read:
            return [ref.kept.get(at)] if single and at is not None else None
        new = rest[0] if name == "swap" and single and at is not None else None
        if new is None or not self.all and at not in ref.kept:
            ref.kept.clear()
        else:
            ref.kept[at] = new if self.all else _merged(self.mask, new, ref.kept[at])
        return None

    def _touch(
        self, equation: Any, ref: _Ref, tree: Any, leaves: Any, reads: bool, writes: bool
    ) -> None:
        aval = equation.invars[1 if equation.primitive.name == "copy_smem_to_gmem" else 0].aval
        starts, sizes = [0] * len(aval.shape), list(aval.shape)
        for axis, start, size in self._plan(equation, tree, len(aval.shape)):
            at = leaves[start.leaf] if isinstance(start, _Leaf) else start
            if at is None:
                raise UnknownPlace(f"where along axis {axis} of {aval} it copies is not known")
            starts[axis], sizes[axis] = starts[axis] + at, size
        ndarray = np.ndarray
        if not self.all:
            starts = [x[self.here] if isinstance(x, ndarray) else x for x in starts]
        self.count += len(self.here)
        if self.count > _MOST_TOUCHES:
            raise UnknownPlace(f"more than {_MOST_TOUCHES:,} copies")
        assert ref.number is not None
        self.touches.append(
            Touch(ref.number, tuple(starts), tuple(sizes), reads, writes, self.here)
        )

    def _plan(self, equation: Any, tree: Any, rank: int) -> list[tuple[int, Any, int]]:
        """What the indexers of a reference do: axis, start (or the leaf that has it), size."""
        key = (id(equation), id(tree))
        if key in self._plans:
            return self._plans[key]
        plan: list[tuple[int, Any, int]] = []
        axes = list(range(rank))
        leaves = [_Leaf(i) for i in range(tree.num_leaves)]
        for one in jax.tree.unflatten(tree, leaves):
            if not hasattr(one, "get_indexer_shape"):
                raise UnknownPlace(f"{type(one).__name__} of a reference is not followed")
            left = []
            for axis, index in zip(axes, one.indices, strict=True):
                if not isinstance(index, pl.Slice):
                    plan.append((axis, index, 1))
                    continue
                if not isinstance(index.size, int) or index.stride != 1 and index.size != 1:
                    raise UnknownPlace("slices with strides, or of no fixed size, are not followed")
                plan.append((axis, index.start, index.size))
                left.append(axis)
            axes = left
        self._plans[key] = plan
        return plan

    def _cond(self, branches: Sequence[Any], given: list[Any]) -> list[Any]:
        which, operands = given[0], given[1:]
        if which is None:
            return self._dearest(branches, operands)
        if not isinstance(which, np.ndarray):
            return self.run(branches[min(max(int(which), 0), len(branches) - 1)], operands)
        mask, results = self.mask, None
        for i, branch in enumerate(branches):
            mine = mask & (np.clip(which.astype(np.int64), 0, len(branches) - 1) == i)
            if not mine.any():
                continue
            self._here(mine)
            found = self.run(branch, operands)
            pairs = zip(found, results or found, strict=True)
            results = [_merged(mine, new, old) for new, old in pairs]
        self._here(mask)
        return results or []

    def _dearest(self, branches: Sequence[Any], operands: list[Any]) -> list[Any]:
        """Of branches that nobody can choose between the one that moves most."""
        before, tried, found = self.touches, [], []
        for branch in branches:
            self.touches = []
            found.append(self.run(branch, operands))
            tried.append(self.touches)
        most = max(tried, key=lambda some: sum(math.prod(t.sizes) * len(t.blocks) for t in some))
        self.touches = [*before, *most]
        is_array = lambda x: isinstance(x, np.ndarray)
        same = lambda x, y: x is y or not (is_array(x) or is_array(y)) and x == y
        each = zip(*found, strict=True)
        return [some[0] if all(same(x, some[0]) for x in some) else None for some in each]

    def _scan(self, params: dict, given: list[Any]) -> list[Any] | None:
        inner, length = params["jaxpr"], params["length"]
        same, carried = copies.scan_groups(params)
        consts, carry = given[:same], given[same : same + carried]
        slices = len(copies.opened(inner).invars) - same - carried
        if length > 64 and not self._inside_wants(inner):
            return None
        for _ in range(length):
            carry = self.run(inner, [*consts, *carry, *[None] * slices])[:carried]
        return carry

    def _while(self, params: dict, given: list[Any]) -> list[Any] | None:
        skip, same = params["cond_nconsts"], params["body_nconsts"]
        first, consts, carry = given[:skip], given[skip : skip + same], given[skip + same :]
        if not self._inside_wants(params["body_jaxpr"]):
            return None
        mask = self.mask
        while True:
            (go,) = self.run(params["cond_jaxpr"], [*first, *carry])
            if go is None:
                raise UnknownPlace("how often a loop runs is not known")
            going = self.mask & go
            if not going.any():
                break
            self._here(going)
            found = self.run(params["body_jaxpr"], [*consts, *carry])
            carry = [_merged(going, new, old) for new, old in zip(found, carry, strict=True)]
        self._here(mask)
        return carry


class _Leaf(NamedTuple):
    """The place of a number among the leaves of a reference's indexers."""

    leaf: int


def _merged(mask: np.ndarray, new: Any, old: Any) -> Any:
    """What blocks of the mask know anew, and the others of old."""
    if new is old or mask.all():
        return new
    if new is None or old is None or isinstance(new, _Ref) or isinstance(old, _Ref):
        return None
    return np.where(mask, new, old)


def _divided(x: Any, y: Any) -> Any:
    return np.trunc(x / np.where(y == 0, 1, y)).astype(np.int64)


_ON_ARRAYS: dict[str, Callable] = {
    "max": np.maximum,
    "min": np.minimum,
    "not": np.invert,
    "sign": np.sign,
    "abs": np.abs,
    "neg": np.negative,
    "div": _divided,
    "rem": lambda x, y: np.fmod(x, np.where(y == 0, 1, y)),
    "select_n": lambda which, *cases: np.choose(np.asarray(which, np.int64), cases),
    "clamp": lambda low, x, high: np.clip(x, low, high),
}


def _computed(equation: Any, given: list[Any]) -> list[Any] | None:
    """Whole numbers, of each block for itself where they differ."""
    name = equation.primitive.name
    if not any(isinstance(x, np.ndarray) for x in given):
        return copies.computed(name, equation, [None if isinstance(x, _Ref) else x for x in given])
    if any(x is None or isinstance(x, _Ref) for x in given):
        return None
    if name == "convert_element_type":
        is_bool = equation.params["new_dtype"] == np.bool_
        return [given[0].astype(bool if is_bool else np.int64)]
    if name in copies.SAME:
        return [given[0]]
    rule = _ON_ARRAYS.get(name) or copies.ARITHMETIC.get(name)
    return None if rule is None else [rule(*given)]
