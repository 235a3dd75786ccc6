"""short_conv's forward kernel for TPUs: one pass, the last rows of a tile carried to the next."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES, kernel_call
from pallas_kernels.short_conv import tpu_parts as parts
from pallas_kernels.short_conv.cost import cost
from pallas_kernels.short_conv.tpu_parts import F32, HALO, KINDS, ROWS, How, Refs


def forward(arrays: dict[str, jax.Array], how: How) -> jax.Array:
    """The kernel's call.

    Args:
        arrays: x `[b t e]`, weight `[w e]`, before `[b HALO e]` (w - 1 rows of it), leading int32
            `[b 1 1]`, the place of the first token; where they are given bias `[1 e]` and age
            `[b 1 t]`, how many tokens of its document lie before a token, at least; -1 at padding.
            In x, t and e may be any; else e is padded to blocks of channels, t to tiles and 128.
        how: settings.

    Returns:
        y `[b t e]`.
    """
    x, channels = arrays["x"], how.config.channels
    b, t, e = x.shape
    specs = parts.block_specs(how)
    work = cost(b, t, e, how.taps, itemsize=x.dtype.itemsize)
    scratch = dict(
        x=pltpu.VMEM((HALO + how.tile, channels), F32), age=pltpu.VMEM((how.tile, LANES), F32)
    )
    return kernel_call(
        functools.partial(_body, how=how),
        name="short_conv_forward",
        config=how.config,
        grid=(b, arrays["weight"].shape[1] // channels, how.steps),
        in_specs=[{name: specs[KINDS[name]] for name in arrays}],
        out_specs=specs["tokens"],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[scratch],
        cost=pl.CostEstimate(int(work.flops), int(work.transcendentals), int(work.bytes)),
    )(arrays)


def _body(ins: Refs, y_ref, own: Refs, *, how: How):
    i, x_ref = pl.program_id(2), own["x"]

    @pl.when(i == 0)
    def _():
        x_ref[:HALO, :] = jnp.zeros_like(x_ref[:HALO, :])

    @pl.when(i > 0)
    def _():
        x_ref[:HALO, :] = x_ref[how.tile :, :]

    x_ref[HALO:, :] = ins["x"][...].astype(F32)
    parts.lay_before(ins, x_ref, i, how)
    parts.lay_ages(ins, own["age"], 0, how)

    def some(first, here):
        age = parts.ages(ins, own["age"], first, ROWS, here)
        y = parts.tap_sum(ins, list(parts.inputs(x_ref, first, here, age, how)), here, how)
        y = y * jax.nn.sigmoid(y) if how.silu else y
        y = parts.only(None if age is None else age >= 0, y)
        y_ref[pl.ds(first, ROWS), here] = y.astype(y_ref.dtype)

    parts.each(how, some)
