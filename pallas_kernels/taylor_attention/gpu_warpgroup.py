"""What a warpgroup does in taylor_attention's GPU kernels: loads, masks, products, features.

A chunk is 64 tokens and a tile 64 features, the rows that one wgmma takes. Matrices in registers
are `[64 n]` and lie as wgmma leaves them. Numbers of float32 are multiplied as sums of two bfloat16
parts (three products: 16 bits of each), numbers of bfloat16 as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import GpuConfig
from pallas_kernels.core.gpu_parts import layout_cast, read

ROWS = 64
# Bits of a token's place, as core/tpu_places.py packs them; its document stands above them.
VALID, HEAD, TAIL, KEPT, DOCUMENT = 0, 1, 2, 3, 4


def parts_of(dtype: Any) -> int:
    """Into how many bfloat16 numbers one of this type is split."""
    return 1 if dtype == jnp.bfloat16 else 2


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Its instructions, or what stands for them where a kernel is interpreted.

    Attributes:
        config: of the form. The interpreter knows no register layouts, and wgmma only of whole
            buffers.
        n_parts: bfloat16 parts of a number.
        wide: features, or tokens of pairs, worked on at a time, for the sake of registers.
        zero: a number that the compiler does not know to be 0, read for each chunk. Added to where
            operands lie, for it would compute all their addresses before the loop over chunks, and
            keep them in registers that are dear.
    """

    config: GpuConfig
    n_parts: int
    wide: int = 32
    zero: Any = 0

    @property
    def cuts(self) -> list[slice]:
        """The columns of 64 that are worked on at a time."""
        return [slice(first, first + self.wide) for first in range(0, ROWS, self.wide)]

    @property
    def interpret(self) -> bool:
        """Whether the kernel is interpreted."""
        return bool(self.config.interpret)

    def fresh(self, zero: jax.Array) -> "Warpgroup":
        """For a chunk, which has read its zero."""
        return dataclasses.replace(self, zero=zero)

    def load(self, ref: Any) -> jax.Array:
        """A `[64 n]` buffer, float32."""
        return self._cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)

    def read(self, ref: Any) -> jax.Array:
        """A `[64 n]` float32 part of an array in global memory, however slowly it comes."""
        return read(ref, plgpu.Layout.WGMMA, self.config)

    def by_row(self, ref: Any, n: int) -> jax.Array:
        """`[64 n]` of a `[64]` buffer, one number per row."""
        return self.spread(self._cast(ref[...], plgpu.Layout.WGMMA.reduce(1)), n)

    def by_column(self, ref: Any) -> jax.Array:
        """`[64 n]` of a `[n]` buffer, one number per column."""
        x = self._cast(ref[...], plgpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(x, (ROWS, x.shape[0]), (1,))

    def spread(self, x: jax.Array, n: int) -> jax.Array:
        """`[64 n]` of a vector in registers, one number per row."""
        return jax.lax.broadcast_in_dim(x, (ROWS, n), (0,))

    def zeros(self, n: int) -> jax.Array:
        """`[64 n]`."""
        return self._cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA)

    def iota(self, n: int, axis: int) -> jax.Array:
        """`[64 n]`: each one's row or column."""
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, (ROWS, n), axis)
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, n), axis, layout=plgpu.Layout.WGMMA)

    def rounded(self, x: jax.Array) -> jax.Array:
        """Float32 numbers as bfloat16 has them."""
        if self.interpret:  # XLA would take rounding there and back for none
            return jax.lax.reduce_precision(x, 8, 7)
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The parts of float32 numbers."""
        found, rest = [], x
        for i in range(self.n_parts):
            found.append(rest.astype(jnp.bfloat16))
            if i + 1 < self.n_parts:
                rest = rest - self.rounded(rest)
        return found

    def store(self, ref: Any, columns: slice, x: jax.Array) -> None:
        """Writes float32 numbers into columns of the buffer `[parts 64 n]`, part by part."""
        for i, part in enumerate(self.split(x)):
            ref[i + self.zero, :, columns] = part

    def product(
        self,
        start: jax.Array | int,
        a: Sequence[Any],
        b: Sequence[Any],
        *,
        turn_a: bool = False,
        turn_b: bool = False,
    ) -> jax.Array:
        """start + a b, summed in float32.

        Args:
            start: float32, or the width n to start with zeros.
            a: parts `[64 k]`, in registers, or in shared memory (then perhaps `[k 64]`, turned).
            b: parts `[parts k n]` in shared memory; perhaps `[parts n k]`, turned.
            turn_a, turn_b: whether to take the transposed.
        """
        taken = lambda x: x() if callable(x) else x
        n_parts = max(len(a), len(b))
        pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < n_parts]
        if self.interpret:
            total = jnp.zeros((ROWS, start), jnp.float32) if isinstance(start, int) else start
            for pair in pairs:
                x, y = (taken(z)[...].astype(jnp.float32) for z in pair)
                total = total + (x.T if turn_a else x) @ (y.T if turn_b else y)
            return total

        def multiply(total: Any) -> None:
            for pair in pairs:
                x, y = map(taken, pair)
                x = plgpu.transpose_ref(x, (1, 0)) if turn_a else x
                plgpu.wgmma(total, x, plgpu.transpose_ref(y, (1, 0)) if turn_b else y)

        if isinstance(start, int):

            def from_zeros(total: Any) -> jax.Array:
                multiply(total)
                return total[...]

            return pl.run_scoped(from_zeros, plgpu.ACC((ROWS, start), jnp.float32))
        return pl.run_state(multiply)(plgpu.ACC.init(start))

    def parts(
        self, ref: Any, *before: Any, rows: Any = slice(None), columns: Any = slice(None)
    ) -> list[Any]:
        """The parts of (some of) a buffer `[... parts k n]`, for `product`.

        Functions, for jax's run_state takes no static index that was made outside of it.

        Args:
            ref: the buffer.
            *before: numbers on axes before the parts.
            rows, columns: slices or pl.ds.
        """
        at = lambda i: ref.at[(*before, i + self.zero, rows, columns)]
        return [functools.partial(at, i) for i in range(self.n_parts)]

    def _cast(self, x: jax.Array, layout: Any) -> jax.Array:
        return layout_cast(x, layout, self.config)


def only(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x, and 0 where the mask is false, whatever stands there."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Masks of a chunk from its places `[64]`; every one is None where all is seen.

    Attributes:
        unit: of the warpgroup.
        order: a buffer of int32, 0 to 63. Read where it is needed: numbers that the compiler knows
            it would compute before the loop over chunks, and keep in registers that are dear.
        places: a buffer of int32, or None.
    """

    unit: Warpgroup
    order: Any
    places: Any

    def rows(self, bit: int, n: int) -> jax.Array | None:
        """`[64 n]`, whether the token of a row has this bit."""
        if self.places is None:
            return None
        return (self.unit.by_row(self.places, n) & (1 << bit)) != 0

    def first(self, n: int, of: int) -> jax.Array:
        """`[64 of]`, whether a column is one of the first n."""
        return self.unit.by_column(self.order.at[pl.ds(0, of)]) < n

    def kept(self, n: int) -> jax.Array | None:
        """`[64 n]`, whether the state before the chunk stays: the same everywhere."""
        return self.rows(KEPT, n)

    def pairs(self, cut: slice, turned: bool = False) -> jax.Array:
        """`[64 wide]`, whether a row's token sees a column's, or is seen by it (turned)."""
        both = lambda ref: (self.unit.by_row(ref, self.unit.wide), self.unit.by_column(ref.at[cut]))
        rows, columns = both(self.order)
        seen = rows <= columns if turned else rows >= columns
        if self.places is None:
            return seen
        rows, columns = both(self.places)
        there = (rows & columns & (1 << VALID)) != 0
        return seen & there & ((rows >> DOCUMENT) == (columns >> DOCUMENT))


