"""short_conv's forward kernel for Hopper: x is read once, y written once."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, kernel_call
from pallas_kernels.core.gpu_parts import named, only, sigmoid, vectors
from pallas_kernels.short_conv import gpu_parts as parts
from pallas_kernels.short_conv.gpu_parts import HALO, SLOTS, How, Refs


def forward(arrays: dict[str, jax.Array], how: How) -> jax.Array:
    """The kernel's call: y `[b t e]`.

    Args:
        arrays: x `[b t e]`, channels `[w+1 e]` (the taps, the bias), before `[b w-1 e]` (one row if
            w is 1) and, with documents, flags `[b 2 t]`. t is a multiple of the stretch, e of 128.
        how: settings.
    """
    x = arrays["x"]
    b, t, e = x.shape
    arrivals = 1 + how.documents
    own = {
        **parts.prefixed("", parts.buffers(arrays, how.tile, slots=SLOTS)),
        **parts.prefixed("halo_", parts.buffers(arrays, HALO)),
        **dict(channels=vectors(how.taps + 1), before=vectors(arrays["before"].shape[1])),
        "y": vectors(SLOTS, how.tile, dtype=x.dtype),
        "arrived": plgpu.Barrier(num_arrivals=arrivals, num_barriers=SLOTS),
        "begun": plgpu.Barrier(num_arrivals=arrivals + 2),
    }
    (y,) = kernel_call(
        named(lambda *refs: _body(*refs, how=how), arrays, ("y",), own),
        name="short_conv_forward",
        config=how.config,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        scratch_types=tuple(own.values()),
        grid=(b, e // WARPGROUP, t // how.stretch),
        grid_names=("rows", "blocks", "stretches"),
        approx_math=True,
        unsafe_no_auto_barriers=True,
    )(*arrays.values())
    return y


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How):
    row, here, stretch = parts.place()
    start, steps = stretch * how.stretch, how.stretch // how.tile

    def at(i):
        return row, pl.ds(start + i * how.tile, how.tile), here

    def load(i, slot):
        parts.load(ins, parts.tokens(own, "", slot), at(i), own["arrived"].at[slot])

    plgpu.copy_gmem_to_smem(ins["channels"].at[:, here], own["channels"], own["begun"])
    plgpu.copy_gmem_to_smem(ins["before"].at[row, :, here], own["before"], own["begun"])
    halo = parts.tokens(own, "halo_")
    just_before = pl.ds(lax.max(start - HALO, 0), HALO)
    parts.load(ins, halo, (row, just_before, here), own["begun"])
    for i in range(min(SLOTS, steps)):
        load(i, i)
    plgpu.barrier_wait(own["begun"])
    rows = parts.kept(how, own["before"])
    rows = parts.where_first(start, rows, parts.passed(how, halo, HALO, rows))
    weights = parts.taps(how, own["channels"])

    def step(i, rows):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(own["arrived"].at[slot])
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # this slot's results are out
        tokens = parts.tokens(own, "", slot)

        def one(t, rows):
            there = parts.flag(tokens, 0, t)
            x = only(there, parts.row(how, tokens.x, t))
            rows = parts.clear(parts.flag(tokens, 1, t), rows)
            s = parts.total(weights, rows, x)
            y = only(there, s * sigmoid(s) if how.silu else s)
            own["y"][slot, t] = y.astype(own["y"].dtype)
            return parts.push(there, rows, x) if rows else rows

        rows = parts.walk(how.tile, one, rows)
        plgpu.commit_smem()  # all have read this slot and written their results
        plgpu.copy_smem_to_gmem(own["y"].at[slot], outs["y"].at[at(i)])
        pl.when(i + SLOTS < steps)(lambda: load(i + SLOTS, slot))
        return rows

    lax.fori_loop(0, steps, step, rows)
    plgpu.wait_smem_to_gmem(0)
