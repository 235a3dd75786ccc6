"""What the blocks of all taylor_attention's GPU kernels do: the call, states, operands, sums.

A block of threads has one head of one row and walks over chunks; see gpu_forward.py.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.taylor_attention.gpu_layout import KEY, ONES, Widths
from pallas_kernels.taylor_attention.gpu_streams import Streams, stream_buffers
from pallas_kernels.taylor_attention.gpu_warpgroup import (
    ROWS,
    VALID,
    Features,
    Seen,
    Warpgroup,
    only,
    parts_of,
)

TABLES = ("select", "ones", "of_q", "of_k", "order")  # see gpu_layout.tables


class How(NamedTuple):
    """Static settings: see `taylor_attention` and PallasGpuConfig."""

    scale: float
    normalize: bool
    eps: float
    config: Any


class Block(NamedTuple):
    """What a kernel's body gets.

    Attributes:
        at: references by name: arrays, results, scratch.
        row, head: of the block.
        tile: of the warpgroup, its number.
        streams: the arrays along time.
        unit: see Warpgroup.
        widths, how: of the call.
    """

    at: dict[str, Any]
    row: jax.Array
    head: jax.Array
    tile: jax.Array
    streams: Streams
    unit: Warpgroup
    widths: Widths
    how: How

    def fresh(self) -> "Block":
        """With a zero that is read here; see Warpgroup."""
        return self._replace(unit=self.unit.fresh(self.at["order_s"][self.tile, 0]))

    @property
    def least(self) -> int:
        """The last warpgroup, which has the least features and makes up for it."""
        return self.widths.tiles - 1


def warpgroup(dtype: Any, how: How, wide: int = 32) -> Warpgroup:
    """For the bodies of a call with values of this dtype; wide as in Warpgroup."""
    return Warpgroup(how.config, parts_of(dtype), wide)


def block_buffers(widths: Widths, n_parts: int) -> dict[str, Any]:
    """Scratch that every kernel has."""
    tiles, columns, low = widths.tiles, widths.columns, jnp.bfloat16
    return dict(
        select_s=plgpu.SMEM((tiles, 2, ROWS, KEY), low),
        ones_s=plgpu.SMEM((tiles, 2, ROWS), jnp.float32),
        of_q_s=plgpu.SMEM((tiles, ROWS), jnp.float32),
        of_k_s=plgpu.SMEM((tiles, ROWS), jnp.float32),
        order_s=plgpu.SMEM((tiles, ROWS), jnp.int32),
        v1=plgpu.SMEM((n_parts, ROWS, columns), low),
        m=plgpu.SMEM((tiles, n_parts, ROWS, ROWS), low),
        state_low=plgpu.SMEM((tiles, n_parts, ROWS, columns), low),
        loaded=plgpu.Barrier(num_arrivals=len(TABLES), num_barriers=tiles),
        ready=plgpu.Barrier(num_arrivals=tiles),
        between=plgpu.Barrier(num_arrivals=tiles),
        done=plgpu.Barrier(num_arrivals=tiles),
    )


def shared_bytes(buffers: Mapping[str, Any]) -> int:
    """Shared memory that scratch takes, with what aligning it may cost."""
    sizes = (
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in buffers.values()
        if hasattr(x, "dtype")
    )
    return sum(-(-size // 1024) * 1024 for size in sizes) + 1024


def fitting(buffers: Callable[[int], dict[str, Any]], most: int) -> tuple[int, dict[str, Any]]:
    """So many chunks in shared memory at a time as fit (at most, one at least), and the scratch."""
    for slots in range(most, 1, -1):
        found = buffers(slots)
        if shared_bytes(found) <= gpu.SHARED_MEMORY:
            return slots, found
    return 1, buffers(1)


def launch(
    name: str,
    body: Callable[[Block], None],
    along: Mapping[str, Any],
    others: Mapping[str, Any],
    outputs: Mapping[str, Any],
    buffers: dict[str, Any],
    unit: Warpgroup,
    widths: Widths,
    how: How,
    *,
    backward: bool = False,
) -> dict[str, jax.Array]:
    """Calls a kernel; gives its results by name.

    Args:
        name: of the kernel.
        body: of a Block.
        along: arrays along time; those that are None are left out.
        others: more arrays, likewise.
        outputs: jax.ShapeDtypeStructs.
        buffers: scratch besides that of the streams.
        unit, widths, how: for the body.
        backward: whether it walks from the last chunk to the first.
    """
    along = {key: x for key, x in along.items() if x is not None}
    inputs = along | {key: x for key, x in others.items() if x is not None}
    b, t, h, _ = along["q"].shape
    slots, scratch = fitting(lambda n: stream_buffers(along, n) | buffers, how.config.slots)

    def whole(*refs, **scratch_refs):
        at = dict(zip((*inputs, *outputs), refs, strict=True)) | scratch_refs
        row, head, tile = (jax.lax.axis_index(axis) for axis in ("row", "head", "tile"))
        arrays = {key: at[key] for key in along}
        streams = Streams(arrays, at, row, head, t // ROWS, slots, backward)
        pl.when(tile == 0)(streams.begin)
        for key in TABLES:
            source, barrier = at[key].at[tile], at["loaded"].at[tile]
            plgpu.copy_gmem_to_smem(source, at[f"{key}_s"].at[tile], barrier)
        plgpu.barrier_wait(at["loaded"].at[tile])
        body(Block(at, row, head, tile, streams, unit, widths, how))
        plgpu.wait_smem_to_gmem(0)

    results = gpu.kernel_call(
        whole,
        name=name,
        config=how.config,
        out_type=tuple(outputs.values()),
        grid=(b, h),
        grid_names=("row", "head"),
        scratch_types=scratch,
        num_threads=widths.tiles,
        thread_name="tile",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def walk(block: Block, state: str, after: str, factor: str, one_chunk: Callable) -> None:
    """Loads a warpgroup's part of a state, goes over the chunks, and writes what it is after them.

    Args:
        block: see Block.
        state: array of the state before, `[b h tile 64 v1]`; zeros if there is none.
        after: result for the state after, likewise.
        factor: table of the features' factors that products with the state take.
        one_chunk: gives the state after a chunk from its number, the Block, its buffers, masks and
            features, and the state before.
    """
    at, tile, plain = block.at, block.tile, block.unit
    place = (block.row, block.head, tile)
    first = plain.zeros(block.widths.columns)
    if state in at:
        first = plain.read(at[state].at[place])
    lower(block, first, factor)

    def step(i, now):
        buffers = block.streams.wait(i)
        here = block.fresh()
        seen = Seen(here.unit, at["order_s"].at[tile], buffers.get("places"))
        return one_chunk(i, here, buffers, seen, now)

    last = jax.lax.fori_loop(0, block.streams.steps, step, first)
    if after in at:
        at[after][place] = last


def features_of(block: Block, factor: str) -> Features:
    """A warpgroup's features; they go into the state with the factors of this table."""
    tables = (block.at[name].at[block.tile] for name in ("select_s", "ones_s", factor))
    return Features(block.unit, *tables)


