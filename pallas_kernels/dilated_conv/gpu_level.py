"""A level of the stack by one kernel each way: a thread has a channel and walks along a phase.

With dilation d, token t lies in row t // d, phase t % d: taps then step from row to row, and what
they read is the last w inputs, which stay in registers. A block of threads has 128 channels and a
part of the rows of one phase, then of the next; rows come 16 at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core.gpu_parts import each, layout_cast

LANES = gpu.WARPGROUP
LINE = plgpu.Layout.WG_STRIDED((LANES,), 1)
STAGES = 3  # chunks of rows that are on their way or worked on
# Numbers of a chunk's rows: TMA brings each chunk to a place of its own, and places must lie 128
# bytes apart. Fewer rows are filled up.
NUMBERS = 32
_BLOCKS = 3 * 132  # that keep a device busy
_LEAST = 8  # chunks of a part: what its neighbours have is read again


class Walk(NamedTuple):
    """What is static of a level.

    Attributes:
        taps: w.
        ahead: of them, those that look ahead.
        dilation: d.
        rows: of a chunk, at least w - 1.
        chunks: of a part.
        parts: of the rows.
        phases: that a block of threads takes, one after the other.
        residual: whether a level is added to what it reads.
        sights: numbers per token: 0, 1 (how many rows behind it sees) or 2 (and ahead).
        past: whether there are rows before the first.
    """

    taps: int
    ahead: int
    dilation: int
    rows: int
    chunks: int
    parts: int
    phases: int
    residual: bool
    sights: int
    past: bool

    @property
    def behind(self) -> int:
        """Taps that look back."""
        return self.taps - 1 - self.ahead

    @property
    def late(self) -> int:
        """Chunks by which outputs are late: what looks ahead waits."""
        return int(self.ahead > 0)

    @property
    def edge(self) -> int:
        """Rows before a part that are read first."""
        return self.rows * (1 + self.late)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups of phases, and parts."""
        return self.dilation // self.phases, self.parts


