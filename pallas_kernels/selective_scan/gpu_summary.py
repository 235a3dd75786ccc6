"""What a stretch of time does to the state, for Hopper: so that stretches can run side by side.

A few rows of few channels do not fill the chip. Time is then cut into stretches, which are rows of
their own once the state before each is known. Computed here: the state that a stretch leaves behind
if it begins with zeros, and its decay; gpu_stretches.py joins them. Backward it is the gradient
that a stretch hands to the one before.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, kernel_call
from pallas_kernels.core.gpu_parts import each, named, only, vectors
from pallas_kernels.selective_scan import gpu_parts as parts
from pallas_kernels.selective_scan.gpu_parts import F32, SLOTS, How, Refs

FORWARD, REVERSE = ("u", "delta"), ("delta", "dy", "z")


def summary(arrays: dict[str, jax.Array], how: How, *, reverse: bool = False):
    """The kernel's call.

    Args:
        arrays: as for `forward`, or if `reverse` as for `backward`, without states.
        how: settings.
        reverse: whether the gradient by the state is meant, from the last token to the first.

    Returns:
        The state after each row `[b n e]` (the gradient by that before it), if it begins with
        zeros, and the sum of the step sizes `[b 1 e]`.
    """
    names = tuple(x for x in (REVERSE if reverse else FORWARD) if x in arrays)
    given = {x: arrays[x] for x in (*names, "along", "channels")}
    b, t, e = arrays["delta"].shape
    outputs = dict(
        h=jax.ShapeDtypeStruct((b, how.n, e), F32), d=jax.ShapeDtypeStruct((b, 1, e), F32)
    )
    own = {x: vectors(SLOTS, how.tile, dtype=arrays[x].dtype) for x in names}
    own |= dict(
        along=plgpu.SMEM((SLOTS, how.along, how.tile), F32),
        channels=vectors(how.n + 2),
        h=vectors(how.n),
        d=vectors(1),
        arrived=plgpu.Barrier(num_arrivals=len(names) + 1, num_barriers=SLOTS),
        begun=plgpu.Barrier(),
    )
    run = lambda *refs: _body(*refs, how=how, names=names, steps=t // how.tile, reverse=reverse)
    return kernel_call(
        named(run, given, outputs, own),
        name=f"selective_scan_{'reverse_' if reverse else ''}summary",
        config=how.config,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(own.values()),
        grid=(b, e // WARPGROUP),
        grid_names=("rows", "blocks"),
        approx_math=True,
        unsafe_no_auto_barriers=True,
    )(*given.values())


def _body(
    ins: Refs, outs: Refs, own: Refs, *, how: How, names: tuple[str, ...], steps: int, reverse: bool
):
    row, here = parts.place()
    tile, group = how.tile, how.config.group
    arrived = own["arrived"]

    def load(i, slot):
        time = pl.ds((steps - 1 - i if reverse else i) * tile, tile)
        parts.loads(ins, own, names, (row, time, here), slot, arrived.at[slot])

    plgpu.copy_gmem_to_smem(ins["channels"].at[:, here], own["channels"], own["begun"])
    for i in range(min(SLOTS, steps)):
        load(i, i)
    zero = jnp.zeros((WARPGROUP,), F32)

    def clear(n):
        own["h"][n] = zero

    each(how.n, clear)
    plgpu.barrier_wait(own["begun"])

    def step(i, total):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(arrived.at[slot])

        def some(k, total):
            first = (tile - group - k * group) if reverse else k * group
            return total + _group(own, slot, first, how, reverse)

        total = lax.fori_loop(0, tile // group, some, total)
        plgpu.commit_smem()  # all have read this slot
        pl.when(i + SLOTS < steps)(lambda: load(i + SLOTS, slot))
        return total

    own["d"][0] = lax.fori_loop(0, steps, step, zero)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own["h"], outs["h"].at[row, :, here])
    plgpu.copy_smem_to_gmem(own["d"], outs["d"].at[row, :, here])
    plgpu.wait_smem_to_gmem(0)


def _group(own: Refs, slot: jax.Array, first: jax.Array, how: How, reverse: bool) -> jax.Array:
    """Passes some tokens over the states; the sum of their step sizes."""
    group, at_a_time = how.config.group, how.config.states
    ds, inputs = [], []
    for t in (first + g for g in range(group)):
        there = parts.there(own, slot, t, how)
        ds.append(parts.step_size(own, slot, t, there, how))
        if reverse:
            slots: Refs = {x: own[x].at[slot] for x in ("dy", "z") if x in own}
            inputs.append(parts.gradient(slots, there, t, how).before_gate)
        else:
            inputs.append(ds[-1] * only(there, parts.row(how, own["u"], slot, t).astype(F32)))
    forgets = parts.forgets(own, slot, first, group, how)
    order = range(group)[::-1] if reverse else range(group)

    def some(i):
        for j in range(at_a_time):
            n = i * at_a_time + j
            rates, h = (parts.row(how, own[x], n) for x in ("channels", "h"))
            scalars = parts.scalars(own, slot, how.n + n if reverse else n, first, group)
            for g in order:
                decay = parts.decay(ds[g], rates, forgets[g])
                by = inputs[g] * scalars[g]
                h = decay * (h + by) if reverse else decay * h + by
            own["h"][n] = h

    each(how.n // at_a_time, some)
    return sum(ds[1:], ds[0])
