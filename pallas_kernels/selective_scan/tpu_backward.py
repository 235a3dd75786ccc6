"""selective_scan's backward kernel for TPUs: one pass over time, from the last chunk to the first.

From the state at its start, the states of a chunk are computed again and kept on the chip; then the
gradient by the state walks back through them. README.md has the formulas.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, SUBLANES, kernel_call
from pallas_kernels.selective_scan import tpu_parts as parts
from pallas_kernels.selective_scan.cost import cost
from pallas_kernels.selective_scan.tpu_parts import F32, KINDS, LOG2_E, How, Part, Refs

TOKEN_BY_TOKEN = ("u", "delta", "z")


def backward(arrays: dict[str, jax.Array], how: How) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: as for `forward` without h, and starts `[b t/chunk n e]`, dy `[b t e]`, dlast
            `[b n e]`.
        how: settings.

    Returns:
        Gradients u, delta and z `[b t e]`, h `[b n e]`; those to be summed over rows, A `[b n e]`,
        D and bias `[b 8 e]`; over blocks of channels, B and C `[b blocks n t]`.
    """
    u, how = arrays["u"], how._replace(backward=True)
    (b, t, _), (n, e) = u.shape, arrays["A"].shape
    steps, blocks = arrays["starts"].shape[1], e // how.channels
    specs = parts.block_specs(how, n, steps)
    tokens = {x: (specs["tokens"], u.shape, arrays[x].dtype) for x in TOKEN_BY_TOKEN if x in arrays}
    small = (specs["along_parts"], (b, blocks, n, arrays["B"].shape[2]), F32)
    by_row_8 = (specs["by_row_8"], (b, SUBLANES, e), F32)
    by_row = (specs["by_row"], (b, n, e), F32)
    outputs = dict(**tokens, B=small, C=small, A=by_row, h=by_row, D=by_row_8, bias=by_row_8)
    outputs = {x: one for x, one in outputs.items() if x in arrays or x == "h"}
    work = cost(b, t, e, n, itemsize=u.dtype.itemsize, backward=True)
    columns = pltpu.VMEM((how.chunk, n, LANES), F32)
    rows = pltpu.VMEM((how.chunk, how.lanes), F32)
    return kernel_call(
        functools.partial(_body, how=how, steps=steps),
        name="selective_scan_backward",
        config=how.config,
        grid=(b, blocks, steps),
        in_specs=[{name: specs[KINDS[name]] for name in arrays}],
        out_specs={name: spec for name, (spec, _, _) in outputs.items()},
        out_shape={x: jax.ShapeDtypeStruct(*one) for x, (_, *one) in outputs.items()},
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[
            dict(
                lam=pltpu.VMEM((n, how.channels), F32),
                **dict(B=columns, C=columns, dB=columns, dC=columns),
                before=pltpu.VMEM((how.chunk, n, how.lanes), F32),
                **dict(
                    d=rows, du=rows, g=rows, slope=rows, there=pltpu.VMEM((how.chunk, LANES), F32)
                ),
            )
        ],
        cost=pl.CostEstimate(int(work.flops), int(work.transcendentals), int(work.bytes)),
    )(arrays)


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How, steps: int):
    step = pl.program_id(2)
    begin = (steps - 1 - step) % (LANES // how.chunk) * how.chunk
    block = pl.program_id(1) * how.channels

    @pl.when(step == 0)
    def _():
        own["lam"][...] = ins["dlast"][...]
        for x in ("A", "D", "bias"):
            if x in outs:
                outs[x][...] = jnp.zeros_like(outs[x])

    for x in ("B", "C"):
        parts.columns(ins[x], own[x], begin)
        own[f"d{x}"][...] = jnp.zeros_like(own[f"d{x}"])
    if "valid" in ins:
        parts.down(ins["valid"], own["there"], begin)
    groups = how.chunk // how.tokens

    def some_channels(k, carry):
        part = Part(begin, block, lane=pl.multiple_of(k * how.lanes, how.lanes))
        here = part.lanes(how)

        def again(i, h):
            first = pl.multiple_of(i * how.tokens, how.tokens)
            return _again(ins, outs, own, h, part._replace(first=first), how)

        def back(i, carry):
            first = pl.multiple_of((groups - 1 - i) * how.tokens, how.tokens)
            return _back(ins, outs, own, carry, part._replace(first=first), how)

        h = jax.lax.fori_loop(0, groups, again, ins["starts"][:, here])
        lam, _, dA = jax.lax.fori_loop(0, groups, back, (own["lam"][:, here], h, jnp.zeros_like(h)))
        own["lam"][:, here] = lam
        outs["A"][:, here] += dA
        return carry

    jax.lax.fori_loop(0, own["lam"].shape[1] // how.lanes, some_channels, 0)
    for x in ("B", "C"):
        parts.column_sums(own[f"d{x}"], outs[x], begin)

    @pl.when(step == steps - 1)
    def _():
        outs["h"][...] = own["lam"][...]


def _again(ins: Refs, outs: Refs, own: Refs, h, part: Part, how: How) -> jax.Array:
    """Keeps what the walk back needs of some tokens; writes the gradient of z."""
    rows, here = part.rows(how), part.lanes(how)
    there = parts.there_of(ins, own, part, how)
    d = parts.only(there, parts.step_sizes(ins, part, how))
    u = parts.only(there, ins["u"][rows, here].astype(F32))
    g = parts.only(there, ins["dy"][rows, here].astype(F32))
    du, rates = d * u, ins["A"][:, here] * LOG2_E
    Bs, Cs = own["B"][rows], own["C"][rows]
    reads, states = [], []
    for j in range(how.tokens):
        states.append(h)
        B, C = parts.wide(Bs[j], how.lanes), parts.wide(Cs[j], how.lanes)
        decay = parts.decays(d[j : j + 1], rates, ins, part, j)
        h = decay * h + du[j : j + 1] * B
        reads.append(parts.fold(h * C))
    own["before"][rows] = jnp.stack(states)
    if "z" in ins:
        z = parts.only(there, ins["z"][rows, here].astype(F32))
        y, s = parts.rows_of_sums(reads), jax.nn.sigmoid(z)
        y = y + ins["D"][:, here] * u if "D" in ins else y
        outs["z"][rows, here] = (g * y * s * (1 + z * (1 - s))).astype(outs["z"].dtype)
        g = g * z * s
    own["d"][rows, :] = d
    own["du"][rows, :] = du
    own["g"][rows, :] = g
    if how.softplus:
        own["slope"][rows, :] = parts.only(
            there, jax.nn.sigmoid(parts.before_softplus(ins, part, how))
        )
    return h


def _back(ins: Refs, outs: Refs, own: Refs, carry, part: Part, how: How):
    """Walks back through some tokens, writing their gradients."""
    lam, h, dA = carry
    rows, here = part.rows(how), part.lanes(how)
    there = parts.there_of(ins, own, part, how)
    rates = ins["A"][:, here] * LOG2_E
    Bs, Cs, states = own["B"][rows], own["C"][rows], own["before"][rows]
    inputs, sizes = [], []
    for eight in reversed(range(0, how.tokens, SUBLANES)):
        for_input, for_size = [], []
        for j in reversed(range(eight, eight + SUBLANES)):
            row = pl.ds(part.first + j, 1)
            d, du, g = (own[name][row, :] for name in ("d", "du", "g"))
            B, C = parts.wide(Bs[j], how.lanes), parts.wide(Cs[j], how.lanes)
            lam = lam + g * C
            own["dC"][part.first + j] += parts.fold_lanes(h * g)
            own["dB"][part.first + j] += parts.fold_lanes(lam * du)
            for_input.append(parts.fold(lam * B))
            lam = lam * parts.decays(d, rates, ins, part, j)
            h = states[j]
            by_decay = lam * h  # lam_t times exp(d A) h_{t-1}
            dA = dA + by_decay * d
            for_size.append(parts.fold(by_decay * rates))
        inputs.append(parts.sums(for_input[::-1]))
        sizes.append(parts.sums(for_size[::-1]))
    by_input = jnp.concatenate(inputs[::-1], axis=0)
    by_size = jnp.concatenate(sizes[::-1], axis=0) / LOG2_E
    d, g = own["d"][rows, :], own["g"][rows, :]
    u = parts.only(there, ins["u"][rows, here].astype(F32))
    du = d * by_input
    ddelta = u * by_input + by_size
    if "D" in ins:
        du = du + ins["D"][:, here] * g
        outs["D"][:, here] += parts.fold(g * u)
    ddelta = ddelta * own["slope"][rows, :] if how.softplus else parts.only(there, ddelta)
    if "bias" in ins:
        outs["bias"][:, here] += parts.fold(ddelta)
    outs["u"][rows, here] = du.astype(outs["u"].dtype)
    outs["delta"][rows, here] = ddelta.astype(outs["delta"].dtype)
    return lam, h, dA
