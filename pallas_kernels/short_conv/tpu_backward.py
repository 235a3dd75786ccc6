"""short_conv's backward kernel for TPUs: one pass, from the last tile to the first.

The gradient by the sums, g, is made first; a tap that reached back makes a token's gradient reach
forward, so the first rows of g are carried to the tile before.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, SUBLANES, kernel_call
from pallas_kernels.short_conv import tpu_parts as parts
from pallas_kernels.short_conv.cost import cost
from pallas_kernels.short_conv.tpu_parts import F32, HALO, KINDS, ROWS, How, Refs


def backward(arrays: dict[str, jax.Array], how: How) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: as for `forward`, and dy `[b t e]`; dafter `[b HALO e]`, gradients by the w - 1
            inputs from place `last`, int32 `[b 1 1]`, on (by those from before the call: 0).
        how: settings.

    Returns:
        Gradients x `[b t e]` and before `[b HALO e]`; those to be summed over rows, weight
        `[b 8 w e]` and bias `[b 8 e]`.
    """
    x, (taps, wide) = arrays["x"], arrays["weight"].shape
    (b, t, e), channels, tile = x.shape, how.config.channels, how.tile
    specs = parts.block_specs(how, reverse=True)
    outputs = dict(
        x=(specs["tokens"], x.shape, x.dtype),
        before=(specs["rows"], (b, HALO, wide), F32),
        weight=(specs["tap_sums"], (b, SUBLANES * taps, wide), F32),
        bias=(specs["sums"], (b, SUBLANES, wide), F32),
    )
    outputs = {name: one for name, one in outputs.items() if name in arrays}
    arrays = {**arrays, "halo": x}
    work = cost(b, t, e, taps, itemsize=x.dtype.itemsize, backward=True)
    scratch = dict(
        x=pltpu.VMEM((HALO + tile, channels), F32),
        g=pltpu.VMEM((HALO + tile + HALO, channels), F32),
        dx=pltpu.VMEM((HALO + tile, channels), F32),
        age=pltpu.VMEM((HALO + tile + HALO, LANES), F32),
    )
    return kernel_call(
        functools.partial(_body, how=how),
        name="short_conv_backward",
        config=how.config,
        grid=(b, wide // channels, how.steps),
        in_specs=[{name: specs[KINDS[name]] for name in arrays}],
        out_specs={name: spec for name, (spec, _, _) in outputs.items()},
        out_shape={x: jax.ShapeDtypeStruct(*one) for x, (_, *one) in outputs.items()},
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[scratch],
        cost=pl.CostEstimate(int(work.flops), int(work.transcendentals), int(work.bytes)),
    )(arrays)


def _body(ins: Refs, outs: Refs, own: Refs, *, how: How):
    step = pl.program_id(2)
    i = how.steps - 1 - step
    x_ref, carried = own["x"], ("g", "age") if "age" in ins else ("g",)

    @pl.when(step == 0)
    def _():
        for name in carried:
            own[name][...] = jnp.zeros_like(own[name])
        for name in outs:
            if name != "x":
                outs[name][...] = jnp.zeros_like(outs[name])

    @pl.when(step > 0)
    def _():
        for name in carried:
            own[name][HALO + how.tile :, :] = own[name][HALO : 2 * HALO, :]

    x_ref[:HALO, :] = ins["halo"][...].astype(F32)
    x_ref[HALO:, :] = ins["x"][...].astype(F32)
    parts.lay_before(ins, x_ref, i, how)
    parts.lay_ages(ins, own["age"], HALO, how)
    parts.each(how, functools.partial(_by_sums, ins, outs, own, how=how))
    parts.each(how, functools.partial(_by_inputs, ins, own, HALO, ROWS, how=how))
    place = ins["leading"][0, 0] - i * how.tile
    keep = how.taps - 1

    @pl.when((place >= 0) & (place < how.tile))
    def _():
        parts.each(how, functools.partial(_by_inputs, ins, own, 0, HALO, how=how), groups=1)
        for k in range(keep):
            outs["before"][k : k + 1, :] = own["dx"][pl.ds(HALO + place - keep + k, 1), :]

    for k in range(keep):
        later = ins["last"][0, 0] + k - i * how.tile

        @pl.when((later >= 0) & (later < how.tile))
        def _(k=k, later=later):
            own["dx"][pl.ds(HALO + later, 1), :] += ins["dafter"][k : k + 1, :]

    def write(first, here):
        age = parts.ages(ins, own["age"], HALO + first, ROWS, here)
        dx = own["dx"][pl.ds(HALO + first, ROWS), here]
        dx = parts.only(None if age is None else age >= 0, dx)
        outs["x"][pl.ds(first, ROWS), here] = dx.astype(outs["x"].dtype)

    parts.each(how, write)


def _by_sums(ins: Refs, outs: Refs, own: Refs, first, here, *, how: How):
    """Writes g of ROWS tokens, adds to the gradients of weight and bias."""
    age = parts.ages(ins, own["age"], HALO + first, ROWS, here)
    seen = list(parts.inputs(own["x"], first, here, age, how))
    g = ins["dy"][pl.ds(first, ROWS), here].astype(F32)
    if how.silu:
        total = parts.tap_sum(ins, seen, here, how)
        s = jax.nn.sigmoid(total)
        g = g * s * (1 + total * (1 - s))
    g = parts.only(None if age is None else age >= 0, g)
    own["g"][pl.ds(HALO + first, ROWS), here] = g
    for lag, x in enumerate(seen):
        tap = how.taps - 1 - lag
        outs["weight"][SUBLANES * tap : SUBLANES * (tap + 1), here] += _fold(g * x)
    if "bias" in outs:
        outs["bias"][:, here] += _fold(g)


def _by_inputs(ins: Refs, own: Refs, shift: int, rows: int, first, here, *, how: How):
    """Writes the gradients by some inputs, HALO - shift tokens before `first` and on."""
    window = own["g"][pl.ds(shift + first, rows + HALO), here]
    age = parts.ages(ins, own["age"], shift + first, rows + HALO, here)
    total = jnp.zeros((rows, here.size), F32)
    for lag in range(how.taps):
        seen = None if age is None else age[lag : lag + rows] >= lag
        weight = ins["weight"][how.taps - 1 - lag : how.taps - lag, here]
        total = total + weight * parts.only(seen, window[lag : lag + rows])
    own["dx"][pl.ds(shift + first, rows), here] = total


def _fold(x: jax.Array) -> jax.Array:
    """Adds registers under each other: `[8 k, e]` to `[8 e]`, still to be summed."""
    return functools.reduce(jnp.add, [x[i : i + 8] for i in range(0, x.shape[0], SUBLANES)])
