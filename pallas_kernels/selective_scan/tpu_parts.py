"""What selective_scan's two TPU kernels share.

Channels lie on lanes, states on sublanes: h is `[n e]`. A chunk's tokens follow each other in a
loop, some of them written out at a time; what does not depend on the state is done for these at
once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, SUBLANES

F32 = jnp.float32
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x LOG2_E): the unit for exponentials knows exp2
Refs = dict[str, Any]
# Which block an array has.
KINDS = dict(
    **dict(u="tokens", delta="tokens", z="tokens", dy="tokens"),
    **dict(B="along", C="along", A="states", D="channels", bias="channels"),
    **dict(h="by_row", dlast="by_row", starts="starts", valid="flags", reset="scalars"),
)


class How(NamedTuple):
    """Static settings.

    Attributes:
        softplus: whether delta goes through softplus.
        width: channels of the arrays; blocks may hang over their end.
        chunk: tokens per step of the grid.
        config: PallasTpuConfig.
        backward: which of its settings count.
    """

    softplus: bool
    width: int
    chunk: int
    config: Any
    backward: bool = False

    @property
    def tokens(self) -> int:
        """Tokens worked on together."""
        return self.config.tokens

    @property
    def lanes(self) -> int:
        """Channels whose states are in registers at a time."""
        return self.config.lanes_backward if self.backward else self.config.lanes

    @property
    def channels(self) -> int:
        """Channels per step of the grid."""
        return self.config.channels_backward if self.backward else self.config.channels


class Part(NamedTuple):
    """Some tokens and channels of a step.

    Attributes:
        begin: of the chunk, in blocks with time along lanes.
        block: first channel of the block.
        lane: first channel, within the block.
        first: first token, within the chunk.
    """

    begin: Any
    block: Any
    lane: Any = 0
    first: Any = 0

    def rows(self, how: How) -> Any:
        return pl.ds(self.first, how.tokens)

    def lanes(self, how: How) -> Any:
        return pl.ds(self.lane, how.lanes)


def block_specs(how: How, n: int, steps: int) -> Refs:
    """Blocks by kind of array; the grid is (b, blocks of channels, chunks of time).

    Args:
        how: settings; backward, time runs from the last chunk to the first.
        n: states per channel.
        steps: chunks.
    """
    channels = how.channels
    at = (lambda i: steps - 1 - i) if how.backward else (lambda i: i)
    per_row = LANES // how.chunk  # chunks that share a block of numbers along lanes
    by_lane = lambda b, e, i: (b, 0, at(i) // per_row)
    flags = functools.partial(pl.BlockSpec, (None, 1, LANES), by_lane)
    return dict(
        tokens=pl.BlockSpec((None, how.chunk, channels), lambda b, e, i: (b, at(i), e)),
        along=pl.BlockSpec((None, n, LANES), by_lane),
        along_parts=pl.BlockSpec(
            (None, None, n, LANES), lambda b, e, i: (b, e, 0, at(i) // per_row)
        ),
        flags=flags(),
        scalars=flags(memory_space=pltpu.SMEM),
        channels=pl.BlockSpec((1, channels), lambda b, e, i: (0, e)),
        states=pl.BlockSpec((n, channels), lambda b, e, i: (0, e)),
        by_row=pl.BlockSpec((None, n, channels), lambda b, e, i: (b, 0, e)),
        by_row_8=pl.BlockSpec((None, SUBLANES, channels), lambda b, e, i: (b, 0, e)),
        starts=pl.BlockSpec((None, None, n, channels), lambda b, e, i: (b, at(i), 0, e)),
    )


def columns(rows_ref: Any, to_ref: Any, begin: jax.Array) -> None:
    """to[t] = column begin + t of rows `[n 128]`, the same on every lane; to is `[c n 128]`."""

    def eight(k, carry):
        first = pl.multiple_of(k * SUBLANES, SUBLANES)
        rows = _from_lane(rows_ref[...].astype(F32), begin + first)
        some = [jnp.broadcast_to(rows[:, j : j + 1], rows.shape) for j in range(SUBLANES)]
        to_ref[pl.ds(first, SUBLANES)] = jnp.stack(some)
        return carry

    jax.lax.fori_loop(0, to_ref.shape[0] // SUBLANES, eight, 0)


def column_sums(parts_ref: Any, to_ref: Any, begin: jax.Array) -> None:
    """Column begin + t of `[n 128]` = the sum of parts[t] over its lanes; the others stay."""
    lane = jax.lax.broadcasted_iota(jnp.int32, to_ref.shape, 1) - begin

    def eight(k, rows):
        first = pl.multiple_of(k * SUBLANES, SUBLANES)
        some = jnp.sum(parts_ref[pl.ds(first, SUBLANES)], axis=2, keepdims=True)
        for j in range(SUBLANES):
            rows = jnp.where(lane == first + j, some[j], rows)
        return rows

    to_ref[...] = jax.lax.fori_loop(0, parts_ref.shape[0] // SUBLANES, eight, to_ref[...])


def down(row_ref: Any, to_ref: Any, begin: jax.Array) -> None:
    """to[t] = number begin + t of a row `[1 128]`, the same on every lane; to is `[c 128]`."""
    column = jnp.reshape(_from_lane(row_ref[...], begin), (LANES, 1))
    to_ref[...] = jnp.broadcast_to(column[: to_ref.shape[0]], to_ref.shape)


def _from_lane(x: jax.Array, first: jax.Array) -> jax.Array:
    """x with lane `first` in front."""
    return pltpu.roll(x, (LANES - first) % LANES, 1)


def wide(x: jax.Array, lanes: int) -> jax.Array:
    """`[n 128]` beside itself, up to so many lanes."""
    return x if lanes == LANES else jnp.concatenate([x] * (lanes // LANES), axis=1)


def fold(x: jax.Array) -> jax.Array:
    """Adds registers under each other: `[8 k, e]` to `[8 e]`, still to be summed."""
    return functools.reduce(jnp.add, [x[i : i + 8] for i in range(0, x.shape[0], 8)])


def fold_lanes(x: jax.Array) -> jax.Array:
    """Adds registers beside each other: `[n e]` to `[n 128]`, still to be summed."""
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def sums(eight: Sequence[jax.Array]) -> jax.Array:
    """Row j = the sum of the rows of the jth; eight arrays `[8 e]`.

    Half of two is added to the other half of each, three times: 7 rotations instead of 24.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, eight[0].shape, 0)
    for bit in (1, 2, 4):
        low = (row & bit) == 0
        eight = [
            jnp.where(low, a, b) + pltpu.roll(jnp.where(low, b, a), SUBLANES - bit, 0)
            for a, b in zip(eight[0::2], eight[1::2], strict=True)
        ]
    return eight[0]


