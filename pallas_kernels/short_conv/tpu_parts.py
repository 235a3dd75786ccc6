"""What short_conv's two TPU kernels share.

Time lies on sublanes, channels on lanes. A tile of tokens stands in the vector memory with HALO
rows before it, so that a tap is a shifted read.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, SUBLANES, round_up

F32 = jnp.float32
HALO = 16  # rows of a register of bfloat16; a tap reaches no further
ROWS = 32  # tokens worked on together
Refs = dict[str, Any]
# Which block an array has.
KINDS = dict(
    **dict(x="tokens", dy="tokens", halo="halo", before="rows", dafter="rows"),
    **dict(weight="taps", bias="channels", age="flags", leading="scalar", last="scalar"),
)


class How(NamedTuple):
    """Static settings.

    Attributes:
        taps: of the convolution.
        silu: whether the sum goes through silu.
        tokens: of the arrays; the last tile may hang over their end.
        tile: tokens per step of the grid.
        config: PallasTpuConfig.
    """

    taps: int
    silu: bool
    tokens: int
    tile: int
    config: Any

    @property
    def steps(self) -> int:
        """Tiles."""
        return -(-self.tokens // self.tile)


def block_specs(how: How, *, reverse: bool = False) -> Refs:
    """Blocks by kind of array; the grid is (b, blocks of channels, tiles of time)."""
    e = how.config.channels
    at = (lambda i: how.steps - 1 - i) if reverse else (lambda i: i)
    just_before = lambda i: jnp.maximum(at(i) * (how.tile // HALO) - 1, 0)
    by_row = lambda rows: pl.BlockSpec((None, rows, e), lambda b, j, i: (b, 0, j))
    flags = (None, 1, round_up(how.tile, LANES))
    return dict(
        tokens=pl.BlockSpec((None, how.tile, e), lambda b, j, i: (b, at(i), j)),
        halo=pl.BlockSpec((None, HALO, e), lambda b, j, i: (b, just_before(i), j)),
        rows=by_row(HALO),
        tap_sums=by_row(SUBLANES * how.taps),
        sums=by_row(SUBLANES),
        taps=pl.BlockSpec((how.taps, e), lambda b, j, i: (0, j)),
        channels=pl.BlockSpec((1, e), lambda b, j, i: (0, j)),
        flags=pl.BlockSpec(flags, lambda b, j, i: (b, 0, at(i))),
        scalar=pl.BlockSpec((None, 1, 1), lambda b, j, i: (b, 0, 0), memory_space=pltpu.SMEM),
    )


def lay_before(ins: Refs, x_ref: Any, i: jax.Array, how: How) -> None:
    """Lays the inputs that the state brings right before the first token, where tile i sees them.

    The tile after the first token's sees them as well when that token is among the last.
    """
    place, keep = ins["leading"][0, 0] - i * how.tile, how.taps - 1
    for k in range(keep):
        row = HALO + place - keep + k

        @pl.when((place > -keep) & (place < how.tile) & (row >= 0))
        def _(k=k, row=row):
            x_ref[pl.ds(row, 1), :] = ins["before"][k : k + 1, :]


def lay_ages(ins: Refs, age_ref: Any, first: int, how: How) -> None:
    """age_ref[first + t] = the age of token t of the tile, the same on every lane."""
    if "age" not in ins:
        return
    for begin in range(0, how.tile, LANES):
        rows = min(LANES, how.tile - begin)
        column = jnp.reshape(ins["age"][:, begin : begin + LANES], (LANES, 1))[:rows]
        age_ref[pl.ds(first + begin, rows), :] = jnp.broadcast_to(column, (rows, LANES))


def each(how: How, body: Callable[[Any, Any], None], groups: int | None = None) -> None:
    """Runs body(first token, channels) for some tokens and channels of a tile at a time.

    Args:
        how: settings.
        body: of ROWS tokens.
        groups: of tokens; None = all of a tile.
    """
    lanes = 2 * LANES if how.config.channels % (2 * LANES) == 0 else LANES
    groups = groups or how.tile // ROWS

    def step(k, carry):
        here = pl.ds(pl.multiple_of(k // groups * lanes, lanes), lanes)
        body(pl.multiple_of(k % groups * ROWS, ROWS), here)
        return carry

    jax.lax.fori_loop(0, how.config.channels // lanes * groups, step, 0)


def ages(ins: Refs, age_ref: Any, first: Any, rows: int, here: Any) -> jax.Array | None:
    """Ages `[rows e]` of tokens, None where every tap sees everything."""
    if "age" not in ins:
        return None
    return jnp.concatenate([age_ref[pl.ds(first, rows), :]] * (here.size // LANES), axis=1)


def only(seen: jax.Array | None, x: jax.Array) -> jax.Array:
    """Sets what is not seen to 0, whatever stands there."""
    return x if seen is None else jnp.where(seen, x, 0)


def inputs(x_ref: Any, first: Any, here: Any, age: jax.Array | None, how: How) -> Iterator:
    """What each tap sees at ROWS tokens, from the last tap to the first."""
    window = x_ref[pl.ds(first, HALO + ROWS), here]
    for lag in range(how.taps):
        x = window[HALO - lag : HALO - lag + ROWS]
        yield only(None if age is None else age >= lag, x)


def tap_sum(ins: Refs, seen: list[jax.Array], here: Any, how: How) -> jax.Array:
    """The sum before the activation."""
    total = ins["bias"][:, here] if "bias" in ins else jnp.zeros((), F32)
    for lag, x in enumerate(seen):
        total = total + ins["weight"][how.taps - 1 - lag : how.taps - lag, here] * x
    return total
