"""How the kernels of neural_memory cut their arrays, and what they are told."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import TpuConfig
from pallas_kernels.neural_memory.cost import cost
from pallas_kernels.neural_memory.memory import Rule
from pallas_kernels.neural_memory.tpu_chunk import Tokens


class Layout(NamedTuple):
    """What of a call is static; sizes are those of the arrays that the kernels get.

    Attributes:
        how: settings of the memory.
        configs: of the forward and the backward kernel.
        narrow: whether products take bfloat16.
        aligned: whether rows are one document each, and blocks its chunks.
        b, t, h: rows, tokens that are there, heads.
        block: tokens per block.
        blocks: blocks per row, up to a multiple of span: some may have no token.
        span: blocks per state that is kept.
        heads: heads per step of the grid, which divide h.
    """

    how: Rule
    configs: tuple[TpuConfig, ...]
    narrow: bool
    aligned: bool
    b: int
    t: int
    h: int
    block: int
    blocks: int
    span: int
    heads: int

    @property
    def spans(self) -> int:
        return self.blocks // self.span

    @property
    def groups(self) -> int:
        return self.h // self.heads

    @property
    def last(self) -> int:
        """The last block with a token."""
        return (self.t - 1) // self.block


class Part(NamedTuple):
    """Marks of a part of a block, float32, or their shapes or views.

    Attributes:
        part: the part that each token is in, `[1 c]`.
        documents, chunks: 1 where one begins, `[1 c]`.
        number: of the part that is at work, `[1 1]`.
    """

    part: Any
    documents: Any
    chunks: Any
    number: Any


class Cuts(NamedTuple):
    """Where documents begin, for rows that are not one document each; or their BlockSpecs.

    Attributes:
        tokens: float32 `[b n 3 c]`: the part of its block that a token is in (-1: none), 1 where a
            document begins, 1 where a chunk begins.
        parts: int32 `[b 1 n]`, parts of each block.
    """

    tokens: Any
    parts: Any


def tokens_spec(form: Layout, array: Any, at: Callable, n: int = 1) -> pl.BlockSpec:
    """n blocks of `[b t h*x]`; `at(*grid)` is which. The last one may hang over the end."""
    width = array.shape[2] // form.groups
    return pl.BlockSpec((1, n * form.block, width), lambda b, g, *i: (b, at(*i), g))


def gates_spec(form: Layout, at: Callable, n: int = 1) -> pl.BlockSpec:
    """n blocks of `[b h n 3 c]`."""
    shape = (1, form.heads, n, 3, form.block)
    return pl.BlockSpec(shape, lambda b, g, *i: (b, g, at(*i), 0, 0))


def cuts_spec(form: Layout, at: Callable, n: int = 1) -> Cuts | None:
    if form.aligned:
        return None
    return Cuts(
        pl.BlockSpec((1, n, 3, form.block), lambda b, g, *i: (b, at(*i), 0, 0)),
        pl.BlockSpec((1, 1, form.blocks), lambda b, g, *i: (b, 0, 0), memory_space=pltpu.SMEM),
    )


def state_specs(form: Layout, tree: Any, *, once: bool = True) -> Any:
    """Of `[b h x y]` and, of what documents begin with, `[h x y]`; they stay for all of a row.

    Args:
        form: sizes.
        tree: arrays.
        once: whether one copy on chip is enough: it is read, and the next comes a row later.
    """
    mode = dict(pipeline_mode=pl.Buffered(1)) if once else {}

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((form.heads, *x.shape[1:]), lambda b, g, *i: (g, 0, 0), **mode)
        shape = (1, form.heads, *x.shape[2:])
        return pl.BlockSpec(shape, lambda b, g, *i: (b, g, 0, 0), **mode)

    return jax.tree.map(spec, tree)


def kept_specs(form: Layout, tree: Any, at: Callable) -> Any:
    """Of states that are kept, `[b spans h x y]`."""

    def spec(x):
        shape = (1, 1, form.heads, *x.shape[3:])
        return pl.BlockSpec(shape, lambda b, g, *i: (b, at(*i), g, 0, 0))

    return jax.tree.map(spec, tree)


def block_structs(form: Layout, q: jax.Array, v: jax.Array) -> tuple[Tokens, Any]:
    """The tokens of one head and block, and the marks, for planning; q, v are `[b t h*x]`."""
    new = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    keys, values = (new(form.block, x.shape[2] // form.h) for x in (q, v))
    row = new(1, form.block)
    marks: Any = Part(row, row, row, new(1, 1))
    if form.aligned:
        marks = None if form.t % form.block == 0 else row
    return Tokens(keys, keys, values, row, row, row), marks


def structs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def estimate(form: Layout, inputs: Any, results: Any, *, backward: bool) -> pl.CostEstimate:
    """What XLA's scheduler may assume: operations, and bytes if arrays move once."""
    q, _, v, *_ = inputs
    weights = results[1][0]
    n = weights.w_out.shape[-1]
    least = cost(
        form.b,
        form.t,
        form.h,
        q.shape[2] // form.h,
        v.shape[2] // form.h,
        n,
        form.how.chunk,
        m=None if weights.w_in is None else n,
        backward=backward,
    )
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((inputs, results)))
    return pl.CostEstimate(
        flops=int(least.flops), transcendentals=int(least.transcendentals), bytes_accessed=moved
    )


def state_structs(carry: tuple) -> tuple:
    """Of a carry, of which the momentum may be None."""
    *others, momentum = carry
    return structs((*others, others[-1] if momentum is None else momentum))
