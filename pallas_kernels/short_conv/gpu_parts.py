"""What short_conv's two GPU kernels share.

One channel per thread. A block walks over a stretch of time with the last w - 1 inputs of the
document in registers; padding leaves them, a document that begins clears them. HALO tokens before
the stretch fill them: padding lies between documents only, so that either these tokens hold all
that a tap reaches, or a document begins after them, or none has come yet and the state's inputs
stand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu_parts
from pallas_kernels.core.gpu import WARPGROUP
from pallas_kernels.core.gpu_parts import only, spread

F32 = jnp.float32
SLOTS = 2  # buffers in turn: one is worked on while the next arrives
HALO = 16  # tokens; a tap reaches no further
INTS = 32  # of an array that holds one: TMA fetches as many bytes as there are threads, or more
TOGETHER = 4  # tokens written out in the program
Refs = dict[str, Any]
Rows = tuple[jax.Array, ...]


class How(NamedTuple):
    """Static settings.

    Attributes:
        taps: of the convolution.
        silu: whether the sum goes through silu.
        documents: whether there are flags of documents and padding.
        stretch: tokens of a block.
        tile: tokens of a step.
        config: PallasGpuConfig.
    """

    taps: int
    silu: bool
    documents: bool
    stretch: int
    tile: int
    config: Any


class Tokens(NamedTuple):
    """Some tokens in shared memory.

    Attributes:
        x: inputs `[some 128]`.
        flags: `[2 some]`, 1 where there is a token and where a document begins; None = everywhere,
            nowhere.
        dy: gradients of y `[some 128]`; None = not needed.
    """

    x: Any
    flags: Any
    dy: Any = None


def row(how: How, ref: Any, *at: Any) -> jax.Array:
    """Numbers of the threads in float32."""
    return gpu_parts.row(ref, *at, config=how.config).astype(F32)


def flag(tokens: Tokens, which: int, t: Any) -> jax.Array | None:
    """Where there is a token (0), where a document begins (1); None = as if it were always so."""
    return None if tokens.flags is None else spread(tokens.flags[which, t]) > 0


def clear(begins: jax.Array | None, rows: Rows) -> Rows:
    """Forgets what lies beyond the border of a document."""
    if begins is None:
        return rows
    return tuple(lax.select(begins, jnp.zeros_like(x), x) for x in rows)


def push(there: jax.Array | None, rows: Rows, new: jax.Array) -> Rows:
    """The newest row comes last, the oldest goes; padding is not counted."""
    shifted = (*rows, new)[1:]
    if there is None:
        return shifted
    return tuple(lax.select(there, a, b) for a, b in zip(shifted, rows, strict=True))


def kept(how: How, before: Any) -> Rows:
    """The inputs that the state brings in."""
    return tuple(row(how, before, i) for i in range(how.taps - 1))


def taps(how: How, channels: Any) -> Rows:
    """The weights, then the bias."""
    return tuple(row(how, channels, i) for i in range(how.taps + 1))


def walk(count: int, one: Callable[[Any, Any], Any], carry: Any, *, reverse: bool = False) -> Any:
    """carry = one(t, carry) for some tokens in order, some of them written out at a time."""

    def some(k, carry):
        for j in range(TOGETHER):
            t = k * TOGETHER + j
            carry = one(count - 1 - t if reverse else t, carry)
        return carry

    return lax.fori_loop(0, count // TOGETHER, some, carry)


def passed(how: How, tokens: Tokens, count: int, rows: Rows) -> Rows:
    """The last inputs after some tokens."""

    def one(t, rows):
        there = flag(tokens, 0, t)
        x = only(there, row(how, tokens.x, t))
        return push(there, clear(flag(tokens, 1, t), rows), x)

    return walk(count, one, rows) if rows else rows


def where_first(start: jax.Array, a: Rows, b: Rows) -> Rows:
    """a where a stretch or tile starts at token 0, else b."""
    mask = spread(start) == 0
    return tuple(lax.select(mask, x, y) for x, y in zip(a, b, strict=True))


def total(weights: Rows, rows: Rows, x: jax.Array) -> jax.Array:
    """The sum over taps, and the bias."""
    *some, last, bias = weights
    s = bias + last * x
    for weight, old in zip(some, rows, strict=True):
        s = s + weight * old
    return s


def place() -> tuple[Any, Any, Any]:
    """Row, channels and stretch of this block."""
    channels = pl.ds(lax.axis_index("blocks") * WARPGROUP, WARPGROUP)
    return lax.axis_index("rows"), channels, lax.axis_index("stretches")


def load(ins: Refs, to: Tokens, at: tuple[Any, Any, Any], barrier: Any) -> None:
    """Begins to fetch the tokens `at` (row, tokens, channels) into buffers."""
    i, time, here = at
    plgpu.copy_gmem_to_smem(ins["x"].at[i, time, here], to.x, barrier)
    if to.flags is not None:
        plgpu.copy_gmem_to_smem(ins["flags"].at[i, :, time], to.flags, barrier)
    if to.dy is not None:
        plgpu.copy_gmem_to_smem(ins["dy"].at[i, time, here], to.dy, barrier)


def buffers(arrays: dict[str, jax.Array], count: int, *, slots: int = 0, dy: bool = False) -> Refs:
    """Shared memory for some tokens, by name as in Tokens; as many slots, 0 = no axis for them."""
    shape = (slots, count) if slots else (count,)
    found = dict(x=gpu_parts.vectors(*shape, dtype=arrays["x"].dtype))
    if "flags" in arrays:
        found["flags"] = plgpu.SMEM((*shape[:-1], 2, count), F32)
    if dy:
        found["dy"] = gpu_parts.vectors(*shape, dtype=arrays["dy"].dtype)
    return found


def tokens(own: Refs, name: str, slot: Any = None) -> Tokens:
    """Some of the buffers, `name` before their names in Tokens."""
    of = {x: own.get(f"{name}{x}") for x in Tokens._fields}
    if slot is not None:
        of = {x: None if ref is None else ref.at[slot] for x, ref in of.items()}
    return Tokens(**of)


def ending(own: Refs, slot: Any, count: int) -> Tokens:
    """The last HALO tokens of a slot."""
    some = pl.ds(count - HALO, HALO)
    flags = own["flags"].at[slot, :, some] if "flags" in own else None
    return Tokens(own["x"].at[slot, some], flags)


def prefixed(name: str, found: Refs) -> Refs:
    """Names of some buffers among others."""
    return {f"{name}{x}": ref for x, ref in found.items()}
