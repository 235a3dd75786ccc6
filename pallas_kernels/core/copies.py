"""What one Mosaic GPU call moves between memory and chip, counted in its traced body.

The copies are written out in the body (`copy_gmem_to_smem`, `copy_smem_to_gmem`, the loops that
`emit_pipeline` makes of them, reads and writes of a reference in memory), so the bytes follow from
their shapes, the trip counts around them, the warpgroups and the grid. Whole numbers are followed
through the body, so that a branch on a loop's index is taken as often as it is; where one hangs on
the block's place in the grid, blocks are walked one by one (of many, a sample). Of loops that are
too long to follow, the first and last turns are, and some in the middle for the rest.

What another block reads again counts again, whether or not it is still in the second-level cache:
core/second_cache.py tells what of it goes through device memory.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.core.blocks import Kernel

_MOST_BLOCKS = 48  # walked one by one
_MOST_STEPS = 60_000  # equations of a walk
_ENDS, _MIDDLE = 2, 8  # turns of a long loop that are followed, at each end and in the middle
ARITHMETIC: dict[str, Callable] = {
    **dict(add=operator.add, sub=operator.sub, mul=operator.mul, max=max, min=min),
    **dict(lt=operator.lt, le=operator.le, gt=operator.gt, ge=operator.ge),
    **{"eq": operator.eq, "ne": operator.ne, "and": operator.and_, "or": operator.or_},
    **{"xor": operator.xor, "neg": operator.neg, "abs": abs},
    "not": lambda x: not x if isinstance(x, bool) else ~x,
    "div": lambda x, y: int(math.trunc(x / y)) if y else 0,
    "rem": lambda x, y: int(math.fmod(x, y)) if y else 0,
    "sign": lambda x: (x > 0) - (x < 0),
    "select_n": lambda which, *cases: cases[int(which)],
    "clamp": lambda low, x, high: min(max(x, low), high),
    "shift_left": operator.lshift,
    "shift_right_logical": operator.rshift,
    "shift_right_arithmetic": operator.rshift,
}
SAME = ("copy", "squeeze", "reshape", "broadcast_in_dim", "stop_gradient", "pvary")


class UnknownBody(ValueError):
    """A body that is too long to follow."""


def of_call(equation: Any) -> Kernel:
    """Counts an `mpmd_map` equation of a jaxpr, which is what plgpu.kernel makes.

    Raises:
        UnknownBody: its loops are too long to follow.
    """
    params = equation.params
    (jaxpr, *_), (mesh, *_) = params["jaxprs"], params["meshes"]
    grid = tuple(int(n) for n in (mesh.grid or ()))
    cluster = tuple(int(n) for n in (getattr(mesh, "cluster", ()) or ()))
    names = (*(mesh.grid_names or ()), *(getattr(mesh, "cluster_names", ()) or ()))
    sizes = (*grid, *cluster)
    blocks = math.prod(sizes)
    threads = int(getattr(mesh, "num_threads", None) or 1)
    name = params.get("name") or "kernel"

    def walked(cells: Iterable[tuple[int, ...]] | None) -> tuple[float, float, bool]:
        try:
            return exactly(cells, False)
        except UnknownBody:
            return exactly(cells, True)

    def exactly(cells: Any, sampled: bool) -> tuple[float, float, bool]:
        read = written = 0.0
        unsure = False
        for cell in cells if cells is not None else [None]:
            for thread in range(threads):
                known = {} if cell is None else dict(zip(names, cell, strict=True))
                if getattr(mesh, "thread_name", None):
                    known[mesh.thread_name] = thread
                walk = _Walk(known, dict(zip(names, sizes, strict=True)), sampled)
                walk.run(jaxpr, [None] * len(opened(jaxpr).invars))
                read, written = read + walk.read, written + walk.written
                unsure, steps[0] = unsure or walk.unsure, max(walk.steps, 1)
        return read, written, unsure

    steps = [1]  # of a walk
    read, written, unsure = walked(None)
    share: float = blocks
    if unsure and sizes:
        cells = _cells(sizes, max(3, min(_MOST_BLOCKS, _MOST_STEPS // (threads * steps[0]))))
        read, written, _ = walked(cells)
        share = blocks / len(cells)
    return Kernel(name, sizes or (1,), read * share, written * share, body=equation)


def _cells(sizes: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Places in a grid: all of a small one, else some that lie evenly and yet out of step."""
    total = math.prod(sizes)
    if total <= most:
        at: Any = range(total)
    else:
        at = sorted({int(total * (i * 0.6180339887498949 % 1)) for i in range(most)})
    return [tuple(int(x) for x in np.unravel_index(i, sizes)) for i in at]