def rows_of_sums(of_tokens: Sequence[jax.Array]) -> jax.Array:
    """`sums` of each eight tokens, under each other."""
    eights = range(0, len(of_tokens), SUBLANES)
    return jnp.concatenate([sums(of_tokens[i : i + SUBLANES]) for i in eights], axis=0)


def only(there: jax.Array | None, x: jax.Array) -> jax.Array:
    """Sets padding to 0, whatever stands there; there is None where there is no padding."""
    return x if there is None else jnp.where(there, x, 0)


def there_of(ins: Refs, own: Refs, part: Part, how: How) -> jax.Array | None:
    """Where tokens and channels are, bool `[tokens e]`; None = everywhere."""
    there = None
    if "valid" in ins:
        there = wide(own["there"][part.rows(how), :], how.lanes) > 0
    if how.width % how.channels:
        channel = jax.lax.broadcasted_iota(jnp.int32, (how.tokens, how.lanes), 1)
        inside = channel < how.width - part.block - part.lane
        there = inside if there is None else there & inside
    return there


def before_softplus(ins: Refs, part: Part, how: How) -> jax.Array:
    """delta + delta_bias."""
    here = part.lanes(how)
    x = ins["delta"][part.rows(how), here].astype(F32)
    return x + ins["bias"][:, here] if "bias" in ins else x


def step_sizes(ins: Refs, part: Part, how: How) -> jax.Array:
    """Step sizes of some tokens and channels."""
    x = before_softplus(ins, part, how)
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))) if how.softplus else x


def decays(d: jax.Array, rates: jax.Array, ins: Refs, part: Part, j: int) -> jax.Array:
    """exp(d A) `[n e]` of token j; 0 where a document begins.

    Args:
        d: its step sizes `[1 e]`.
        rates: A LOG2_E.
        ins: the inputs.
        part: which tokens.
        j: which of them.
    """
    decay = jnp.exp2(d * rates)
    if "reset" not in ins:
        return decay
    return jnp.where(ins["reset"][0, part.begin + part.first + j] != 0, 0.0, decay)