def walk_of(b: int, t: int, e: int, taps: int, dilation: int, **more: Any) -> Walk:
    """How a level of `[b t e]` is walked; e is a multiple of 128."""
    rows = chunk_rows(taps)
    chunks = pl.cdiv(pl.cdiv(t, dilation), rows)
    blocks = b * (e // LANES)
    fits = lambda n, most: max(i for i in range(1, max(1, min(n, most)) + 1) if n % i == 0)
    phases = fits(dilation, blocks * dilation // _BLOCKS)
    most = min(chunks // _LEAST, _BLOCKS // (blocks * (dilation // phases)))
    parts = 1 if more["past"] else fits(chunks, most)
    return Walk(
        taps=taps, dilation=dilation, rows=rows, chunks=chunks // parts, parts=parts,
        phases=phases, **more,
    )  # fmt: skip


def chunk_rows(taps: int) -> int:
    """Rows of a chunk."""
    return 16 if taps <= 17 else 32


# --- What both kernels are made of --------------------------------------------------------------


class Place(NamedTuple):
    """Where a block of threads is: row of the batch, channels, phase, part."""

    row: Any
    channels: Any
    phase: Any
    part: Any

    def rows(self, first: Any, n: int) -> tuple[Any, ...]:
        """n rows of `[b n d e]`."""
        lanes = pl.ds(self.channels * LANES, LANES)
        return self.row, pl.ds(first, n), self.phase, lanes

    def block(self, n: int, index) -> plgpu.BlockSpec:
        """The same rows as a block of a pipeline; index(step) gives which, in blocks."""
        where = lambda c: (self.row, index(c), self.phase, self.channels)
        return plgpu.BlockSpec((None, n, None, LANES), where)

    def numbers(self, walk: Walk, index) -> plgpu.BlockSpec:
        """Numbers of a chunk's rows, of `[b*d chunks 32]`."""
        where = lambda c: (self.row * walk.dilation + self.phase, index(c), 0)
        return plgpu.BlockSpec((None, None, NUMBERS), where)


def places(walk: Walk):
    """The function of a phase (0 ... walk.phases - 1) that gives the Place."""
    row, channels, group, part = (
        lax.axis_index(name) for name in ("batch", "channels", "phases", "part")
    )
    return lambda i: Place(row, channels, group * walk.phases + i, part)


class Lines:
    """Makes lines `[128]`, a number for each thread, whose layout is told.

    Mosaic would find it out by trying, for each line that depends on no other: so there are few
    of those, made once.
    """

    def __init__(self, walk: Walk, config):
        self.of = lambda x: layout_cast(x, LINE, config)
        self.zero = self.of(jnp.zeros((LANES,), jnp.float32))
        lags = range(max(walk.behind, walk.ahead) + 1) if walk.sights else ()
        self.lags = [self.of(jnp.full((LANES,), lag, jnp.int32)) for lag in lags]

    def every(self, scalar: Any) -> jax.Array:
        """A number or a flag for every thread."""
        return self.of(jnp.broadcast_to(scalar, (LANES,)))

    def rows(self, ref, n: int) -> list[jax.Array]:
        """The first n rows of a reference `[n 128]`, in float32."""
        return [self.of(ref[i]).astype(jnp.float32) for i in range(n)]

    def only(self, here, x: jax.Array) -> jax.Array:
        """x, or 0 where flags say that there is nothing; None = it is there."""
        return x if here is None else lax.select(here, x, self.zero)


def before(refs, at: Place, walk: Walk, lines: Lines) -> list[jax.Array]:
    """What the first step of a part has of rows before: as many as taps look back, and a chunk more
    if outputs are late."""
    edge_s, barrier = refs["edge_s"], refs["barrier"]
    n = walk.behind + walk.late * walk.rows
    if n == 0 or (walk.parts == 1 and not walk.past):
        return [lines.zero] * n
    if walk.past:
        source, there = refs["past"].at[at.rows(0, walk.edge)], None
    else:
        first = at.part * (walk.chunks * walk.rows)
        there = first > 0
        source = refs["x"].at[at.rows(lax.max(first - walk.edge, 0), walk.edge)]
    plgpu.copy_gmem_to_smem(source, edge_s, barrier)
    plgpu.barrier_wait(barrier)
    rows = lines.rows(edge_s, walk.edge)[walk.edge - n :]
    if there is None:
        return rows
    there = lines.every(there)
    return [lines.only(there, row) for row in rows]


def seen_by(sights, i: int, walk: Walk, lines: Lines) -> list[Any]:
    """Whether row i of a chunk sees what each of its taps reads; None = it does."""
    if not sights:
        return [None] * walk.taps
    numbers = [lines.every(ref[i]) for ref in sights]
    lags = [j - walk.ahead for j in range(walk.taps)]
    return [numbers[lag < 0] >= lines.lags[abs(lag)] for lag in lags]


def sum_of(values, i: int, weights, seen, walk: Walk, lines: Lines) -> jax.Array:
    """The convolution at row i of a chunk; values from as far before as taps look back."""
    total = weights[walk.taps]
    for j in range(walk.taps):
        value = values[walk.behind + i - j + walk.ahead]
        total = total + weights[j] * lines.only(seen[j], value)
    return total


def weight_rows(refs, walk: Walk, lines: Lines) -> list[jax.Array]:
    """Weights of the taps and at last the bias."""
    lanes = pl.ds(lax.axis_index("channels") * LANES, LANES)
    plgpu.copy_gmem_to_smem(refs["weight"].at[:, lanes], refs["weight_s"], refs["barrier"])
    plgpu.barrier_wait(refs["barrier"])
    return lines.rows(refs["weight_s"], walk.taps + 1)


def scratch(walk: Walk, dtype) -> dict[str, Any]:
    """That of both kernels; dtype is that of what is read before a part."""
    return dict(
        weight_s=plgpu.SMEM((walk.taps + 1, LANES), jnp.float32),
        edge_s=plgpu.SMEM((walk.edge, LANES), jnp.float32 if walk.past else dtype),
        barrier=plgpu.Barrier(),
    )


def arguments(x, weight, bias, past, sights) -> dict[str, Any]:
    """Those of both kernels by name."""
    found = dict(x=x, weight=jnp.concatenate([weight, bias[None]]))
    if past is not None:
        found["past"] = past
    return found | dict(zip(("sees_behind", "sees_ahead"), sights, strict=False))


# --- Forward ------------------------------------------------------------------------------------


def forward(x, weight, bias, past, sights, walk: Walk, dtype, config):
    """The next level `[b n d e]`.

    Args:
        x: `[b n d e]`, n rows of d phases.
        weight: `[w e]`, bias: `[e]`, float32.
        past: float32 `[b walk.edge d e]`, the rows before the first; None = zeros.
        sights: walk.sights arrays int32 `[b*d chunks 32]`, rows that a token sees behind (and
            ahead), those of a chunk's rows first; -1 at padding.
        walk: see Walk.
        dtype: of the result.
        config: of the form.
    """
    b, _, _, e = x.shape
    given = arguments(x, weight, bias, past, sights)
    own = scratch(walk, x.dtype) | dict(y_s=plgpu.SMEM((2, walk.rows, LANES), dtype))

    def body(*refs):
        _forward_kernel(dict(zip((*given, "y", *own), refs, strict=True)), walk, config)

    return gpu.kernel_call(
        body,
        name="dilated_conv_forward",
        config=config,
        out_type=jax.ShapeDtypeStruct(x.shape, dtype),
        grid=(b, e // LANES, *walk.grid),
        grid_names=("batch", "channels", "phases", "part"),
        scratch_types=list(own.values()),
    )(*given.values())


def _forward_kernel(refs, walk: Walk, config):
    lines, place = Lines(walk, config), places(walk)
    weights = weight_rows(refs, walk, lines)
    last = walk.parts * walk.chunks - 1
    names = [name for name in ("sees_behind", "sees_ahead") if name in refs]

    def phase(index):
        at = place(index)
        first = at.part * walk.chunks

        def step(indices, x_s, *more):
            (c,), (sights, values) = indices, (more[:-1], more[-1])
            new = lines.rows(x_s, walk.rows)
            if walk.late:
                there = lines.every(first + c <= last)
                new = [lines.only(there, row) for row in new]
            values = [*values, *new]
            y_s = refs["y_s"].at[lax.rem(c, 2)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for i in range(walk.rows):
                seen = seen_by(sights, i, walk, lines)
                y = sum_of(values, i, weights, seen, walk, lines)
                if walk.residual:
                    y = values[walk.behind + i] + lax.max(y, lines.zero)
                y_s[i] = lines.only(seen[walk.ahead], y).astype(y_s.dtype)
            plgpu.commit_smem()

            def store():
                rows = at.rows((first + c - walk.late) * walk.rows, walk.rows)
                plgpu.copy_smem_to_gmem(y_s, refs["y"].at[rows])

            if walk.late:
                pl.when(c > 0)(store)
            else:
                store()
            return tuple(values[walk.rows :])

        now = lambda c: lax.min(first + c, last)
        done = lambda c: lax.max(first + c - walk.late, 0)
        plgpu.emit_pipeline(
            step,
            grid=(walk.chunks + walk.late,),
            in_specs=[
                at.block(walk.rows, now),
                *(at.numbers(walk, done) for _ in names),
            ],
            max_concurrent_steps=STAGES,
            init_carry=tuple(before(refs, at, walk, lines)),
        )(refs["x"], *(refs[name] for name in names))
        plgpu.wait_smem_to_gmem(0)

    each(walk.phases, phase)
