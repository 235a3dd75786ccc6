"""What GPU kernels that walk over chunks of tokens share: numbers of a chunk, products, copies.

Chunks are of 64 tokens, the rows of a product of one warpgroup; columns are worked on 64 at a time.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.chunks import Plan
from pallas_kernels.core.gpu import GpuConfig, refuses_device, refuses_dtypes
from pallas_kernels.core.numerics import einsum

CHUNK = 64  # tokens: the rows of a product of one warpgroup
BLOCK = 64  # columns of keys or values that are worked on together
# Rows of a chunk's numbers: what D is made of (two), decay from the chunk's start, to its end, all
# through. More may follow.
UPTO, AFTER, START, END, THROUGH = range(5)
NUMBERS = 5
LOWEST = -1e5  # exp of it is 0
# A log decay below is as good as none is left; sums of 64 such keep three digits behind the point.
LEAST = -60.0
# What parts documents in sums of log decays (`numbers_of`): exp(-100) of a state is nothing.
_APART = 100.0
# jax 0.10 wants an index beside the reference, 0.11 wants none.
_NO_INDEX = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


class How(NamedTuple):
    """What is fixed.

    Attributes:
        config: of the form.
        scale: of q.
    """

    config: GpuConfig
    scale: float


def refuses(shapes: Any, device_kind: str, most_keys: int) -> str | None:
    """What stands against a call: devices, dtypes, short blocks of memories, wide keys.

    Args:
        shapes: of q, k, v first, of block_memory (or None) last.
        device_kind: jax's.
        most_keys: columns of keys that are served.
    """
    q, k, v, *_, block_memory = shapes
    if reason := refuses_device(device_kind) or refuses_dtypes(shapes):
        return reason
    if not all(x.dtype == jnp.bfloat16 for x in (q, k, v)):
        return (
            "q, k or v is float32; the factors of its products are bfloat16 (tf32, the unit's "
            "kind for float32, keeps three digits)"
        )
    if k.shape[-1] > most_keys:
        return f"keys have {k.shape[-1]} columns; states of up to {most_keys} fit"
    if block_memory is not None and q.shape[1] // block_memory.shape[1] < CHUNK:
        return f"blocks of memories have fewer than {CHUNK} tokens"
    return None


class Turned(NamedTuple):
    """A factor of a product that is read transposed."""

    ref: Any


def tile(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for factors of products `[... rows columns]`, as wgmma and TMA read them."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def numbers(*shape: int, rows: int = NUMBERS) -> Any:
    """Shared memory for the numbers of a chunk."""
    return plgpu.SMEM((*shape, rows, CHUNK), jnp.float32)


def accumulate(
    how: How, shapes: Sequence[tuple[int, int]], body: Callable[[Callable], Any]
) -> tuple[jax.Array, ...]:
    """Sums of products, float32 of the shapes: body calls `add(n, a, b)` for sum n.

    What body gives back follows the sums. The interpreter of jax 0.10 has no transposed references,
    hence products of its own there.
    """
    if not how.config.interpret:

        def scoped(*sums):
            more = body(lambda n, a, b: plgpu.wgmma(sums[n], _turned(a), _turned(b)))
            return *(x[...] for x in sums), *(() if more is None else more)

        return pl.run_scoped(scoped, *(plgpu.ACC(x, jnp.float32) for x in shapes))

    sums = [jnp.zeros(x, jnp.float32) for x in shapes]

    def add(n, a, b):
        sums[n] = sums[n] + jnp.dot(_read(a), _read(b), preferred_element_type=jnp.float32)

    more = body(add)
    return *sums, *(() if more is None else more)


def product(how: How, a: Any, b: Any, shape: tuple[int, int] = (CHUNK, BLOCK)) -> jax.Array:
    """a b in float32; a and b are references or `Turned` ones."""
    return accumulate(how, [shape], lambda add: add(0, a, b))[0]


def loop(how: How, count: int, body: Callable, carry: Any) -> Any:
    """`lax.fori_loop` from 0 around products inside `accumulate`."""
    if not how.config.interpret:
        return lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


def products_done(how: How) -> None:
    """Waits inside `accumulate` until what the products read may be written over."""
    if not how.config.interpret:
        plgpu.wgmma_wait(0)


def _turned(x: Any) -> Any:
    return plgpu.transpose_ref(x.ref, (1, 0)) if isinstance(x, Turned) else x


def _read(x: Any) -> jax.Array:
    return x.ref[...].T if isinstance(x, Turned) else x[...]


def down(row: jax.Array, columns: int = BLOCK) -> jax.Array:
    """`[64]` as `[64 columns]`: number i stands all along row i."""
    return lax.broadcast_in_dim(row, (row.shape[0], columns), (0,))


def across(row: jax.Array, rows: int = CHUNK) -> jax.Array:
    """`[64]` as `[rows 64]`: number j stands all down column j."""
    return lax.broadcast_in_dim(row, (rows, row.shape[0]), (1,))


def nothing(how: How) -> jax.Array:
    """Zeros `[64 64]`, as a product's result lies."""
    zeros = jnp.zeros((CHUNK, BLOCK), jnp.float32)
    return zeros if how.config.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)


