"""The kernel that convolves tokens: a row of the batch and a few channels in a block.

Tokens come as they lie, channels beside one another; gated, they are turned round into a plane per
channel, which is transformed, multiplied by the kernel's spectrum and transformed back in its
place, channel by channel; then the planes are turned back, gated and written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core.gpu_parts import each, layout_cast, read
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.long_conv import gpu_stages
from pallas_kernels.long_conv.gpu_plan import ROWS, WARPGROUPS, Plan, waves
from pallas_kernels.long_conv.gpu_stages import BF16, WGMMA, Shared, meet, warpgroup


class Work(NamedTuple):
    """What a call does beside the convolution of x times its gate.

    Attributes:
        adjoint: a correlation instead.
        convolve: False = nothing but turning x round.
        keep: the planes are a result, `[b e kept 2M]` bfloat16.
        pair: planes of another call come in, and the spectrum of the kernel's gradient goes out,
            `[b e 2 2 64 M]`: warpgroup, real and imaginary part, r, q.
        gated: whether x has a gate.
        bias: whether there is one.
    """

    adjoint: bool = False
    convolve: bool = True
    keep: bool = False
    pair: bool = False
    gated: bool = False
    bias: bool = False


def convolve(
    x: jax.Array,
    gate: jax.Array | None,
    spectrum: jax.Array,
    bias: jax.Array | None,
    planes: jax.Array | None,
    gates: tuple[jax.Array | None, ...],
    *,
    name: str,
    adjoint: bool = False,
    keep: bool = False,
    plan: Plan,
) -> list[jax.Array]:
    """The convolution of x times gate, times each of gates (None = 1).

    Args:
        x: `[b rows 2M e]`.
        gate: of its shape.
        spectrum: of kernels, `[e 2 2 64 M]`.
        bias: `[e]` float32.
        planes: see Work.
        gates: of x's shape; an output for each, in its dtype.
        name: of the kernel.
        adjoint: see Work.
        keep: see Work.
        plan: see Plan.

    Returns:
        The outputs, then planes, then the gradient's spectrum, those that are wanted.
    """
    b, _, _, e = x.shape
    work = Work(adjoint, bool(gates), keep, planes is not None, gate is not None, bias is not None)
    outputs = [jax.ShapeDtypeStruct(x.shape, (x if g is None else g).dtype) for g in gates]
    if keep:
        outputs.append(jax.ShapeDtypeStruct((b, e, plan.kept, plan.width), BF16))
    if work.pair:
        outputs.append(jax.ShapeDtypeStruct((b, *spectrum.shape), BF16))
    given = [x, gate, spectrum, bias, planes, *gates, *waves(plan)]
    body = functools.partial(_body, plan=plan, work=work, gates=tuple(g is not None for g in gates))
    plane = plgpu.SMEM((plan.channels, ROWS, plan.width), BF16)
    stage = plgpu.SMEM((WARPGROUPS, plan.piece, plan.width, plan.channels), BF16)
    return gpu.kernel_call(
        body,
        name=name,
        config=plan.config,
        out_type=outputs,
        grid=(e // plan.channels, b),
        grid_names=("channels", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[*gpu_stages.shared(plan), plane, stage],
        approx_math=True,
    )(*(a for a in given if a is not None))


class _Tokens(NamedTuple):
    """Where a block's tokens are, in shared memory and in memory."""

    planes: Any
    stage: Any
    row: Any
    channels: Any


def _body(*refs, plan: Plan, work: Work, gates: tuple[bool, ...]):
    rest = Refs(refs)
    take = rest.take
    x, gate, spectrum, bias = take(), take(work.gated), take(), take(work.bias)
    pair = take(work.pair)
    gates_in = [take(there) for there in gates]
    first, last, second, odd = rest.several(4)
    outputs = [take() for _ in gates]
    kept, gradient = take(work.keep), take(work.pair)
    shared = Shared(*rest.several(len(Shared._fields)))
    channels = pl.ds(jax.lax.axis_index("channels") * plan.channels, plan.channels)
    tokens = _Tokens(take(), take(), jax.lax.axis_index("batch"), channels)

    if work.convolve:
        gpu_stages.fetch_waves(first, last, second, shared, plan)
    _load(x, gate, tokens, shared, plan)
    meet(shared)
    if work.keep:
        _keep(kept, tokens, shared, plan)
    if not work.convolve:
        return
    row_layout = WGMMA.reduce(1)
    rho = tuple(read(odd.at[i], row_layout, plan.config) for i in (0, 1))

    columns = gpu_stages.blocks(plan, plan.m)

    def channel(c):
        e, w = channels.start + c, warpgroup()
        operand = shared.operands.at[w + shared.zero[0]]
        for block in gpu_stages.blocks(plan, plan.width):
            line = tokens.planes[c, :, block]
            operand[:, block] = layout_cast(line, gpu_stages.lines(plan), plan.config)
        plgpu.commit_smem()
        gpu_stages.first_stage(operand, rho, shared, plan)
        spectrum_of = lambda at: gpu_stages.second_stage(operand, at, shared, plan)
        if work.pair:
            mine = [gpu_stages.narrow(*spectrum_of(at)) for at in columns]
            meet(shared)  # the plane was read: there is room in it
            for i, part in enumerate(mine[1] if len(mine) > 1 else ()):
                tokens.planes[c, :, _spare(2 * w + i, plan)] = part
            for block in gpu_stages.blocks(plan, plan.width):
                _other(pair.at[tokens.row, e, :, block], operand.at[:, block], plan)
            plgpu.commit_smem()
            gpu_stages.first_stage(operand, rho, shared, plan)
        products = []
        for i, at in enumerate(columns):
            x, y = spectrum_of(at)
            if work.pair:
                p, q = x, y
                x, y = (
                    mine[0]
                    if i == 0
                    else (
                        read(tokens.planes.at[c, :, _spare(2 * w + j, plan)], WGMMA, plan.config)
                        for j in (0, 1)
                    )
                )
                x, y = x.astype(jnp.float32), y.astype(jnp.float32)
                gradient[tokens.row, e, w, 0, :, at] = (p * x + q * y).astype(BF16)
                gradient[tokens.row, e, w, 1, :, at] = (p * y - q * x).astype(BF16)
            k, l = (
                read(spectrum.at[e, w, j, :, at], WGMMA, plan.config).astype(jnp.float32)
                for j in (0, 1)
            )
            l = -l if work.adjoint else l
            products.append(gpu_stages.narrow(x * k - y * l, x * l + y * k))
        gpu_stages.put(operand, products, plan)
        z = gpu_stages.back(operand, rho, shared, plan)
        tokens.planes[c, :, pl.ds(plan.m * w, plan.m)] = z.astype(BF16)

    each(plan.channels, channel)
    meet(shared)
    _store(outputs, gates_in, bias, tokens, plan)


