"""A transform in two stages, for long rows, as pieces of the kernels' bodies.

Place i = i1 M + i2, frequency k = k1 + 256 k2. Planes of tokens `[t 128]` have channels on lanes;
columns `[parts*channels*M 128]` have i1 there, 128 to a part; spectra `[channels*M 256]` have k1,
real parts first. Between, everything is done for a group of channels at once (tpu_waves.group).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import dot
from pallas_kernels.long_conv import tpu_waves
from pallas_kernels.long_conv.tpu_waves import PAIRS

LANES = tpu.LANES


class Long(NamedTuple):
    """What is static of a call.

    Attributes:
        n: length of the transform.
        t: tokens of a row.
        lags: of each kernel that count.
        block: tokens that come and go at once.
        two_sided, pre, post: whether there is a reverse kernel, and gates.
        operands: dtype of what is multiplied.
    """

    n: int
    t: int
    lags: int
    block: int
    two_sided: bool
    pre: bool
    post: bool
    operands: str

    @property
    def m(self) -> int:
        return tpu_waves.columns(self.n)

    @property
    def parts(self) -> int:
        """Registers of lanes that i1 takes."""
        return -(-max(self.t, self.lags) // (LANES * self.m))

    @property
    def rows(self) -> int:
        """Of a plane of tokens."""
        most = max(self.t, self.lags)
        return max(self.parts * LANES * self.m, tpu.round_up(most, self.block))

    @property
    def group(self) -> int:
        """Rows of a group of channels in columns and spectra."""
        return tpu_waves.group(self.m) * self.m


class Waves(NamedTuple):
    """The matrices, in the order in which kernels take them.

    Attributes:
        first: `[parts*128 256]`; first_back: its transpose, with the share of each frequency.
        second: `[2*group group]`, cosines and sines.
        cos, sin: between the stages, `[group 128]`.
        ahead_cos, ahead_sin: of a token ahead, `[group 128]`.
    """

    first: jax.Array
    first_back: jax.Array
    second: jax.Array
    cos: jax.Array
    sin: jax.Array
    ahead_cos: jax.Array
    ahead_sin: jax.Array


def waves(plan: Long) -> Waves:
    """The matrices of a plan."""
    first = tpu_waves.first_stage(plan.parts * LANES)
    wide = lambda x: jnp.asarray(x, jnp.float32)
    operand = lambda x: jnp.asarray(x, plan.operands)
    return Waves(
        operand(first),
        operand(first.T * (2 / plan.n)),
        operand(tpu_waves.second_stage(plan.n)),
        *map(wide, tpu_waves.twiddles(plan.n)),
        *map(wide, tpu_waves.ahead(plan.n)),
    )


def waves_bytes(plan: Long) -> int:
    """Bytes that they take."""
    itemsize = jnp.dtype(plan.operands).itemsize
    products = 2 * plan.parts * LANES * 2 * PAIRS + 2 * plan.group * LANES
    return products * itemsize + 4 * plan.group * LANES * 4


def _strided(i2, part: int, plan: Long):
    """Rows i1 M + i2 of a plane of tokens, 128 of them."""
    return pl.ds(i2 + part * LANES * plan.m, LANES, stride=plan.m)


def _channels_at(i2, part: int, plan: Long):
    """Rows channel * M + i2 of a part of columns, for all channels."""
    return pl.ds(i2 + part * LANES * plan.m, LANES, stride=plan.m)


def _group(first, part: int, plan: Long):
    """Rows of a group of channels in a part of columns."""
    return pl.ds(first + part * LANES * plan.m, plan.group)


def to_columns(columns, plan: Long, read) -> None:
    """Fills columns with read(rows) `[128 128]`, tokens by channels."""

    def turn(i2, carry):
        for part in range(plan.parts):
            tile = read(_strided(i2, part, plan))
            columns[_channels_at(i2, part, plan), :] = tile.T
        return carry

    jax.lax.fori_loop(0, plan.m, turn, 0)


def from_columns(plan: Long, write, *columns) -> None:
    """Calls write(rows, tile `[128 128]` of each of the columns, tokens by channels)."""

    def turn(i2, carry):
        for part in range(plan.parts):
            at = _channels_at(i2, part, plan)
            write(_strided(i2, part, plan), *(ref[at, :].T for ref in columns))
        return carry

    jax.lax.fori_loop(0, plan.m, turn, 0)


def each_group(plan: Long, body) -> None:
    """Runs body(first row) for each group of channels."""

    def step(i, carry):
        body(pl.multiple_of(i * plan.group, 8))
        return carry

    jax.lax.fori_loop(0, LANES * plan.m // plan.group, step, 0)


def _planes(x):
    """Real and imaginary parts."""
    return x[:, :PAIRS], x[:, PAIRS:]


def put(ref, re, im) -> None:
    """Real and imaginary parts into `[rows 256]`, in its dtype."""
    ref[:, :PAIRS] = re.astype(ref.dtype)
    ref[:, PAIRS:] = im.astype(ref.dtype)


def transform(columns, first, between, refs: Waves, plan: Long):
    """The spectrum of a group, real and imaginary parts `[group 128]`.

    Args:
        columns: its real numbers.
        first: row of the group.
        between: scratch `[group 256]` of the operands' dtype.
        refs: Waves.
        plan: see Long.
    """
    of = lambda part: columns[_group(first, part, plan), :].astype(plan.operands)
    z = dot(of(0), refs.first[:LANES])
    for part in range(1, plan.parts):
        z = z + dot(of(part), refs.first[part * LANES : (part + 1) * LANES])
    re, im = _planes(z)
    cos, sin = refs.cos[...], refs.sin[...]
    put(between, re * cos + im * sin, im * cos - re * sin)
    c, s = (_planes(dot(half, between[...])) for half in _halves(refs.second, plan))
    return c[0] + s[1], c[1] - s[0]


def back(columns, first, spectrum, between, refs: Waves, plan: Long) -> None:
    """Writes what has this spectrum (scratch of the operands' dtype, `[group 256]`) to columns."""
    c, s = (_planes(dot(half, spectrum[...])) for half in _halves(refs.second, plan))
    re, im = c[0] - s[1], c[1] + s[0]
    cos, sin = refs.cos[...], refs.sin[...]
    put(between, re * cos - im * sin, im * cos + re * sin)
    for part in range(plan.parts):
        lanes = slice(part * LANES, (part + 1) * LANES)
        columns[_group(first, part, plan), :] = dot(between[...], refs.first_back[:, lanes])


def _halves(second, plan: Long):
    return second[: plan.group], second[plan.group :]
