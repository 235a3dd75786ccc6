"""The kernels for long rows: a row and 128 channels at a time, all of it in the vector memory.

A row goes through phases, each of some steps: lags come (of the first row of the batch alone),
tokens come, and at the last of them everything is computed; then tokens go, and at last (of the
last row alone) the gradients of lags. Between, one block of everything is on its way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs, rows_below
from pallas_kernels.long_conv import tpu_stages
from pallas_kernels.long_conv.tpu_stages import (
    LANES,
    Long,
    Waves,
    back,
    each_group,
    from_columns,
    put,
    to_columns,
    transform,
    waves,
)
from pallas_kernels.long_conv.tpu_waves import PAIRS, PERIOD


def plan_of(least: int, block: int, call: dict[str, Any]) -> Long:
    """The plan of transforms of at least so many numbers; call has the other fields."""
    n = PERIOD * tpu.round_up(-(-least // PERIOD), 8)
    return Long(n=n, block=min(block, tpu.round_up(call["t"], LANES)), **call)


def vmem(plan: Long, itemsize: int) -> int:
    """Bytes that the backward kernel takes."""
    gates = plan.pre + plan.post
    blocks = 2 * plan.block * LANES * ((3 + 2 * gates) * itemsize + 4 * 4)
    planes = (2 + gates) * plan.rows + 2 * plan.parts * LANES * plan.m
    spectra = 2 * LANES * plan.m * 2
    return blocks + 4 * LANES * (planes + spectra + 16 * plan.group) + tpu_stages.waves_bytes(plan)


class _Phases:
    """Steps of a row: where each phase begins, and which block a step takes in it."""

    def __init__(self, plan: Long, rows: int, backward: bool):
        tokens, lags = pl.cdiv(plan.t, plan.block), pl.cdiv(plan.lags, plan.block)
        names = ["kernel", "reverse", "load", "store"] + ["dkernel", "dreverse"] * backward
        there = [n for n in names if plan.two_sided or "reverse" not in n]
        self.size = {n: tokens if n in ("load", "store") else lags for n in there}
        self.first, at = {}, 0
        for name in there:
            self.first[name], at = at, at + self.size[name]
        self.steps, self.rows = at, rows

    def block(self, name: str, row, step):
        """Which one is there at a step; the neighbour of the phase before and after it."""
        size = self.size[name]
        found = jnp.clip(step - self.first[name], 0, size - 1)
        if name in ("kernel", "reverse"):  # of the first row alone: then the last one stays
            return jnp.where(row == 0, found, size - 1)
        if name in ("dkernel", "dreverse"):  # of the last row alone: until then the first one
            return jnp.where(row == self.rows - 1, found, 0)
        return found

    def when(self, name: str, row, step):
        """Whether a step is of a phase."""
        mine = (step >= self.first[name]) & (step < self.first[name] + self.size[name])
        if name in ("kernel", "reverse"):
            return mine & (row == 0)
        if name in ("dkernel", "dreverse"):
            return mine & (row == self.rows - 1)
        return mine

    def begins(self, name: str, row, step):
        return self.when(name, row, step) & (step == self.first[name])

    def ends(self, name: str, row, step):
        return self.when(name, row, step) & (step == self.first[name] + self.size[name] - 1)


def _call(body, plan: Long, config, name: str, arrays, outputs, scratch, phases: _Phases):
    """arrays and outputs: (phase or "channel", array or shape) in order."""
    first = arrays[0][1]
    b, t, e = first.shape

    def spec(kind: str) -> pl.BlockSpec:
        if kind == "channel":
            return pl.BlockSpec((2, LANES), lambda c, i, n: (0, c))
        if kind in ("load", "store"):
            return pl.BlockSpec(
                (1, plan.block, LANES), lambda c, i, n: (i, phases.block(kind, i, n), c)
            )
        return pl.BlockSpec((LANES, plan.block), lambda c, i, n: (c, phases.block(kind, i, n)))

    def whole(a):
        return pl.BlockSpec(a.shape, lambda c, i, n: (0, 0), pipeline_mode=pl.Buffered(1))

    matrices = waves(plan)
    return tpu.kernel_call(
        body,
        name=name,
        config=config,
        grid=(pl.cdiv(e, LANES), b, phases.steps),
        in_specs=[spec(kind) for kind, _ in arrays] + [whole(w) for w in matrices],
        out_specs=[spec(kind) for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=scratch,
        semantics=("parallel", "arbitrary", "arbitrary"),
        cost=pl.CostEstimate(
            flops=len(outputs) * 4 * b * e * plan.n * (LANES + plan.m),
            bytes_accessed=sum(a.size * a.dtype.itemsize for _, a in (*arrays, *outputs)),
            transcendentals=0,
        ),
    )(*(a for _, a in arrays), *matrices)


def _scratch(plan: Long, planes: int, columns: int, spectra: int) -> list:
    f32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    operand = pltpu.VMEM((plan.group, 2 * PAIRS), jnp.dtype(plan.operands))
    return [
        *(f32(plan.rows, LANES) for _ in range(planes)),
        *(f32(plan.parts * LANES * plan.m, LANES) for _ in range(columns)),
        *(f32(LANES * plan.m, 2 * PAIRS) for _ in range(spectra)),
        operand,
        operand,
    ]


def _given(plan: Long, given, *more):
    """The arrays that are there, with their phases."""
    u, kernel, reverse, channel, pre, post = given
    arrays = [("load", u), ("kernel", kernel), ("channel", channel)]
    if plan.two_sided:
        arrays.append(("reverse", reverse))
    return arrays, [a for a in (pre, post) if a is not None], list(more)


def forward(u, kernel, reverse, channel, pre, post, plan: Long, config):
    """y `[b t e]`; channel `[2 e]` is skip and bias."""
    phases = _Phases(plan, u.shape[0], False)
    arrays, _, _ = _given(plan, (u, kernel, reverse, channel, pre, post))
    if plan.pre:
        arrays.append(("load", pre))
    if plan.post:
        arrays.append(("store", post))
    (y,) = _call(
        functools.partial(_fwd_kernel, plan=plan, phases=phases, channels=u.shape[2]),
        plan,
        config,
        "long_conv_forward",
        arrays,
        [("store", jax.ShapeDtypeStruct(u.shape, u.dtype))],
        _scratch(plan, 1, 1, 1),
        phases,
    )
    return y


def _tokens(ref, at, plan: Long, channels):
    """A block of tokens in float32, 0 beyond the row and the channels."""
    x = ref[0].astype(jnp.float32)
    if plan.t % plan.block:
        x = rows_below(x, plan.t - at)
    return _channels(x, channels)


def _channels(x, channels):
    """0 beyond the channels of this step; None = it has 128."""
    if channels is None:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < channels, x, 0)


def _channels_left(channels: int):
    return None if channels % LANES == 0 else channels - pl.program_id(0) * LANES


def _block(at, plan: Long):
    return pl.ds(pl.multiple_of(at, LANES), plan.block)


def _load_lags(ref, plane, at, plan: Long, channels) -> None:
    """A block of lags `[128 block]` into a plane, turned round."""
    lags = ref[...].astype(jnp.float32).T
    if plan.lags % plan.block:
        lags = rows_below(lags, plan.lags - at)
    plane[_block(at, plan), :] = _channels(lags, channels)


def _clear(plane, start: int) -> None:
    """Sets a plane to 0 from a row on."""
    if start < plane.shape[0]:
        plane[start:] = jnp.zeros((plane.shape[0] - start, LANES), jnp.float32)


def _kernels(phases, refs, plane, columns, spectrum, between, matrices, plan: Long, channels):
    """The phases in which lags come, up to their spectrum."""
    row, step = pl.program_id(1), pl.program_id(2)
    for name, ref in refs.items():
        if ref is None:
            continue

        @pl.when(phases.when(name, row, step))
        def _(name=name, ref=ref):
            at = (step - phases.first[name]) * plan.block
            _load_lags(ref, plane, at, plan, channels)

        @pl.when(phases.ends(name, row, step))
        def _(name=name):
            _clear(plane, phases.size[name] * plan.block)
            to_columns(columns, plan, lambda rows: plane[rows, :])

            def group(first):
                rows = pl.ds(first, plan.group)
                re, im = transform(columns, first, between, matrices, plan)
                if name == "reverse":  # the conjugate, one token ahead
                    cos, sin = matrices.ahead_cos[...], matrices.ahead_sin[...]
                    re, im = cos * re + sin * im, sin * re - cos * im
                    re, im = spectrum[rows, :PAIRS] + re, spectrum[rows, PAIRS:] + im
                spectrum[rows, :PAIRS], spectrum[rows, PAIRS:] = re, im

            each_group(plan, group)


def _fwd_kernel(*refs, plan: Long, phases: _Phases, channels):
    given = Refs(refs)
    u_ref, kernel_ref, channel_ref = given.several(3)
    reverse_ref = given.take(plan.two_sided)
    pre_ref, post_ref = given.take(plan.pre), given.take(plan.post)
    matrices = Waves(*given.several(len(Waves._fields)))
    y_ref, plane, columns, spectrum, z_ref, between = given.several(6)
    row, step = pl.program_id(1), pl.program_id(2)
    channels = _channels_left(channels)
    lags = dict(kernel=kernel_ref, reverse=reverse_ref)
    _kernels(phases, lags, plane, columns, spectrum, between, matrices, plan, channels)

    @pl.when(phases.when("load", row, step))
    def _():
        at = (step - phases.first["load"]) * plan.block
        v = _tokens(u_ref, at, plan, channels)
        if plan.pre:
            v = v * _tokens(pre_ref, at, plan, channels)
        plane[_block(at, plan), :] = v

    @pl.when(phases.ends("load", row, step))
    def _():
        _clear(plane, phases.size["load"] * plan.block)
        to_columns(columns, plan, lambda rows: plane[rows, :])

        def group(first):
            rows = pl.ds(first, plan.group)
            x, y = transform(columns, first, between, matrices, plan)
            k, l = spectrum[rows, :PAIRS], spectrum[rows, PAIRS:]
            put(z_ref, x * k - y * l, x * l + y * k)
            back(columns, first, z_ref, between, matrices, plan)

        each_group(plan, group)

        def finish(rows, z):
            plane[rows, :] = z + channel_ref[0:1, :] * plane[rows, :] + channel_ref[1:2, :]

        from_columns(plan, finish, columns)

    @pl.when(phases.when("store", row, step))
    def _():
        at = (step - phases.first["store"]) * plan.block
        y = plane[_block(at, plan), :]
        if plan.post:
            y = y * post_ref[0].astype(jnp.float32)
        y_ref[0] = y.astype(y_ref.dtype)


def backward(u, kernel, reverse, channel, pre, post, dy, plan: Long, config):
    """Gradients of u, kernel, reverse, channel, pre and post; None for what was not given.

    Those of kernels are `[e lags]`, float32.
    """
    e = u.shape[2]
    phases = _Phases(plan, u.shape[0], True)
    arrays, gates, _ = _given(plan, (u, kernel, reverse, channel, pre, post))
    arrays += [("load", a) for a in (dy, *gates)]
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    lags = jax.ShapeDtypeStruct((e, plan.lags), jnp.float32)
    outputs = [("store", like(a)) for a in (u, *gates)]
    outputs += [("channel", jax.ShapeDtypeStruct((2, e), jnp.float32)), ("dkernel", lags)]
    outputs += [("dreverse", lags)] * plan.two_sided
    found = _call(
        functools.partial(_bwd_kernel, plan=plan, phases=phases, channels=e),
        plan,
        config,
        "long_conv_backward",
        arrays,
        outputs,
        _scratch(plan, 2 + len(gates), 2, 2),
        phases,
    )
    found = list(found)
    du = found.pop(0)
    dpre = found.pop(0) if plan.pre else None
    dpost = found.pop(0) if plan.post else None
    dchannel, dkernel = found.pop(0), found.pop(0)
    return du, dkernel, found.pop(0) if plan.two_sided else None, dchannel, dpre, dpost


def _bwd_kernel(*refs, plan: Long, phases: _Phases, channels):
    given, gates = Refs(refs), plan.pre + plan.post
    u_ref, kernel_ref, channel_ref = given.several(3)
    reverse_ref = given.take(plan.two_sided)
    loaded = [u_ref, *given.several(1 + gates)]  # u, dy, pre, post
    matrices = Waves(*given.several(len(Waves._fields)))
    stored = given.several(1 + gates)  # du, dpre, dpost
    dchannel_ref, dkernel_ref = given.several(2)
    dreverse_ref = given.take(plan.two_sided)
    planes = given.several(2 + gates)
    columns, g_columns, spectrum, sums, z_ref, between = given.several(6)
    row, step = pl.program_id(1), pl.program_id(2)
    channels = _channels_left(channels)
    lags = dict(kernel=kernel_ref, reverse=reverse_ref)
    _kernels(phases, lags, planes[0], columns, spectrum, between, matrices, plan, channels)

    @pl.when((row == 0) & (step == 0))
    def _():
        sums[...] = jnp.zeros_like(sums)
        dchannel_ref[...] = jnp.zeros_like(dchannel_ref)

    @pl.when(phases.when("load", row, step))
    def _():
        at = (step - phases.first["load"]) * plan.block
        for ref, plane in zip(loaded, planes, strict=True):
            plane[_block(at, plan), :] = _tokens(ref, at, plan, channels)

    @pl.when(phases.ends("load", row, step))
    def _():
        for plane in planes:
            _clear(plane, phases.size["load"] * plan.block)
        _gradients(planes, columns, g_columns, spectrum, sums, z_ref, between, channel_ref,
                   dchannel_ref, matrices, plan)  # fmt: skip

    @pl.when(phases.when("store", row, step))
    def _():
        at = (step - phases.first["store"]) * plan.block
        # du lies in the place of u, dpost in that of dy, dpre in its own.
        found = [planes[0], *([planes[2]] if plan.pre else []), *([planes[1]] if plan.post else [])]
        for ref, plane in zip(stored, found, strict=True):
            ref[0] = plane[_block(at, plan), :].astype(ref.dtype)

    for name, ref in dict(dkernel=dkernel_ref, dreverse=dreverse_ref).items():
        if ref is None:
            continue

        @pl.when(phases.begins(name, row, step))
        def _(name=name):
            _lag_gradients(name, planes[0], columns, sums, z_ref, between, matrices, plan)

        @pl.when(phases.when(name, row, step))
        def _(name=name, ref=ref):
            at = (step - phases.first[name]) * plan.block
            lags = planes[0][_block(at, plan), :]
            if name == "dreverse" and plan.lags == plan.t:  # the last one looks beyond the row
                lags = rows_below(lags, plan.t - 1 - at)
            ref[...] = lags.T


def _gradients(planes, columns, g_columns, spectrum, sums, z_ref, between, channel_ref,
               dchannel_ref, matrices, plan: Long):  # fmt: skip
    """From u, dy and gates to their gradients, plane by plane in the same places."""
    u, dy = planes[:2]
    pre = planes[2] if plan.pre else None
    post = planes[-1] if plan.post else None
    gated = lambda x, gate, rows: x[rows, :] if gate is None else x[rows, :] * gate[rows, :]
    to_columns(columns, plan, lambda rows: gated(u, pre, rows))
    to_columns(g_columns, plan, lambda rows: gated(dy, post, rows))

    def group(first):
        rows = pl.ds(first, plan.group)
        x, y = transform(columns, first, between, matrices, plan)
        p, q = transform(g_columns, first, between, matrices, plan)
        sums[rows, :PAIRS] += p * x + q * y
        sums[rows, PAIRS:] += q * x - p * y
        k, l = spectrum[rows, :PAIRS], spectrum[rows, PAIRS:]
        if plan.post:
            put(z_ref, x * k - y * l, x * l + y * k)
            back(columns, first, z_ref, between, matrices, plan)
        put(z_ref, p * k + q * l, q * k - p * l)
        back(g_columns, first, z_ref, between, matrices, plan)

    each_group(plan, group)
    skip, bias = channel_ref[0:1, :], channel_ref[1:2, :]

    def finish(rows, dv, z=None):
        u_rows, dy_rows, v, g = u[rows, :], dy[rows, :], gated(u, pre, rows), gated(dy, post, rows)
        dv = dv + skip * g
        u[rows, :] = dv if pre is None else dv * pre[rows, :]
        if pre is not None:
            pre[rows, :] = dv * u_rows
        if z is not None:
            dy[rows, :] = dy_rows * (z + skip * v + bias)
        dchannel_ref[0:1, :] += jnp.sum(g * v, axis=0, keepdims=True)
        dchannel_ref[1:2, :] += jnp.sum(g, axis=0, keepdims=True)

    from_columns(plan, finish, g_columns, *([columns] if plan.post else []))


def _lag_gradients(name, plane, columns, sums, z_ref, between, matrices, plan: Long):
    """From the gradient of the spectrum to that of lags, in a plane."""

    def group(first):
        rows = pl.ds(first, plan.group)
        re, im = sums[rows, :PAIRS], sums[rows, PAIRS:]
        if name == "dreverse":
            cos, sin = matrices.ahead_cos[...], matrices.ahead_sin[...]
            re, im = cos * re + sin * im, sin * re - cos * im
        put(z_ref, re, im)
        back(columns, first, z_ref, between, matrices, plan)

    each_group(plan, group)

    def finish(rows, lags):
        plane[rows, :] = lags

    from_columns(plan, finish, columns)
