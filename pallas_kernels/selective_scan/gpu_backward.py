"""selective_scan's backward kernel for Hopper: from the last chunk of tokens to the first.

From the state at its start, a chunk's states before each group of tokens are computed again and
kept in shared memory; then the gradient by the state walks back, group by group. README.md has the
formulas.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, kernel_call
from pallas_kernels.core.gpu_parts import each, named, only, read, sigmoid, vectors
from pallas_kernels.selective_scan import gpu_parts as parts
from pallas_kernels.selective_scan.gpu_parts import F32, LOG2_E, SLOTS, How, Refs

EARLY = ("u", "delta")  # needed for computing the states again, so two chunks at a time
LATE = ("z", "dy")  # needed on the way back: they arrive meanwhile
# What is written where its input lay.
WRITTEN = dict(u="dy", delta="delta", z="z")
APART = 8  # zeros after each row that is summed, so that threads read different banks


def backward(arrays: dict[str, jax.Array], how: How) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: as for `forward` without h, and starts `[b t/chunk n e]`, dy `[b t e]` in the dtype
            of u, dlast `[b n e]`.
        how: settings.

    Returns:
        Gradients u, delta and z `[b t e]`, h `[b n e]`; those to be summed over rows, A `[b n e]`,
        sums `[b 2 e]` (of D and of delta_bias); over blocks of channels, B and C as BC
        `[b blocks t/group n/some 64]`, the last axis being (some states, B or C, group).
    """
    u, n, group = arrays["u"], how.n, how.config.group_backward
    (b, t, e), chunk = u.shape, how.chunk
    blocks, some = e // WARPGROUP, how.config.states_backward
    reduced = (n // some, how.reduced)
    state = jax.ShapeDtypeStruct((b, n, e), F32)
    names = tuple(x for x in (*EARLY, *LATE) if x in arrays)
    outputs = {x: jax.ShapeDtypeStruct(u.shape, arrays[x].dtype) for x in WRITTEN if x in arrays}
    outputs |= dict(h=state, A=state, sums=jax.ShapeDtypeStruct((b, 2, e), F32))
    outputs["BC"] = jax.ShapeDtypeStruct((b, blocks, t // group, *reduced), F32)
    own = {
        x: vectors(*((SLOTS,) if x in EARLY else ()), chunk, dtype=arrays[x].dtype) for x in names
    }
    own |= dict(
        along=plgpu.SMEM((SLOTS, how.along, chunk), F32),
        channels=vectors(n + 2),
        start=vectors(n),
        before=vectors(chunk // group, n),
        lam=vectors(n),
        A=vectors(n),
        sums=vectors(2),
        products=plgpu.SMEM((max(how.reduced, 3 * group), WARPGROUP + APART), F32),
        BC=plgpu.SMEM((chunk // group, *reduced), F32),
        early=plgpu.Barrier(num_arrivals=len(EARLY) + 1, num_barriers=SLOTS),
        late=plgpu.Barrier(num_arrivals=len(names) - len(EARLY)),
        started=plgpu.Barrier(),
        begun=plgpu.Barrier(num_arrivals=2),
    )
    found = kernel_call(
        named(lambda *refs: _body(*refs, how=how, steps=t // chunk), arrays, outputs, own),
        name="selective_scan_backward",
        config=how.config,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(own.values()),
        grid=(b, blocks),
        grid_names=("rows", "blocks"),
        approx_math=True,
        unsafe_no_auto_barriers=True,
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How, steps: int):
    row, here = parts.place()
    chunk, groups = how.chunk, how.chunk // how.config.group_backward
    early, late = own["early"], own["late"]
    tokens = lambda i: pl.ds(i * chunk, chunk)

    def load_early(i, slot):
        parts.loads(ins, own, EARLY, (row, tokens(i), here), slot, early.at[slot])

    def load_start(i):
        plgpu.copy_gmem_to_smem(ins["starts"].at[row, i, :, here], own["start"], own["started"])

    plgpu.copy_gmem_to_smem(ins["channels"].at[:, here], own["channels"], own["begun"])
    plgpu.copy_gmem_to_smem(ins["dlast"].at[row, :, here], own["lam"], own["begun"])
    load_early(steps - 1, 0)
    load_start(steps - 1)
    zero = jnp.zeros((WARPGROUP,), F32)
    each(how.n, lambda n: _set(own["A"], n, zero))
    ends = pl.ds(APART, WARPGROUP)
    each(own["products"].shape[0], lambda i: _set(own["products"], (i, ends), zero))
    plgpu.barrier_wait(own["begun"])

    def step(s, sums):
        i, slot = steps - 1 - s, lax.rem(s, SLOTS)
        plgpu.barrier_wait(early.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the step before wrote is out
        for x in LATE:
            if x in own:
                plgpu.copy_gmem_to_smem(ins[x].at[row, tokens(i), here], own[x], late)
        pl.when(s + 1 < steps)(lambda: load_early(i - 1, 1 - slot))
        plgpu.barrier_wait(own["started"])
        each(how.n, lambda n: _set(own["before"].at[0], n, parts.row(how, own["start"], n)))
        plgpu.commit_smem()  # all have read the start
        pl.when(s + 1 < steps)(lambda: load_start(i - 1))
        each(groups - 1, lambda k: _again(own, slot, k, how))
        plgpu.barrier_wait(late)
        sums = lax.fori_loop(
            0, groups, lambda k, sums: _back(own, slot, groups - 1 - k, sums, how), sums
        )
        plgpu.commit_smem()
        for x in WRITTEN:
            if x in outs:
                buffer = own[WRITTEN[x]]
                buffer = buffer.at[slot] if WRITTEN[x] in EARLY else buffer
                plgpu.copy_smem_to_gmem(
                    buffer, outs[x].at[row, tokens(i), here], commit_group=False
                )
        at = outs["BC"].at[row, lax.axis_index("blocks"), pl.ds(i * groups, groups)]
        plgpu.copy_smem_to_gmem(own["BC"], at)
        return sums

    own["sums"][0], own["sums"][1] = lax.fori_loop(0, steps, step, (zero, zero))
    plgpu.commit_smem()
    for x, buffer in (("h", "lam"), ("A", "A"), ("sums", "sums")):
        plgpu.copy_smem_to_gmem(own[buffer], outs[x].at[row, :, here])
    plgpu.wait_smem_to_gmem(0)


def _set(ref, n, value) -> None:
    ref[n] = value


def _again(own: Refs, slot: jax.Array, k: jax.Array, how: How) -> None:
    """The states after a group of tokens, from those before it."""
    group, some = how.config.group_backward, how.config.states_backward
    first = k * group

    def one(g):
        x = parts.token(own, slot, first + g, how)
        _put(own, 0, g, x.d, group)
        _put(own, 1, g, x.d * x.u, group)

    each(group, one)
    ds, dus = (_rows(own, i, how) for i in range(2))
    forgets = parts.forgets(own, slot, first, group, how)

    def states(i):
        for j in range(some):
            n = i * some + j
            rates, h = parts.row(how, own["channels"], n), parts.row(how, own["before"], k, n)
            Bs = parts.scalars(own, slot, n, first, group)
            for g in range(group):
                h = parts.decay(ds[g], rates, forgets[g]) * h + dus[g] * Bs[g]
            own["before"][k + 1, n] = h

    each(how.n // some, states)


def _back(own: Refs, slot: jax.Array, k: jax.Array, sums: tuple, how: How) -> tuple:
    """Walks back through a group of tokens, writing their gradients.

    Args:
        own: buffers.
        slot: of those that come in turn.
        k: which group of the chunk.
        sums: so far, of the gradients of D and of delta_bias.
        how: settings.
    """
    group, first = how.config.group_backward, k * how.config.group_backward

    def one(g):
        x = parts.token(own, slot, first + g, how)
        for i, row in enumerate(
            (x.d, x.d * x.u, parts.gradient(own, x.there, first + g, how).before_gate)
        ):
            _put(own, i, g, row, group)

    each(group, one)
    rows = tuple(_rows(own, i, how) for i in range(3))
    inputs, sizes, ys = _states(own, slot, k, rows, how)
    for g in range(group):
        for i, row in enumerate((inputs[g], sizes[g], *ys[g : g + 1])):
            _put(own, i, g, row, group)
    write = lambda g, sums: _write(own, slot, first, g, sums, how)
    return lax.fori_loop(0, group, write, sums)


def _states(own: Refs, slot: jax.Array, k: jax.Array, of_tokens: tuple, how: How) -> tuple:
    """A group of tokens, state by state: sums over states by input, by size, of y.

    Args:
        own: buffers.
        slot: of those that come in turn.
        k: which group of the chunk.
        of_tokens: d, d u and the gradient before the gate, of each token.
        how: settings.
    """
    ds, dus, gs = of_tokens
    group, some = how.config.group_backward, how.config.states_backward
    first = k * group
    forgets = parts.forgets(own, slot, first, group, how)

    def states(i, carry):
        inputs, sizes, ys = (list(x) for x in carry)
        for j in range(some):
            n = i * some + j
            rates, h = parts.row(how, own["channels"], n), parts.row(how, own["before"], k, n)
            lam, dA = (parts.row(how, own[x], n) for x in ("lam", "A"))
            Bs, Cs = (parts.scalars(own, slot, i, first, group) for i in (n, how.n + n))
            decays, kept = [], []
            for g in range(group):
                decays.append(parts.decay(ds[g], rates, forgets[g]))
                kept.append(decays[g] * h)
                h = kept[g] + dus[g] * Bs[g]
                if ys:
                    ys[g] = ys[g] + h * Cs[g]
                _put(own, 2 * j + 1, g, h * gs[g], group)
            for g in reversed(range(group)):
                lam = lam + gs[g] * Cs[g]
                _put(own, 2 * j, g, lam * dus[g], group)
                inputs[g] = inputs[g] + lam * Bs[g]
                by_decay = lam * kept[g]  # lam_t times exp(d A) h_{t-1}
                dA = dA + by_decay * ds[g]
                sizes[g] = sizes[g] + by_decay * rates
                lam = lam * decays[g]
            own["lam"][n], own["A"][n] = lam, dA
        plgpu.commit_smem()  # all products are there
        products = own["products"].at[pl.ds(0, how.reduced)]
        rows = read(products, plgpu.Layout.WGMMA, how.config)
        own["BC"][k, i] = jnp.sum(rows, axis=1)
        plgpu.commit_smem()  # all have read them
        return tuple(inputs), tuple(sizes), tuple(ys)

    zeros = (jnp.zeros((WARPGROUP,), F32),) * group
    ys = zeros if "z" in own else ()
    return lax.fori_loop(0, how.n // some, states, (zeros, zeros, ys))


def _put(own: Refs, i: int, g: Any, row: jax.Array, group: int) -> None:
    """Writes the row of token g into the ith group of rows."""
    own["products"][i * group + g, pl.ds(0, WARPGROUP)] = row


def _get(own: Refs, i: int, g: Any, how: How) -> jax.Array:
    """Reads what `_put` wrote."""
    row = i * how.config.group_backward + g
    return parts.row(how, own["products"], row, pl.ds(0, WARPGROUP))


def _rows(own: Refs, i: int, how: How) -> list[jax.Array]:
    """The ith group of rows."""
    return [_get(own, i, g, how) for g in range(how.config.group_backward)]


def _write(own: Refs, slot: jax.Array, first: jax.Array, g: jax.Array, sums: tuple, how: How):
    """The gradients of token g of a group, from its sums over states."""
    t = first + g
    by_input, by_size = (_get(own, i, g, how) for i in range(2))
    x = parts.token(own, slot, t, how)
    skip, of = parts.row(how, own["channels"], how.skip), parts.gradient(own, x.there, t, how)
    if of.by_gate is not None:
        dz = of.by_gate * (_get(own, 2, g, how) + skip * x.u)
        own["z"][t] = dz.astype(own["z"].dtype)
    ddelta = x.u * by_input + by_size * (1 / LOG2_E)
    if how.softplus:
        ddelta = ddelta * sigmoid(parts.before_softplus(own, slot, t, how))
    ddelta = only(x.there, ddelta)
    own["dy"][t] = (x.d * by_input + skip * of.before_gate).astype(own["dy"].dtype)
    own["delta"][slot, t] = ddelta.astype(own["delta"].dtype)
    return sums[0] + of.before_gate * x.u, sums[1] + ddelta
