"""All levels of the stack, one part of the batch and channels after the other.

A part is small, so that what stands between its levels takes little memory and is found in a cache;
the backward pass computes it again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_conv.level import How, divisor, level, tile_of

# Elements of a part, if it can be: 4 MiB in float32. Channels are not cut below a few vectors.
_PART, _CHANNELS = 2**20, 32


class Stack(NamedTuple):
    """What is static of a stack."""

    dilations: tuple[int, ...]
    activation: str
    symmetric: bool


class Sights(NamedTuple):
    """What each token sees, `[b t]`: tokens of its document behind and ahead; whether it is one."""

    behind: jax.Array
    ahead: jax.Array
    valid: jax.Array


def one_level(s, i, weight, bias, sights, stack, past=None, first=None):
    """Level i: `[b t e]` from `[b t e]`.

    Args:
        s: its inputs, 0 at padding.
        i: which one.
        weight: `[j w e]`; bias: `[j e]`.
        sights: Sights; None = one document.
        stack: see Stack.
        past: `[b (w-1) d e]`, the inputs before; None = zeros.
        first: int32 `[b]`, the first token: the past stands right before it.
    """
    b, t, e = s.shape
    taps, d = weight.shape[1], stack.dilations[i]
    most = (t - 1) // d  # taps that look further see nothing of this call
    middle = taps // 2 if stack.symmetric else 0
    forward, back = min(middle, most), taps - 1 - middle
    if past is None:
        back = min(back, most)
    tile = tile_of(b, t, d, e, back + forward + 1)
    known = past is not None and back > 0
    x = jnp.pad(s, ((0, 0), (back * d if known else 0, tile.n * d - t), (0, 0)))
    if known:
        put = lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, 0)
        x = jax.vmap(put)(x, past, first)
    behind, ahead = (
        None if sights is None else _rows(seen, tile.n, d)
        for seen in ((None, None) if sights is None else sights[:2])
    )
    w = weight[i, middle - forward : middle + back + 1]
    how = How(tile, forward, stack.activation, edges=known)
    s = level(x.reshape(b, -1, d, e), w, bias[i], behind, ahead, how)
    s = s.reshape(b, tile.n * d, e)[:, :t]
    return s if sights is None else jnp.where(sights.valid[..., None], s, 0)


def _rows(x, n: int, d: int):
    """`[b t]` by row and phase, `[b n d 1]`; -1 where there is no token."""
    b, t = x.shape
    return jnp.pad(x, ((0, 0), (0, n * d - t)), constant_values=-1).reshape(b, n, d, 1)


def _all_levels(floats, sights, stack):
    """From (x, weight, bias); in the dtype of the weight inside, in that of x outside."""
    x, weight, bias = floats
    s = x.astype(weight.dtype)
    for i in range(len(stack.dilations)):
        s = one_level(s, i, weight, bias, sights, stack)
    return s.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_parts(x, weight, bias, sights, stack):
    """The whole stack `[b t e]` without a past; see `one_level`."""

    def body(part, y):
        *floats, seen = part.cut(x, weight, bias, sights)
        return part.put(y, _all_levels(floats, seen, stack))

    return _each(x, body, jnp.zeros_like(x))


def _in_parts_forward(x, weight, bias, sights, stack):
    return in_parts(x, weight, bias, sights, stack), (x, weight, bias, sights)


def _in_parts_backward(stack, residuals, dy):
    x, weight, bias, sights = residuals

    def body(part, carry):
        dx, dweight, dbias = carry
        *floats, seen = part.cut(x, weight, bias, sights)
        _, pull = jax.vjp(lambda *floats: _all_levels(floats, seen, stack), *floats)
        dx_part, *more = pull(part.cut(dy, None, None, None)[0])
        dweight, dbias = (part.add(a, b) for a, b in zip((dweight, dbias), more, strict=True))
        return part.put(dx, dx_part), dweight, dbias

    zeros = tuple(map(jnp.zeros_like, (x, weight, bias)))
    return *_each(x, body, zeros), None


in_parts.defvjp(_in_parts_forward, _in_parts_backward)


class Part(NamedTuple):
    """Rows row .. row + rows of the batch and channels from .. from + width."""

    row: Any
    rows: int
    channel: Any
    width: int

    def cut(self, x, weight, bias, sights):
        """This part of the arguments."""
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, self.row, self.rows, axis=0)
        channels = lambda a: jax.lax.dynamic_slice_in_dim(a, self.channel, self.width, axis=-1)
        cut = lambda a: None if a is None else channels(a)
        return channels(rows(x)), cut(weight), cut(bias), jax.tree.map(rows, sights)

    def put(self, x, part):
        """x `[b t e]` with this part replaced."""
        return jax.lax.dynamic_update_slice(x, part, (self.row, 0, self.channel))

    def add(self, total, part):
        """A sum over the batch `[... e]` with a part more."""
        old = jax.lax.dynamic_slice_in_dim(total, self.channel, self.width, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, self.channel, axis=-1)


def _each(x, body, carry):
    """Runs `body(part, carry) -> carry` over all parts."""
    b, t, e = x.shape
    rows = divisor(b, _PART // (t * e))
    width = divisor(e, max(_CHANNELS, _PART // t)) if rows == 1 else e
    by_row, by_channel = b // rows, e // width
    if by_row * by_channel == 1:
        return body(Part(0, b, 0, e), carry)

    def step(i, carry):
        row, channel = i // by_channel * rows, i % by_channel * width
        return body(Part(row, rows, channel, width), carry)

    return jax.lax.fori_loop(0, by_row * by_channel, step, carry)