def lower(block: Block, state: jax.Array, factor: str) -> None:
    """Writes a warpgroup's part of the state, with features' factors, for products to read."""
    columns = state.shape[1]
    factors = block.unit.by_row(block.at[factor].at[block.tile], columns)
    low = block.at["state_low"].at[block.tile]
    block.unit.store(low, slice(0, columns), state * factors)


def update(block: Block, state: jax.Array, values: str, seen: Seen) -> jax.Array:
    """A warpgroup's part of the state after a chunk, or before it of its gradient."""
    kept, unit = only(seen.kept(state.shape[1]), state), block.unit
    m = unit.parts(block.at["m"], block.tile)
    return unit.product(kept, m, unit.parts(block.at[values]), turn_a=True)


def sums(block: Block, values: str, columns: Any) -> jax.Array:
    """Some columns of what a chunk's pairs and the state give to each token, undivided."""
    at, unit = block.at, block.unit
    values_ = unit.parts(at[values], columns=columns)
    total = unit.product(columns.size, unit.parts(at["w"]), values_)
    for tile in range(block.widths.tiles):
        states = unit.parts(at["state_low"], tile, columns=columns)
        total = unit.product(total, unit.parts(at["m"], tile), states)
    return total


def write_values(block: Block, v: Any, seen: Seen) -> None:
    """v1 = [v, 1, 1, 0 ...] of a chunk; 0 at padding."""
    unit, width, v1 = block.unit, v.shape[1], block.at["v1"]
    for here in pieces(width):
        x = unit.load(v.at[:, here])
        unit.store(v1, here, only(seen.rows(VALID, x.shape[1]), x))
    ones = jnp.where(seen.first(2, ONES), 1.0, 0.0)
    unit.store(v1, slice(width, width + ONES), only(seen.rows(VALID, ONES), ones))


def pieces(width: int) -> list[slice]:
    """Columns worked on at a time, for the sake of registers."""
    return [slice(first, min(first + 32, width)) for first in range(0, width, 32)]


def store_parts(ref: Any, parts: list[jax.Array]) -> None:
    """Parts of a whole buffer `[parts 64 n]`."""
    for i, part in enumerate(parts):
        ref[i] = part


def share_buffers(name: str, widths: Widths, dtype: Any) -> dict[str, Any]:
    """Scratch from which warpgroups send their columns of an array `[b t h v]`."""
    return {
        f"{name}_{j}": plgpu.SMEM((ROWS, ends - begins), dtype)
        for j, (_, begins, ends) in enumerate(widths.shares())
    }


def send_share(block: Block, i: jax.Array, name: str, x: jax.Array) -> None:
    """Sends a warpgroup's columns of chunk i of a result on their way."""
    for j, (first, begins, ends) in enumerate(block.widths.shares()):
        there = slice(first + begins, first + ends)
        send = functools.partial(_send_columns, block, i, name, j, there, x[:, begins:ends])
        pl.when(block.tile == j)(send)


def _send_columns(block: Block, i, name: str, j: int, there: slice, x: jax.Array) -> None:
    send(block.at[f"{name}_{j}"], x, block.streams.place(block.at[name], i).at[:, there])


def send(buffer: Any, x: jax.Array, there: Any) -> None:
    """Sends numbers on their way to global memory, when what this warpgroup sent before is gone."""
    plgpu.wait_smem_to_gmem(0)
    buffer[...] = x.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, there)


def weights(r: jax.Array, pairs: jax.Array, scale: float) -> jax.Array:
    """Weights of pairs from undivided scores r = q.k."""
    return only(pairs, 1 + r * (scale + (0.5 * scale * scale) * r))
