"""selective_scan's forward kernel for TPUs: one pass over time, the state stays on the chip."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, kernel_call
from pallas_kernels.selective_scan import tpu_parts as parts
from pallas_kernels.selective_scan.cost import cost
from pallas_kernels.selective_scan.tpu_parts import F32, KINDS, LOG2_E, How, Part, Refs


def forward(arrays: dict[str, jax.Array], how: How, *, save: bool) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: u, delta `[b t e]`, A `[n e]`, B, C `[b n t]`, h `[b n e]`; where they are given
            z `[b t e]`, D, bias `[1 e]`, valid (0 at padding) and reset (1 where a document
            begins) `[b 1 t]`. In u, delta, z, t and e may be any; else those are padded, e to
            blocks of channels, t last to 128.
        how: settings.
        save: whether the backward pass will want the states at the starts of chunks.

    Returns:
        y `[b t e]`, the last state h `[b n e]`, and if `save` starts `[b t/chunk n e]`.
    """
    u = arrays["u"]
    (b, t, _), (n, e) = u.shape, arrays["A"].shape
    steps = -(-t // how.chunk)
    specs = parts.block_specs(how, n, steps)
    outputs = dict(
        y=(specs["tokens"], jax.ShapeDtypeStruct(u.shape, u.dtype)),
        h=(specs["by_row"], jax.ShapeDtypeStruct((b, n, e), F32)),
    )
    if save:
        starts = jax.ShapeDtypeStruct((b, steps, n, e), F32)
        outputs["starts"] = (specs["starts"], starts)
    work = cost(b, t, e, n, itemsize=u.dtype.itemsize)
    columns = pltpu.VMEM((how.chunk, n, LANES), F32)
    return kernel_call(
        functools.partial(_body, how=how, steps=steps),
        name="selective_scan_forward",
        config=how.config,
        grid=(b, e // how.channels, steps),
        in_specs=[{name: specs[KINDS[name]] for name in arrays}],
        out_specs={name: spec for name, (spec, _) in outputs.items()},
        out_shape={name: shape for name, (_, shape) in outputs.items()},
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[
            dict(
                h=pltpu.VMEM((n, how.channels), F32),
                **dict(B=columns, C=columns, there=pltpu.VMEM((how.chunk, LANES), F32)),
            )
        ],
        cost=pl.CostEstimate(int(work.flops), int(work.transcendentals), int(work.bytes)),
    )(arrays)


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How, steps: int):
    step = pl.program_id(2)
    begin = step % (LANES // how.chunk) * how.chunk
    block = pl.program_id(1) * how.channels
    state = own["h"]

    @pl.when(step == 0)
    def _():
        state[...] = ins["h"][...]

    if "starts" in outs:
        outs["starts"][...] = state[...]
    for x in ("B", "C"):
        parts.columns(ins[x], own[x], begin)
    if "valid" in ins:
        parts.down(ins["valid"], own["there"], begin)

    def some_channels(k, carry):
        part = Part(begin, block, lane=pl.multiple_of(k * how.lanes, how.lanes))
        here = part.lanes(how)

        def some_tokens(i, h):
            first = pl.multiple_of(i * how.tokens, how.tokens)
            return _tokens(ins, outs, own, h, part._replace(first=first), how)

        state[:, here] = jax.lax.fori_loop(0, how.chunk // how.tokens, some_tokens, state[:, here])
        return carry

    jax.lax.fori_loop(0, state.shape[1] // how.lanes, some_channels, 0)

    @pl.when(step == steps - 1)
    def _():
        outs["h"][...] = state[...]


def _tokens(ins: Refs, outs: Refs, own: Refs, h, part: Part, how: How) -> jax.Array:
    """Writes y of some tokens; gives the state after them."""
    rows, here = part.rows(how), part.lanes(how)
    there = parts.there_of(ins, own, part, how)
    d = parts.only(there, parts.step_sizes(ins, part, how))
    u = parts.only(there, ins["u"][rows, here].astype(F32))
    du, rates = d * u, ins["A"][:, here] * LOG2_E
    Bs, Cs = own["B"][rows], own["C"][rows]
    reads = []
    for j in range(how.tokens):
        B, C = parts.wide(Bs[j], how.lanes), parts.wide(Cs[j], how.lanes)
        decay = parts.decays(d[j : j + 1], rates, ins, part, j)
        h = decay * h + du[j : j + 1] * B
        reads.append(parts.fold(h * C))
    y = parts.rows_of_sums(reads)
    if "D" in ins:
        y = y + ins["D"][:, here] * u
    if "z" in ins:
        z = ins["z"][rows, here].astype(F32)
        y = parts.only(there, y * z * jax.nn.sigmoid(z))
    outs["y"][rows, here] = y.astype(outs["y"].dtype)
    return h