class Walker:
    """Follows whole numbers through a body; what an equation does is told by who inherits."""

    def __init__(self) -> None:
        self._useful: dict[int, list] = {}

    def run(self, jaxpr: Any, given: Sequence[Any], consts: Sequence[Any] = ()) -> list[Any]:
        """Walks a jaxpr with what is known of its arguments; gives what is known of its results."""
        consts = consts or [whole(x) for x in getattr(jaxpr, "consts", ())]
        jaxpr = opened(jaxpr)
        known = dict(zip(jaxpr.constvars, consts, strict=False))
        known.update(zip(jaxpr.invars, given, strict=True))
        value = lambda v: whole(v.val) if hasattr(v, "val") else known.get(v)
        for equation in self._of_use(jaxpr):
            found = self._equation(equation, [value(v) for v in equation.invars])
            if found is not None:
                known.update(zip(equation.outvars, found, strict=False))
        return [value(v) for v in jaxpr.outvars]

    def _of_use(self, jaxpr: Any) -> list:
        """The equations that make whole numbers, or that are wanted."""
        if id(jaxpr) not in self._useful:
            kept = [e for e in jaxpr.eqns if is_scalar(e) or self._wants(e)]
            self._useful[id(jaxpr)] = kept
        return self._useful[id(jaxpr)]

    def _wants(self, equation: Any) -> bool:
        raise NotImplementedError

    def _equation(self, equation: Any, given: list[Any]) -> list[Any] | None:
        """What is known of its results."""
        raise NotImplementedError