@dataclasses.dataclass(frozen=True)
class Features:
    """A warpgroup's 64 products m of the tokens of a chunk: m = left * right, without factors.

    Attributes:
        unit: of the warpgroup.
        select: `[2 64 16]` buffer: which columns of x a product takes.
        ones: `[2 64]` buffer: which products have a one in their place.
        factor: `[64]` buffer: with which they go into the state.
    """

    unit: Warpgroup
    select: Any
    ones: Any
    factor: Any

    def write(self, ref: Any, x: list[jax.Array], mask: Any = None, *, factor: bool = False):
        """Writes m of parts of x `[64 16]` into a buffer `[parts 64 64]`, 0 where masked."""
        for cut in self.unit.cuts:
            left, right = self._sides(x, cut)
            m = left * right
            m = m * self.unit.by_column(self.factor.at[cut]) if factor else m
            self.unit.store(ref, cut, m if mask is None else only(mask(self.unit.wide), m))

    def pull(self, x: list[jax.Array], dm: Callable[[slice], jax.Array]) -> jax.Array:
        """The gradient of x `[64 16]`, from a function that gives that of a cut of m."""
        dx = self.unit.zeros(self.select.shape[2])
        for cut in self.unit.cuts:
            dm_cut = dm(cut)
            for i, side in enumerate(reversed(self._sides(x, cut))):
                dx = self.unit.product(dx, self.unit.split(dm_cut * side), self._taken(i, cut))
        return dx

    def _sides(self, x: list[jax.Array], cut: slice) -> list[jax.Array]:
        """left and right `[64 wide]`."""
        ones = lambda i: self.unit.by_column(self.ones.at[i, cut])
        return [self.unit.product(ones(i), x, self._taken(i, cut), turn_b=True) for i in range(2)]

    def _taken(self, i: int, cut: slice) -> list[Any]:
        return [lambda: self.select.at[i + self.unit.zero, cut]]


def everyone(barrier: Any) -> None:
    """Waits until all warpgroups are here; what they wrote to shared memory is seen by all."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
