"""The kernels for short rows: a transform is one product with a matrix, a few rows in a step.

Spectra are `[n 128]`: real parts, imaginary parts; channels on lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs, dot
from pallas_kernels.long_conv import tpu_waves

_ROWS = 128  # of a product's result that are computed at once


class Short(NamedTuple):
    """What is static of a call.

    Attributes:
        n: length of the transform.
        t: tokens of a row.
        lags: of each kernel that count.
        width: of a block of lags.
        two_sided, pre, post: whether there is a reverse kernel, and gates.
        batch: rows of a step.
        operands: dtype of what is multiplied.
    """

    n: int
    t: int
    lags: int
    width: int
    two_sided: bool
    pre: bool
    post: bool
    batch: int
    operands: str


def vmem(plan: Short, itemsize: int) -> int:
    """Bytes that the backward kernel takes."""
    rows = tpu.round_up(plan.t, 16)
    wide = max(rows, tpu.round_up(plan.width, tpu.LANES))
    blocks = 2 * plan.batch * rows * tpu.LANES * itemsize * (3 + 2 * plan.pre + 2 * plan.post)
    waves = plan.n * (wide + tpu.round_up(rows, tpu.LANES)) * jnp.dtype(plan.operands).itemsize
    spectra = tpu.LANES * 4 * (7 * plan.n + 6 * rows)
    return blocks + waves + spectra + 2 * 4 * 4 * tpu.LANES * wide


def _waves(plan: Short) -> list[jax.Array]:
    """The transform there and back (twice the share of each frequency), and phases."""
    there = tpu_waves.one_stage(plan.n, max(plan.t, plan.width))
    back = there[:, : plan.t].T * (2 / plan.n)
    cos, sin = tpu_waves.phases(np.arange(plan.n // 2), plan.n)
    ahead = np.broadcast_to(np.concatenate([cos, sin])[:, None], (plan.n, tpu.LANES))
    return [
        jnp.asarray(there, plan.operands),
        jnp.asarray(back, plan.operands),
        jnp.asarray(ahead, jnp.float32),
    ]


def _specs(plan: Short):
    """BlockSpecs of tokens, lags, numbers per channel, and what is there as a whole."""
    lanes, once = tpu.LANES, pl.Buffered(1)
    tokens = pl.BlockSpec((plan.batch, plan.t, lanes), lambda c, i: (i, 0, c))
    lags = pl.BlockSpec((lanes, plan.width), lambda c, i: (c, 0))
    channel = pl.BlockSpec((2, lanes), lambda c, i: (0, c))
    whole = lambda a: pl.BlockSpec(a.shape, lambda c, i: (0,) * a.ndim, pipeline_mode=once)
    return tokens, lags, channel, whole


def _call(body, plan: Short, config, name, arrays, outputs, scratch):
    """arrays and outputs: (kind, array or shape) in order, kind "tokens", "lags", "channel"."""
    tokens, lags, channel, whole = _specs(plan)
    kinds = dict(tokens=tokens, lags=lags, channel=channel)
    waves = _waves(plan)
    u = arrays[0][1]
    b, _, e = u.shape
    return tpu.kernel_call(
        body,
        name=name,
        config=config,
        grid=(pl.cdiv(e, tpu.LANES), b // plan.batch),
        in_specs=[kinds[kind] for kind, _ in arrays] + [whole(w) for w in waves],
        out_specs=[kinds[kind] for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=scratch,
        semantics=("parallel", "arbitrary"),
        cost=pl.CostEstimate(
            flops=len(outputs) * 4 * b * e * plan.t * plan.n,
            bytes_accessed=sum(a.size * a.dtype.itemsize for _, a in (*arrays, *outputs)),
            transcendentals=0,
        ),
    )(*(a for _, a in arrays), *waves)


def _given(plan: Short, u, kernel, reverse, channel, pre, post, *more):
    """The arrays that are there, with their kinds."""
    arrays = [("tokens", u), ("lags", kernel)]
    if plan.two_sided:
        arrays.append(("lags", reverse))
    arrays.append(("channel", channel))
    gates = [("tokens", a) for a in (pre, post) if a is not None]
    return [*arrays, *gates, *(("tokens", a) for a in more)]


def forward(u, kernel, reverse, channel, pre, post, plan: Short, config):
    """y `[b t e]`; channel `[2 e]` is skip and bias."""
    f32 = lambda rows: pltpu.VMEM((rows, tpu.LANES), jnp.float32)
    operand = lambda rows: pltpu.VMEM((rows, tpu.LANES), jnp.dtype(plan.operands))
    (y,) = _call(
        functools.partial(_fwd_kernel, plan=plan),
        plan,
        config,
        "long_conv_short_forward",
        _given(plan, u, kernel, reverse, channel, pre, post),
        [("tokens", jax.ShapeDtypeStruct(u.shape, u.dtype))],
        [f32(plan.n), f32(plan.n), operand(plan.n), operand(plan.t)],
    )
    return y


def _product(out_ref, matrix_ref, x, columns=slice(None)):
    """out = matrix[:, columns] x, some rows at a time."""
    for part in _parts(out_ref.shape[0]):
        out_ref[part] = dot(matrix_ref[part, columns], x[...])


def _halves(plan: Short):
    """Rows of real and imaginary parts, a few frequencies at a time."""
    half = plan.n // 2
    for at in range(0, half, _ROWS):
        end = min(at + _ROWS, half)
        yield slice(at, end), slice(half + at, half + end)


def _parts(t: int):
    """Tokens, a few at a time."""
    return (slice(at, min(at + _ROWS, t)) for at in range(0, t, _ROWS))


def _lags(ref, plan: Short):
    """A block of lags `[128 width]`; 0 where they count no more."""
    lags = ref[...].astype(jnp.float32)
    if plan.width > plan.lags:
        lane = jax.lax.broadcasted_iota(jnp.int32, lags.shape, 1)
        lags = jnp.where(lane < plan.lags, lags, 0)
    return lags.astype(plan.operands)


def _kernel_spectrum(kernel_ref, reverse_ref, there_ref, ahead_ref, spectrum_ref, plan: Short):
    columns = slice(0, plan.width)
    for refs, first in (((kernel_ref,), True), ((reverse_ref,), False)):
        if refs[0] is None:
            continue
        lags = _lags(refs[0], plan)
        for re, im in _halves(plan):
            x, y = (dot(there_ref[part, columns], lags, (1, 1)) for part in (re, im))
            if first:
                spectrum_ref[re], spectrum_ref[im] = x, y
            else:  # the conjugate, one token ahead
                cos, sin = ahead_ref[re], ahead_ref[im]
                spectrum_ref[re] += cos * x + sin * y
                spectrum_ref[im] += sin * x - cos * y


def _refs(given: Refs, plan: Short):
    """u, kernel, reverse, channel, pre, post."""
    u, kernel, reverse = given.take(), given.take(), given.take(plan.two_sided)
    return u, kernel, reverse, given.take(), given.take(plan.pre), given.take(plan.post)


def _of(ref, i, part=slice(None)):
    """A row of the batch in float32; None = 1."""
    return 1.0 if ref is None else ref[i, part].astype(jnp.float32)


def _fwd_kernel(*refs, plan: Short):
    given = Refs(refs)
    u, kernel, reverse, channel, pre, post = _refs(given, plan)
    there, back, ahead, y_ref = given.several(4)
    spectrum, v_spectrum, z_operand, v_operand = given.several(4)

    @pl.when(pl.program_id(1) == 0)
    def _():
        _kernel_spectrum(kernel, reverse, there, ahead, spectrum, plan)

    def row(i, carry):
        v_operand[...] = (_of(u, i) * _of(pre, i)).astype(plan.operands)
        _product(v_spectrum, there, v_operand, slice(0, plan.t))
        for re, im in _halves(plan):
            x, y, k, l = v_spectrum[re], v_spectrum[im], spectrum[re], spectrum[im]
            z_operand[re] = (x * k - y * l).astype(plan.operands)
            z_operand[im] = (x * l + y * k).astype(plan.operands)
        skip, bias = channel[0:1, :], channel[1:2, :]
        for part in _parts(plan.t):
            v = _of(u, i, part) * _of(pre, i, part)
            z = dot(back[part], z_operand[...]) + skip * v + bias
            if post is not None:
                z = z * _of(post, i, part)
            y_ref[i, part] = z.astype(y_ref.dtype)
        return carry

    jax.lax.fori_loop(0, plan.batch, row, 0)


def backward(u, kernel, reverse, channel, pre, post, dy, plan: Short, config):
    """Gradients of u, kernel, reverse, channel, pre and post; None for what was not given.

    Those of kernels are `[e width]`, float32.
    """
    e = u.shape[2]
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    lags = jax.ShapeDtypeStruct((e, plan.width), jnp.float32)
    outputs = [("tokens", like(u)), ("lags", lags)]
    outputs += [("lags", lags)] * plan.two_sided
    outputs += [("channel", jax.ShapeDtypeStruct((2, e), jnp.float32))]
    outputs += [("tokens", like(a)) for a in (pre, post) if a is not None]
    f32 = lambda rows: pltpu.VMEM((rows, tpu.LANES), jnp.float32)
    operand = lambda rows: pltpu.VMEM((rows, tpu.LANES), jnp.dtype(plan.operands))
    found = _call(
        functools.partial(_bwd_kernel, plan=plan, steps=u.shape[0] // plan.batch),
        plan,
        config,
        "long_conv_short_backward",
        _given(plan, u, kernel, reverse, channel, pre, post, dy),
        outputs,
        [
            *(f32(plan.n), f32(plan.n), f32(plan.n), f32(plan.n)),
            *(operand(plan.n), operand(plan.n), operand(plan.t), operand(plan.t)),
        ],
    )
    found = list(found)
    du, dkernel = found.pop(0), found.pop(0)
    dreverse = found.pop(0) if plan.two_sided else None
    dchannel = found.pop(0)
    dpre = found.pop(0) if plan.pre else None
    return du, dkernel, dreverse, dchannel, dpre, found.pop(0) if plan.post else None


def _bwd_kernel(*refs, plan: Short, steps: int):
    given = Refs(refs)
    u, kernel, reverse, channel, pre, post = _refs(given, plan)
    dy, there, back, ahead, du, dkernel = given.several(6)
    dreverse, dchannel = given.take(plan.two_sided), given.take()
    dpre, dpost = given.take(plan.pre), given.take(plan.post)
    spectrum, sums, v_spectrum, g_spectrum = given.several(4)
    z_operand, dv_operand, v_operand, g_operand = given.several(4)
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        _kernel_spectrum(kernel, reverse, there, ahead, spectrum, plan)
        sums[...] = jnp.zeros_like(sums)
        dchannel[...] = jnp.zeros_like(dchannel)

    def row(i, carry):
        v_operand[...] = (_of(u, i) * _of(pre, i)).astype(plan.operands)
        g_operand[...] = (_of(dy, i) * _of(post, i)).astype(plan.operands)
        _product(v_spectrum, there, v_operand, slice(0, plan.t))
        _product(g_spectrum, there, g_operand, slice(0, plan.t))
        for re, im in _halves(plan):
            x, y, k, l = v_spectrum[re], v_spectrum[im], spectrum[re], spectrum[im]
            p, q = g_spectrum[re], g_spectrum[im]
            z_operand[re] = (x * k - y * l).astype(plan.operands)
            z_operand[im] = (x * l + y * k).astype(plan.operands)
            dv_operand[re] = (p * k + q * l).astype(plan.operands)
            dv_operand[im] = (q * k - p * l).astype(plan.operands)
            sums[re] += p * x + q * y
            sums[im] += q * x - p * y
        skip, bias = channel[0:1, :], channel[1:2, :]
        for part in _parts(plan.t):
            u_i, dy_i = _of(u, i, part), _of(dy, i, part)
            pre_i = _of(pre, i, part)
            v, g = u_i * pre_i, dy_i
            if post is not None:
                g = dy_i * _of(post, i, part)
                z = dot(back[part], z_operand[...]) + skip * v + bias
                dpost[i, part] = (dy_i * z).astype(dpost.dtype)
            dv = dot(back[part], dv_operand[...]) + skip * g
            du[i, part] = (dv * pre_i).astype(du.dtype)
            if pre is not None:
                dpre[i, part] = (dv * u_i).astype(dpre.dtype)
            dchannel[0:1, :] += jnp.sum(g * v, axis=0, keepdims=True)
            dchannel[1:2, :] += jnp.sum(g, axis=0, keepdims=True)
        return carry

    jax.lax.fori_loop(0, plan.batch, row, 0)

    @pl.when(step == steps - 1)
    def _():
        _kernel_gradients(sums, z_operand, there, ahead, dkernel, dreverse, plan)


def _kernel_gradients(sums, operand, there, ahead, dkernel, dreverse, plan: Short):
    """From the gradient of the spectrum to those of lags, `[128 width]`."""
    columns, scale = slice(0, plan.width), 2 / plan.n
    operand[...] = (scale * sums[...]).astype(plan.operands)
    dkernel[...] = dot(operand[...], there[:, columns], (0, 0))
    if plan.two_sided:
        for re, im in _halves(plan):
            cos, sin, x, y = ahead[re], ahead[im], scale * sums[re], scale * sums[im]
            operand[re] = (cos * x + sin * y).astype(plan.operands)
            operand[im] = (sin * x - cos * y).astype(plan.operands)
        lags = dot(operand[...], there[:, columns], (0, 0))
        # The one that looks beyond the row is left out.
        at = jax.lax.broadcasted_iota(jnp.int32, lags.shape, 1)
        dreverse[...] = jnp.where(at < plan.t - 1, lags, 0)