class _Walk(Walker):
    """One warpgroup's way through a body: bytes read and written."""

    def __init__(self, axes: dict[str, int], sizes: dict[str, int], sampled: bool):
        super().__init__()
        self.axes, self.sizes, self.sampled = axes, sizes, sampled
        self.read = self.written = 0.0
        self.unsure = False
        self.steps = 0
        self._moving: dict[int, bool] = {}

    def _wants(self, equation: Any) -> bool:
        return _moves(equation)

    def _inside_moves(self, jaxpr: Any) -> bool:
        key = id(opened(jaxpr))
        if key not in self._moving:
            self._moving[key] = any(map(_moves, opened(jaxpr).eqns))
        return self._moving[key]

    def _equation(self, equation: Any, given: list[Any]) -> list[Any] | None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise UnknownBody("the loops of a kernel's body are too long to follow")
        name, params = equation.primitive.name, equation.params
        if name == "axis_index":
            return [self.axes.get(params["axis_name"])]
        if name == "copy_gmem_to_smem":
            share = self._cluster(params.get("collective_axes"))
            self.read += _side(equation, 0, params["src_transforms_treedef"]) / share
        elif name == "copy_smem_to_gmem":
            self.written += _side(equation, 1, params["dst_transforms_treedef"])
        elif name in ("get", "swap", "addupdate", "masked_load", "masked_swap", "load"):
            self._reference(name, equation)
        elif name == "cond":
            return self._cond(params["branches"], given)
        elif name == "scan":
            return self._scan(params, given)
        elif name == "while":
            return self._while(params, given)
        elif name == "run_scoped":  # what it closes over comes as arguments of the equation
            inner = opened(params["jaxpr"])
            return self.run(inner, [None] * len(inner.invars), given)
        else:
            inside = [x for x in map(_jaxpr, params.values()) if x is not None]
            if len(inside) == 1 and len(opened(inside[0]).invars) == len(given):
                return self.run(inside[0], given)
            for one in inside:
                self.run(one, [None] * len(opened(one).invars))
            if not inside:
                return computed(name, equation, given)
        return None

    def _cluster(self, axes: Any) -> int:
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        return math.prod(self.sizes.get(name, 1) for name in names)

    def _reference(self, name: str, equation: Any) -> None:
        if not in_memory(equation.invars[0].aval):
            return
        if name in ("get", "load", "masked_load"):
            self.read += _bytes(equation.outvars[0].aval)
        else:
            self.written += _bytes(equation.invars[1].aval)
            self.read += _bytes(equation.invars[1].aval) if name == "addupdate" else 0.0

    def _cond(self, branches: Sequence[Any], given: list[Any]) -> list[Any]:
        which, operands = given[0], given[1:]
        if which is not None:
            return self.run(branches[min(max(int(which), 0), len(branches) - 1)], operands)
        before = (self.read, self.written)
        tried = []
        for branch in branches:
            self.read, self.written = before
            results = self.run(branch, operands)
            tried.append((self.read, self.written, results))
        self.unsure = self.unsure or len({one[:2] for one in tried}) > 1
        self.read, self.written, _ = max(tried, key=lambda one: one[0] + one[1])
        results = [one[2] for one in tried]
        return [x[0] if all(y == x[0] for y in x) else None for x in zip(*results, strict=True)]

    def _scan(self, params: dict, given: list[Any]) -> list[Any] | None:
        inner, length = params["jaxpr"], params["length"]
        same, carried = scan_groups(params)
        consts, carry = given[:same], given[same : same + carried]
        slices = len(opened(inner).invars) - same - carried
        if length > 64 and not self._inside_moves(inner):
            return None

        def turns(carry: list[Any], count: int) -> list[Any]:
            for _ in range(count):
                carry = self.run(inner, [*consts, *carry, *[None] * slices])[:carried]
            return carry

        if not self.sampled or length <= 2 * _ENDS + _MIDDLE:
            return turns(carry, length)
        before = turns(carry, _ENDS - 1)
        after = turns(before, 1)

        def at(turn: int) -> list[Any]:  # whole numbers go on as from the second turn to the third
            return [
                None if x is None or y is None else y + (turn - _ENDS) * (y - x)
                for x, y in zip(before, after, strict=True)
            ]

        read, written = self.read, self.written
        turns(at(length // 2), _MIDDLE)
        share = (length - 2 * _ENDS) / _MIDDLE
        self.read = read + share * (self.read - read)
        self.written = written + share * (self.written - written)
        return turns(at(length - _ENDS), _ENDS)

    def _while(self, params: dict, given: list[Any]) -> list[Any] | None:
        skip, same = params["cond_nconsts"], params["body_nconsts"]
        first, consts, carry = given[:skip], given[skip : skip + same], given[skip + same :]
        if not self._inside_moves(params["body_jaxpr"]):
            return None
        while True:
            (go,) = self.run(params["cond_jaxpr"], [*first, *carry])
            if go is None:  # how often is not known: once
                self.unsure = True
                self.run(params["body_jaxpr"], [*consts, *carry])
                return None
            if not go:
                return carry
            carry = self.run(params["body_jaxpr"], [*consts, *carry])


def _moves(equation: Any) -> bool:
    """Whether an equation may move bytes, itself or within."""
    name = equation.primitive.name
    if name in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
        return True
    if name in ("get", "swap", "addupdate", "masked_load", "masked_swap", "load"):
        return in_memory(equation.invars[0].aval)
    return any(any(map(_moves, opened(inner).eqns)) for inner in inside(equation))


def inside(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = _jaxpr(one)
            found += [] if inner is None else [inner]
    return found


def scan_groups(params: dict) -> tuple[int, int]:
    """How many arguments of a scan stay the same, and how many are carried on."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    groups = params["ft_in"].unpack()  # jax 0.11
    return len(groups[0]), len(groups[1])


def is_scalar(equation: Any) -> bool:
    """Whether it makes single whole numbers or conditions."""
    return bool(equation.outvars) and all(
        getattr(v.aval, "shape", None) == () and is_whole(v.aval) for v in equation.outvars
    )


def is_whole(aval: Any) -> bool:
    """Whether an array's numbers are whole ones or conditions."""
    return np.issubdtype(aval.dtype, np.integer) or aval.dtype == np.bool_


def computed(name: str, equation: Any, given: list[Any]) -> list[Any] | None:
    if any(x is None for x in given) or not given:
        # An "and" with one that is false, an "or" with one that is true.
        if name == "and" and any(x is False for x in given):
            return [False]
        return [True] if name == "or" and any(x is True for x in given) else None
    if name == "convert_element_type":
        return [bool(given[0]) if equation.params["new_dtype"] == np.bool_ else int(given[0])]
    if name in SAME:
        return [given[0]]
    if name in ARITHMETIC:
        return [ARITHMETIC[name](*given)]
    return None


def _side(equation: Any, operand: int, tree: Any) -> float:
    """Bytes of the slice of a reference that a copy reads or writes."""
    aval = equation.invars[operand].aval
    shape = tuple(aval.shape)
    leaves = [object()] * tree.num_leaves
    for transform in jax.tree.unflatten(tree, leaves):
        if hasattr(transform, "get_indexer_shape"):
            shape = tuple(transform.get_indexer_shape())
    return float(math.prod(int(n) for n in shape)) * aval.dtype.itemsize


def in_memory(aval: Any) -> bool:
    return "gmem" in str(getattr(aval, "memory_space", "")).lower()


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape)) * aval.dtype.itemsize


def _jaxpr(value: Any) -> Any:
    return value if hasattr(opened(value), "eqns") else None


def opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def whole(x: Any) -> Any:
    """A scalar whole number as Python's, else None."""
    if isinstance(x, bool | np.bool_):
        return bool(x)
    if isinstance(x, int | np.integer):
        return int(x)
    array = x if isinstance(x, np.ndarray) else None
    if array is None or array.shape != ():
        return None
    if array.dtype == np.bool_:
        return bool(array)
    return int(array) if np.issubdtype(array.dtype, np.integer) else None
