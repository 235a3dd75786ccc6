"""selective_scan's forward kernel for Hopper: a block walks over time with 128 channels."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, kernel_call
from pallas_kernels.core.gpu_parts import each, named, only, sigmoid, vectors
from pallas_kernels.selective_scan import gpu_parts as parts
from pallas_kernels.selective_scan.gpu_parts import F32, SLOTS, How, Refs

TOKENS = ("u", "delta", "z")


def forward(arrays: dict[str, jax.Array], how: How, *, save: bool) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: u, delta, perhaps z `[b t e]`; along `[b 2n+2 t]` (B, C, flags) and channels
            `[n+2 e]` (A log2 e, D, delta_bias) as How says; h `[b n e]`. t is a multiple of the
            chunk, e of 128.
        how: settings.
        save: whether the backward pass will want the states at the starts of chunks.

    Returns:
        y `[b t e]`, the last state h `[b n e]`, and if `save` starts `[b t/chunk n e]`.
    """
    u, n = arrays["u"], how.n
    b, t, e = u.shape
    state = jax.ShapeDtypeStruct((b, n, e), F32)
    outputs = dict(y=jax.ShapeDtypeStruct(u.shape, u.dtype), h=state)
    if save:
        outputs["starts"] = jax.ShapeDtypeStruct((b, t // how.chunk, n, e), F32)
    names = tuple(x for x in TOKENS if x in arrays)
    own = {x: vectors(SLOTS, how.tile, dtype=arrays[x].dtype) for x in names}
    own |= dict(
        along=plgpu.SMEM((SLOTS, how.along, how.tile), F32),
        channels=vectors(n + 2),
        h=vectors(n),
        y=vectors(SLOTS, how.tile, dtype=u.dtype),
        arrived=plgpu.Barrier(num_arrivals=len(names) + 1, num_barriers=SLOTS),
        begun=plgpu.Barrier(num_arrivals=2),
    )
    if save:
        own["start"] = vectors(SLOTS, n)
    found = kernel_call(
        named(
            lambda *refs: _body(*refs, how=how, names=names, steps=t // how.tile),
            arrays,
            outputs,
            own,
        ),
        name="selective_scan_forward",
        config=how.config,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(own.values()),
        grid=(b, e // WARPGROUP),
        grid_names=("rows", "blocks"),
        approx_math=True,
        unsafe_no_auto_barriers=True,
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How, names: tuple[str, ...], steps: int):
    row, here = parts.place()
    tile = how.tile
    arrived = own["arrived"]

    def load(i, slot):
        at = (row, pl.ds(i * tile, tile), here)
        parts.loads(ins, own, names, at, slot, arrived.at[slot])

    def put_start(slot, chunk):  # goes with the results of the step
        to = outs["starts"].at[row, chunk, :, here]
        plgpu.copy_smem_to_gmem(own["start"].at[slot], to, commit_group=False)

    plgpu.copy_gmem_to_smem(ins["channels"].at[:, here], own["channels"], own["begun"])
    plgpu.copy_gmem_to_smem(ins["h"].at[row, :, here], own["h"], own["begun"])
    for i in range(min(SLOTS, steps)):
        load(i, i)
    plgpu.barrier_wait(own["begun"])

    def step(i, carry):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(arrived.at[slot])
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # this slot's results are out
        saves = lax.rem(i * tile, how.chunk) == 0
        if "starts" in outs:
            pl.when(saves)(lambda: _keep(own, slot, how))
        each(tile // how.config.group, lambda k: _group(own, slot, k, how))
        plgpu.commit_smem()  # all have read this slot and written their results
        if "starts" in outs:
            pl.when(saves)(lambda: put_start(slot, lax.div(i * tile, how.chunk)))
        y = outs["y"].at[row, pl.ds(i * tile, tile), here]
        plgpu.copy_smem_to_gmem(own["y"].at[slot], y)
        pl.when(i + SLOTS < steps)(lambda: load(i + SLOTS, slot))
        return carry

    lax.fori_loop(0, steps, step, None)
    plgpu.copy_smem_to_gmem(own["h"], outs["h"].at[row, :, here])
    plgpu.wait_smem_to_gmem(0)


def _keep(own: Refs, slot: jax.Array, how: How) -> None:
    def one(n):
        own["start"][slot, n] = parts.row(how, own["h"], n)

    each(how.n, one)


def _group(own: Refs, slot: jax.Array, k: jax.Array, how: How) -> None:
    """Passes some tokens over the states and writes their y."""
    group, at_a_time = how.config.group, how.config.states
    first = k * group
    tokens = [parts.token(own, slot, first + g, how) for g in range(group)]
    dus = [x.d * x.u for x in tokens]
    forgets = parts.forgets(own, slot, first, group, how)

    def some(i, ys):
        ys = list(ys)
        for j in range(at_a_time):
            n = i * at_a_time + j
            rates, h = (parts.row(how, own[x], n) for x in ("channels", "h"))
            Bs, Cs = (parts.scalars(own, slot, i, first, group) for i in (n, how.n + n))
            for g, x in enumerate(tokens):
                h = parts.decay(x.d, rates, forgets[g]) * h + dus[g] * Bs[g]
                ys[g] = ys[g] + h * Cs[g]
            own["h"][n] = h
        return tuple(ys)

    skip = parts.row(how, own["channels"], how.skip)
    ys = lax.fori_loop(0, how.n // at_a_time, some, tuple(skip * x.u for x in tokens))
    for g, (x, y) in enumerate(zip(tokens, ys, strict=True)):
        if "z" in own:
            z = parts.row(how, own["z"], slot, first + g).astype(F32)
            y = only(x.there, y * z * sigmoid(z))
        own["y"][slot, first + g] = y.astype(own["y"].dtype)