def _spare(i, plan: Plan):
    """Columns of a plane, for a quarter of it."""
    return pl.ds(plan.tile * i, plan.tile)


def _pieces(plan: Plan, body) -> None:
    """Runs body(first row) for each piece of this warpgroup."""

    pieces = plan.rows // plan.piece

    def step(i):
        at = WARPGROUPS * i + warpgroup()
        if pieces % WARPGROUPS:
            pl.when(at < pieces)(lambda: body(at * plan.piece))
        else:
            body(at * plan.piece)

    each(-(-pieces // WARPGROUPS), step)


def _single(plan: Plan) -> Any:
    """The layout of a piece of one channel: one number per thread and step."""
    return plgpu.Layout.WG_STRIDED((plan.piece, plan.width, 1), vec_size=1)


def _load(x, gate, tokens: _Tokens, shared: Shared, plan: Plan) -> None:
    """Fills the planes."""
    if plan.rows < ROWS:

        def clear(c):
            tokens.planes[c] = jnp.zeros((ROWS, plan.width), BF16)

        pl.when(warpgroup() == 0)(lambda: each(plan.channels, clear))
        meet(shared)
    stage = tokens.stage.at[warpgroup()]

    def piece(row):
        at = (tokens.row, pl.ds(row, plan.piece), slice(None), tokens.channels)
        v = x[at]
        if gate is not None:
            v = (v.astype(jnp.float32) * gate[at].astype(jnp.float32)).astype(BF16)
        stage[...] = v
        for c in range(plan.channels):
            line = layout_cast(stage[:, :, pl.ds(c, 1)], _single(plan), plan.config)
            tokens.planes[c, pl.ds(row, plan.piece), :] = line.reshape(plan.piece, plan.width)

    _pieces(plan, piece)


def _keep(kept, tokens: _Tokens, shared: Shared, plan: Plan) -> None:
    """Writes the planes as they are."""
    plgpu.commit_smem()
    meet(shared)

    @pl.when(warpgroup() == 0)
    def _():
        def one(c):
            target = kept.at[tokens.row, tokens.channels.start + c]
            plgpu.copy_smem_to_gmem(tokens.planes.at[c, : plan.kept], target)

        each(plan.channels, one)
        plgpu.wait_smem_to_gmem(0)

    meet(shared)


def _other(source, target, plan: Plan) -> None:
    """Rows of a plane in memory into an operand; the rest is 0."""
    lines = gpu_stages.lines(plan)
    if plan.kept < ROWS:
        nothing = jnp.zeros((ROWS, plan.tile), BF16)
        target[...] = layout_cast(nothing, lines, plan.config)
    line = read(source, lines, plan.config)
    target[: plan.kept, :] = line


def _store(outputs, gates, bias, tokens: _Tokens, plan: Plan) -> None:
    """Planes times each gate to each output."""
    stage = tokens.stage.at[warpgroup()]

    def piece(row):
        for c in range(plan.channels):
            line = tokens.planes[c, pl.ds(row, plan.piece), :]
            line = layout_cast(line.reshape(plan.piece, plan.width, 1), _single(plan), plan.config)
            if bias is not None:
                line = (line.astype(jnp.float32) + bias[tokens.channels.start + c]).astype(BF16)
            stage[:, :, pl.ds(c, 1)] = line
        z = stage[...].astype(jnp.float32)
        at = (tokens.row, pl.ds(row, plan.piece), slice(None), tokens.channels)
        for output, gate in zip(outputs, gates, strict=True):
            y = z if gate is None else z * gate[at].astype(jnp.float32)
            output[at] = y.astype(output.dtype)

    _pieces(plan, piece)