def iota(axis: int) -> jax.Array:
    """The row (0) or the column (1) of each place of `[64 64]`."""
    return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def faded(numbers: Any, zero: Any = 0, *, strictly: bool = False) -> jax.Array:
    """D `[64 64]`: what is left at token i of what token j brought; 0 for j > i (j >= i)."""
    i, j = iota(0) + zero, iota(1) + zero
    sees = i > j if strictly else i >= j
    return jnp.exp(jnp.where(sees, down(numbers[UPTO]) - across(numbers[AFTER]), LOWEST))


def bfloat16(x: jax.Array) -> jax.Array:
    """Rounded, to be a factor."""
    return x.astype(jnp.bfloat16)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 parts whose sum has 16 bits of x."""
    high = bfloat16(x)
    return high, bfloat16(x - high.astype(jnp.float32))


def tokens_at(ref: Any, row: Any, chunk: Any, head: Any, column: Any, width: int) -> Any:
    """A chunk's columns of one head of `[b t h ...]`."""
    return ref.at[row, pl.ds(chunk * CHUNK, CHUNK), head, pl.ds(column, width)]


def span(bounds: Any, row: Any, memory: Any, chunks: int) -> tuple[Any, Any]:
    """The first chunk of a memory and the one after its last; bounds None = of the only one."""
    return (0, chunks) if bounds is None else (bounds[row, memory, 0], bounds[row, memory, 1])


def from_global(how: How, ref: Any) -> jax.Array:
    """`[64 64]` float32 from global memory straight into registers, as a product's result lies."""
    if how.config.interpret:
        return ref[...]
    index = (None,) if _NO_INDEX else ()
    return plgpu.load(ref, *index, layout=plgpu.Layout.WGMMA, optimized=False)


# --- What XLA makes: numbers per token ------------------------------------------------------------


def only_tokens(x: jax.Array, plan: Plan) -> jax.Array:
    """`[b t ...]` with 0 where there is no token, whatever stands there."""
    if plan.valid is None:
        return x
    valid = jnp.swapaxes(plan.valid, 0, 1).reshape(x.shape[:2] + (1,) * (x.ndim - 2))
    return jnp.where(valid, x, 0)


def bounds_of(plan: Plan, s: jax.Array) -> jax.Array | None:
    """int32 `[b m 2]`, the first chunk of each memory and the one after its last; None = one.

    Args:
        plan: of the call.
        s: states `[b m h k v]`.
    """
    if plan.memory is None:
        return None
    memory, each = plan.memory[:, :, None], jnp.arange(s.shape[1])
    count = lambda x: jnp.sum(x, axis=0, dtype=jnp.int32)
    return jnp.stack([count(memory < each), count(memory <= each)], axis=-1)


def numbers_of(g: jax.Array, plan: Plan) -> tuple[jax.Array, ...]:
    """The numbers of chunks, float32 `[b h n c]` each, in their order.

    An exception to how documents are parted elsewhere: between pairs of a chunk not by a mask but
    by `_APART` in UPTO and AFTER, since kernels then need no ids (states, by masks as elsewhere).
    Pairs of two documents keep exp(-100) and less, which is 0 beside bfloat16, as long as g is not
    positive. Pairs of one document are differences of numbers up to 100 times the boundaries before
    it in its chunk, at most 63: of late short documents a decay is up to about 5e-4 off (1e-3 where
    decays before them come to LEAST), below the 2e-3 to which bfloat16 rounds the factor.

    Args:
        g: log decays, float32 `[b h n c]`, not positive.
        plan: of the call.
    """
    g = jnp.maximum(g, LEAST)
    lower = jnp.tri(CHUNK, dtype=jnp.float32)
    sums = einsum("ij,...j->...i", lower, g)
    start, upto, after = jnp.exp(sums), sums, sums
    end = jnp.exp(einsum("ij,...j->...i", jnp.tri(CHUNK, k=-1, dtype=jnp.float32).T, g))
    through = start[..., -1:]
    if plan.document is not None:
        document = jnp.moveaxis(plan.document, 0, 1)[:, None]
        last = document[..., -1:]
        start, end = jnp.where(document == 0, start, 0), jnp.where(document == last, end, 0)
        through = jnp.where(last == 0, through, 0)
        upto, after = (x - _APART * document for x in (upto, after))
    if plan.valid is not None:
        valid = jnp.moveaxis(plan.valid, 0, 1)[:, None]
        start, upto = jnp.where(valid, start, 0), jnp.where(valid, upto, LOWEST)
    # Behind the first are zeros, which kernels add to places (see `zero` in their bodies).
    through = jnp.pad(through, [(0, 0)] * 3 + [(0, CHUNK - 1)])
    return upto, after, start, end, through


def by_chunk(x: jax.Array, plan: Plan) -> jax.Array:
    """`[b t h]` as float32 `[b h n c]`, 0 where there is no token."""
    x = only_tokens(x.astype(jnp.float32), plan)
    b, t, h = x.shape
    return jnp.moveaxis(x.reshape(b, t // CHUNK, CHUNK, h), 3, 1)


def by_token(x: jax.Array, plan: Plan) -> jax.Array:
    """`[b h n c]` as `[b t h]`, 0 where there is no token."""
    b, h, n, c = x.shape
    return only_tokens(jnp.moveaxis(x, 1, 3).reshape(b, n * c, h), plan)
