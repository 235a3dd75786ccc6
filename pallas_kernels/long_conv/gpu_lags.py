"""The kernels for lags: their spectra, and from the gradient of a spectrum to that of lags.

Lags of a channel lie beside one another, as a plane does: nothing is turned round. A block has one
channel (of the gradient a few, one after the other, as it has the rows of the batch).
"""

import functools

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

_CHANNELS = 4  # of a block, on a device: the constant matrices are brought for all of them


def _block(plan: Plan) -> int:
    return min(_CHANNELS, plan.channels)


def spectra(
    kernel: jax.Array, reverse: jax.Array | None, skip: jax.Array | None, plan: Plan
) -> jax.Array:
    """The spectrum of both kernels and the skip, times 2 / n: `[e 2 2 64 M]` bfloat16.

    Args:
        kernel: lags 0, 1, ..., `[e 64 2M]`.
        reverse: lags -1, -2, ..., or None.
        skip: `[e]` float32, or None.
        plan: see Plan.
    """
    e = kernel.shape[0]
    given = [kernel, reverse, skip, *waves(plan)]
    body = functools.partial(
        _spectra, plan=plan, two_sided=reverse is not None, skipped=skip is not None
    )
    return _call(
        body,
        "long_conv_spectra",
        jax.ShapeDtypeStruct((e, 2, 2, ROWS, plan.m), BF16),
        e,
        plan,
        [a for a in given if a is not None],
    )


def lags(spectrum: jax.Array, two_sided: bool, plan: Plan) -> list[jax.Array]:
    """The gradients of lags, `[e 64 2M]` float32, of the kernel and of the reverse kernel.

    Args:
        spectrum: of the gradient, `[b e 2 2 64 M]`, a share for each row of the batch.
        two_sided: whether there is a reverse kernel.
        plan: see Plan.
    """
    b, e = spectrum.shape[:2]
    shape = jax.ShapeDtypeStruct((e, ROWS, plan.width), jnp.float32)
    body = functools.partial(_lags, plan=plan, two_sided=two_sided, batch=b)
    outputs = [shape] * (1 + two_sided)
    return _call(body, "long_conv_lags", outputs, e // _block(plan), plan, [spectrum, *waves(plan)])


def _call(body, name: str, out_type, blocks: int, plan: Plan, arrays):
    return gpu.kernel_call(
        body,
        name=name,
        config=plan.config,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("channels",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=gpu_stages.shared(plan),
        approx_math=True,
    )(*arrays)


def _ahead(x, y, columns: slice, refs: Shared, plan: Plan):
    """Some columns of a spectrum x + i y: its conjugate, times exp(i pi k / n), k frequencies."""
    r, q = (gpu_stages.place((ROWS, plan.tile), axis, plan) for axis in (0, 1))
    k = 2 * r + (1 - 256 * warpgroup() + 512 * columns.start + refs.zero[0]) + 512 * q
    # Of the angles' whole turns nothing is left: sin.approx is good up to half a turn.
    k = jnp.where(k > plan.n, k - 2 * plan.n, k)
    angles = k.astype(jnp.float32) * jnp.float32(jnp.pi / plan.n)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return cos * x + sin * y, sin * x - cos * y


def _spectra(*refs, plan: Plan, two_sided: bool, skipped: bool):
    rest = Refs(refs)
    kernel, reverse, skip = rest.take(), rest.take(two_sided), rest.take(skipped)
    first, last, second, odd, out = rest.several(5)
    shared = Shared(*rest.several(len(Shared._fields)))
    w, columns = warpgroup(), gpu_stages.blocks(plan, plan.m)
    gpu_stages.fetch_waves(first, last, second, shared, plan)
    meet(shared)
    rho = tuple(read(odd.at[i], WGMMA.reduce(1), plan.config) for i in (0, 1))

    e = jax.lax.axis_index("channels")
    operand, found = shared.operands.at[w], []
    for source in (kernel, reverse):
        if source is None:
            continue
        for block in gpu_stages.blocks(plan, plan.width):
            line = read(source.at[e, :, block], gpu_stages.lines(plan), plan.config)
            operand[:, block] = line.astype(BF16)
        plgpu.commit_smem()
        gpu_stages.first_stage(operand, rho, shared, plan)
        for i, at in enumerate(columns):
            x, y = gpu_stages.second_stage(operand, at, shared, plan)
            if source is kernel:
                found.append((x, y))
            else:
                p, q = found[i]
                x, y = _ahead(x, y, at, shared, plan)
                found[i] = p + x, q + y
    scale = 2 / plan.n
    for at, (x, y) in zip(columns, found, strict=True):
        x = x * scale if skip is None else (x + skip[e]) * scale
        out[e, w, 0, :, at] = x.astype(BF16)
        out[e, w, 1, :, at] = (y * scale).astype(BF16)


def _lags(spectrum, first, last, second, odd, *refs, plan: Plan, two_sided: bool, batch: int):
    outputs, shared = refs[: 1 + two_sided], Shared(*refs[1 + two_sided :])
    w, columns = warpgroup(), gpu_stages.blocks(plan, plan.m)
    gpu_stages.fetch_waves(first, last, second, shared, plan)
    meet(shared)
    rho = tuple(read(odd.at[i], WGMMA.reduce(1), plan.config) for i in (0, 1))

    def channel(c):
        e = jax.lax.axis_index("channels") * _block(plan) + c
        operand = shared.operands.at[w + shared.zero[0]]

        def total(part: int, at: slice):
            of = lambda row: read(spectrum.at[row, e, w, part, :, at], WGMMA, plan.config)
            start = layout_cast(jnp.zeros((ROWS, plan.tile), jnp.float32), WGMMA, plan.config)
            add = lambda row, sums: sums + of(row).astype(jnp.float32)
            return jax.lax.fori_loop(0, batch, add, start) * (2 / plan.n)

        parts: list[list] = [[] for _ in outputs]
        for at in columns:
            x, y = total(0, at), total(1, at)
            parts[0].append(gpu_stages.narrow(x, y))
            if two_sided:
                parts[1].append(gpu_stages.narrow(*_ahead(x, y, at, shared, plan)))
        for output, mine in zip(outputs, parts, strict=True):
            gpu_stages.put(operand, mine, plan)
            z = gpu_stages.back(operand, rho, shared, plan)
            for i in (0, 1):

                @pl.when(w == i)
                def _(i=i, z=z, output=output):
                    output[e, :, gpu_stages.halves(plan)[i]] = z

    each(_block(plan), channel)
