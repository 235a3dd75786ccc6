"""Where everything lies in the vector memory of the TPU kernels.

Time goes by in blocks of T tokens. A level reads a window: what came before, then the block. A
symmetric stack is a causal one that is late: level i comes out center_i d_i tokens after what it
reads, so that a tap that looks ahead looks at what is there already.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import rows_below

_FEW = 16  # rows: two registers


@dataclasses.dataclass(frozen=True)
class Level:
    """One level, with the taps that can see something.

    Attributes:
        row: of its first tap in the weights `[j*w e]`.
        taps: how many; tap a looks back (a - center) dilation tokens.
        center: the tap that looks at the token itself.
        dilation: of it.
    """

    row: int
    taps: int
    center: int
    dilation: int

    @property
    def reach(self) -> int:
        """Tokens from the newest that a tap reads to the oldest."""
        return (self.taps - 1) * self.dilation

    @property
    def late(self) -> int:
        """Tokens by which its outputs come after its inputs."""
        return self.center * self.dilation


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
        levels: of the stack.
        t: tokens of a row.
        block: T, tokens of a step.
        rows: tokens that are worked on at once.
        residual: relu and residual; else linear.
        documents: tokens see those of their own document alone.
        segment: blocks whose levels the backward pass holds at once; causal if not all.
    """

    levels: tuple[Level, ...]
    t: int
    block: int
    rows: int
    residual: bool
    documents: bool
    segment: int

    @property
    def late(self) -> int:
        """Tokens by which the stack is late."""
        return sum(level.late for level in self.levels)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.t, self.block)

    @property
    def extra(self) -> int:
        """Blocks that pass before the first output."""
        return pl.cdiv(self.late, self.block)

    @property
    def hold(self) -> int:
        """Tokens by which inputs are held back, so that outputs are late by whole blocks."""
        return self.extra * self.block - self.late

    @property
    def segments(self) -> int:
        return pl.cdiv(self.blocks, self.segment)

    def margins(self) -> list[int]:
        """Rows before the block in the window of each level, forward."""
        held = [self.hold, *(0 for _ in self.levels[1:])]
        return [
            tpu.round_up(max(x.reach + h, 1), 8) for x, h in zip(self.levels, held, strict=True)
        ]

    def lateness(self) -> list[int]:
        """By how many tokens what each level reads is late, and at last what comes out."""
        return [sum(x.late for x in self.levels[:i]) for i in range(len(self.levels) + 1)]

    def earliness(self) -> list[int]:
        """Backward: by how many tokens what each level is given lies after the block's own."""
        return [sum(x.late for x in self.levels[i + 1 :]) for i in range(-1, len(self.levels))]

    def planes(self) -> list[int]:
        """Backward: rows before the first token of a segment in each level's plane."""
        late = self.lateness()
        more = self.rows if self.late else 0
        return [
            tpu.round_up(max(x.reach + late[i] + more, 1), 8) for i, x in enumerate(self.levels)
        ]


def plan_of(
    t: int, taps: int, dilations: tuple[int, ...], *, symmetric: bool, past: bool = False, **more
) -> Plan:
    """The plan of a stack; taps that reach nothing within t tokens are left out.

    Args:
        t: tokens of a row.
        taps: per level.
        dilations: one per level.
        symmetric: taps on both sides.
        past: there are tokens before the row.
        **more: fields of Plan.
    """
    levels = []
    for i, dilation in enumerate(dilations):
        most = taps if past else (t - 1) // dilation
        middle = taps // 2 if symmetric else 0
        center, back = min(middle, most), min(taps - 1 - middle, most)
        levels.append(Level(i * taps + middle - center, center + back + 1, center, dilation))
    return Plan(tuple(levels), t, **more)


# --- Pieces of the bodies -----------------------------------------------------------------------


def rows_at(ref, row, count: int):
    """Rows from `row` on of a `[n 128]` array."""
    return ref[pl.ds(row, count), :]


def each_rows(count: int, rows: int, body, carry=0):
    """Runs body(first row, carry) for all parts of a block."""
    if count == rows:
        return body(0, carry)
    step = lambda i, carry: body(pl.multiple_of(i * rows, rows), carry)
    return jax.lax.fori_loop(0, count // rows, step, carry)


def move(ref, to: int, start: int, count: int) -> None:
    """Rows [start, start + count) of an array to another place, a few at a time."""
    size = min(64, abs(to - start))
    whole = count // size
    if to < start:
        order = lambda i: i
        rest = [whole * size]
    else:
        order = lambda i: whole - 1 - i
        rest = []

    def part(row, size):
        ref[pl.ds(to + row, size), :] = ref[pl.ds(start + row, size), :]

    left = count - whole * size
    if to > start and left:
        part(whole * size, left)
    if whole == 1:
        part(0, size)
    elif whole:

        def step(i, carry):
            part(pl.multiple_of(order(i) * size, 8), size)
            return carry

        jax.lax.fori_loop(0, whole, step, 0)
    if rest and left:
        part(rest[0], left)


def tokens_below(x, count):
    """A block with 0 from the end of the row on; what a block has there is not to be read."""
    return rows_below(x.astype(jnp.float32), count)


def in_row(first, rows: int, t: int):
    """Whether places first, first + 1, ... lie in a row of t tokens, `[rows 128]`."""
    place = first + jax.lax.broadcasted_iota(jnp.int32, (rows, tpu.LANES), 0)
    return (place >= 0) & (place < t)


def columns(sights, ref) -> None:
    """Numbers per token `[r T]`, tokens on lanes, to `[r*T 128]`, one per row."""
    r, t = sights.shape
    for i in range(r):
        ref[i * t : (i + 1) * t, :] = jnp.broadcast_to(sights[i : i + 1], (tpu.LANES, t)).T


def seen(x, lag: int, behind, ahead):
    """0 where a tap of this lag would look into another document."""
    if behind is None:
        return x
    return jnp.where(behind >= lag if lag >= 0 else ahead >= -lag, x, 0)


def taps_of(ref, level: Level, row, rows: int, behind=None, ahead=None):
    """What each tap of a level reads, `[rows 128]`; tap 0 from `row` on."""
    read = functools.partial(rows_at, ref, count=rows)
    return [
        seen(
            read(row - a * level.dilation),
            (a - level.center) * level.dilation,
            behind,
            ahead,
        )
        for a in range(level.taps)
    ]


def weighted(taps, weight_ref, level: Level):
    """Their sum with the level's weights."""
    terms = [weight_ref[level.row + a : level.row + a + 1, :] * x for a, x in enumerate(taps)]
    if taps[0].shape[0] > _FEW:  # sums of several registers need not wait for each other
        return functools.reduce(operator.add, terms)
    while len(terms) > 1:
        pairs = [x + y for x, y in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]
