"""short_conv's backward kernel for Hopper: the sums are made again, then walked back through."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, kernel_call
from pallas_kernels.core.gpu_parts import named, only, sigmoid, vectors
from pallas_kernels.short_conv import gpu_parts as parts
from pallas_kernels.short_conv.gpu_parts import F32, HALO, SLOTS, How, Refs, Rows, Tokens

INPUTS = 3  # tiles of x and dy: one is worked on, the one before it is there, one arrives


def backward(arrays: dict[str, jax.Array], how: How) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: as for `forward`, and dy `[b t e]`; if w > 1 also rows `[b w-1 e]`, to be added
            to dx from token `at` on, int32 `[b 32]` (the first counts; rows before token 0 are left
            out).
        how: settings.

    Returns:
        Gradients x `[b t e]`; of taps and bias, to be summed over the first two axes, channels
        `[b stretches w+1 e]`; before `[b stretches w-1 e]` (a row of zeros if w is 1), right in the
        stretch with the first token.
    """
    x = arrays["x"]
    b, t, e = x.shape
    stretches, kept = t // how.stretch, arrays["before"].shape[1]
    of = lambda rows: jax.ShapeDtypeStruct((b, stretches, rows, e), F32)
    outputs = dict(
        x=jax.ShapeDtypeStruct(x.shape, x.dtype), channels=of(how.taps + 1), before=of(kept)
    )
    more = kept if "rows" in arrays else 0
    own = {
        **parts.buffers(arrays, how.tile, slots=INPUTS + 1, dy=True),
        **parts.prefixed("after_", parts.buffers(arrays, HALO, dy=True)),
        **dict(channels=vectors(how.taps + 1), before=vectors(kept), g=vectors(how.tile)),
        "dx": vectors(SLOTS, how.tile, dtype=x.dtype),
        "arrived": plgpu.Barrier(num_arrivals=2 + how.documents, num_barriers=INPUTS),
        "begun": plgpu.Barrier(num_arrivals=5 + 2 * how.documents + 2 * bool(more)),
    }
    if more:
        own |= dict(rows=vectors(more), at=plgpu.SMEM((parts.INTS,), jnp.int32))
    found = kernel_call(
        named(lambda *refs: _body(*refs, how=how, stretches=stretches), arrays, outputs, own),
        name="short_conv_backward",
        config=how.config,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(own.values()),
        grid=(b, e // WARPGROUP, stretches),
        grid_names=("rows", "blocks", "stretches"),
        approx_math=True,
        unsafe_no_auto_barriers=True,
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How, stretches: int):
    row, here, stretch = parts.place()
    start, steps, tile = stretch * how.stretch, how.stretch // how.tile, how.tile
    end = start + how.stretch
    place = lambda first, count: (row, pl.ds(first, count), here)
    first_of = lambda s: start + (steps - 1 - s) * tile

    def load(s, slot):
        tokens = parts.tokens(own, "", slot)
        parts.load(ins, tokens, place(first_of(s), tile), own["arrived"].at[slot])

    plgpu.copy_gmem_to_smem(ins["channels"].at[:, here], own["channels"], own["begun"])
    plgpu.copy_gmem_to_smem(ins["before"].at[row, :, here], own["before"], own["begun"])
    if "rows" in own:
        plgpu.copy_gmem_to_smem(ins["rows"].at[row, :, here], own["rows"], own["begun"])
        plgpu.copy_gmem_to_smem(ins["at"].at[row], own["at"], own["begun"])
    after = parts.tokens(own, "after_")
    there_is = lax.min(end, stretches * how.stretch - HALO)  # at the end: anything, not used
    parts.load(ins, after, place(there_is, HALO), own["begun"])
    # The tile before the stretch, of which the end counts: flags of a part of it would lie apart.
    halo = parts.tokens(own, "", INPUTS)._replace(dy=None)
    parts.load(ins, halo, place(lax.max(start - tile, 0), tile), own["begun"])
    for s in range(min(INPUTS, steps)):
        load(s, s)
    plgpu.barrier_wait(own["begun"])
    plgpu.barrier_wait(own["arrived"].at[0])
    weights, before = parts.taps(how, own["channels"]), parts.kept(how, own["before"])
    zero = jnp.zeros((WARPGROUP,), F32)
    sums = (zero,) * (how.taps + 1)

    # The gradients after the stretch that reach into it.
    rows = parts.passed(how, parts.ending(own, 0, tile), HALO, before)
    _gradients(own, after, HALO, rows, weights, sums, how)
    later = _back(own, after, HALO, (zero,) * (how.taps - 1), weights, None, how)
    none_left = stretch - (stretches - 1)
    later = parts.where_first(none_left, tuple(zero for _ in later), later)

    def step(s, carry):
        later, sums = carry
        slot, out, first = lax.rem(s, INPUTS), lax.rem(s, SLOTS), first_of(s)
        following = lax.rem(s + 1, INPUTS)
        pl.when(s + 1 < steps)(lambda: plgpu.barrier_wait(own["arrived"].at[following]))
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # this slot's results are out
        halo = parts.ending(own, lax.select(s + 1 < steps, following, INPUTS), tile)
        rows = parts.where_first(first, before, parts.passed(how, halo, HALO, before))
        tokens = parts.tokens(own, "", slot)
        sums = _gradients(own, tokens, tile, rows, weights, sums, how)
        later = _back(own, tokens, tile, later, weights, own["dx"].at[out], how)
        _add(own, out, first, how)
        plgpu.commit_smem()  # all have read this slot and written their results
        plgpu.copy_smem_to_gmem(own["dx"].at[out], outs["x"].at[place(first, tile)])
        pl.when(s + INPUTS < steps)(lambda: load(s + INPUTS, slot))
        return later, sums

    later, sums = lax.fori_loop(0, steps, step, (later, sums))
    for i, x in enumerate(sums):
        own["channels"][i] = x
    if not before:
        own["before"][0] = zero
    for i in reversed(range(how.taps - 1)):  # the state's inputs, as tokens before the first
        own["before"][i] = _dx(weights, later, zero)
        later = parts.push(None, later, zero)
    plgpu.commit_smem()
    for x in ("channels", "before"):
        plgpu.copy_smem_to_gmem(own[x], outs[x].at[row, stretch, :, here])
    plgpu.wait_smem_to_gmem(0)


def _add(own: Refs, slot: jax.Array, first: jax.Array, how: How) -> None:
    """Adds the rows that are to be added to dx to those that lie in a tile."""
    for i in range(how.taps - 1):
        t = own["at"][0] + i - first

        def one(i=i, t=t):
            old = parts.row(how, own["dx"], slot, t)
            new = old + parts.row(how, own["rows"], i)
            own["dx"][slot, t] = new.astype(own["dx"].dtype)

        pl.when((t >= 0) & (t < how.tile) & (own["at"][0] + i >= 0))(one)


def _gradients(
    own: Refs, tokens: Tokens, count: int, rows: Rows, weights: Rows, sums: Rows, how: How
) -> Rows:
    """Keeps the gradients by the sums of some tokens; adds to those of taps and bias."""

    def one(t, carry):
        rows, sums = carry
        there = parts.flag(tokens, 0, t)
        x = only(there, parts.row(how, tokens.x, t))
        g = only(there, parts.row(how, tokens.dy, t))
        rows = parts.clear(parts.flag(tokens, 1, t), rows)
        if how.silu:
            s = parts.total(weights, rows, x)
            gate = sigmoid(s)
            g = g * gate * (1 + s * (1 - gate))
        own["g"][t] = g
        ones = (*rows, x, jnp.ones_like(x))  # the last one is the bias's
        sums = tuple(old + g * one for old, one in zip(sums, ones, strict=True))
        return (parts.push(there, rows, x) if rows else rows), sums

    return parts.walk(count, one, (rows, sums))[1]


def _back(
    own: Refs,
    tokens: Tokens,
    count: int,
    later: Rows,
    weights: Rows,
    dx: jax.Array | None,
    how: How,
) -> Rows:
    """Writes dx of some tokens (None = nowhere); the gradients that reach further back.

    later: gradients by the sums of the next tokens, the nearest last.
    """

    def one(j, later):
        t = count - 1 - j
        there, g = parts.flag(tokens, 0, t), parts.row(how, own["g"], t)
        if dx is not None:
            dx[t] = only(there, _dx(weights, later, g)).astype(dx.dtype)
        if not later:
            return later
        return parts.clear(parts.flag(tokens, 1, t), parts.push(there, later, g))

    return parts.walk(count, one, later)


def _dx(weights: Rows, later: Rows, g: jax.Array) -> jax.Array:
    """The gradient by an input: g of its own token, later ones through older taps."""
    *some, last, _ = weights
    x = last * g
    for weight, one in zip(some, later, strict=True):
        x = x + weight * one
    return x
