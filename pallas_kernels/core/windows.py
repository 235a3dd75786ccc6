"""Rows read by windows that begin where the data say: at a document's start, at its n-th tokens.

What parts.py does for rows of one document, for packed rows and for streams that stop anywhere. In
each row the next window begins where the last one ended, so rows go on side by side, each at a
place of its own: n windows for n chunks, wherever documents lie. How many there are is known only
when it runs.

The forward pass keeps what is carried before every k-th window, as many as there is room for: k is
1 unless documents are far shorter than a window. The backward pass takes windows from the last one,
and runs those between two kept ones again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Room for so many times the windows of a row of one document: documents end in short ones.
_ROOM = 1.25


class Windows(NamedTuple):
    """Where windows lie in rows whose tokens stand together at the front.

    Attributes:
        starts: int32 `[b t+2]`, the first token of each window; after the last, how many there are.
        place: int32 `[b t]`, tokens of its document before each token.
        n: int32, windows of the row that has most.
    """

    starts: jax.Array
    place: jax.Array
    n: jax.Array


class Form(NamedTuple):
    """What is static.

    Attributes:
        rule, how, kept, regained: see `over_windows`.
        window: tokens of the longest one.
        room: how many carries are kept.
        inner: how many more while a stretch between two of them is run again.
    """

    rule: Callable
    how: Any
    window: int
    room: int
    inner: int
    kept: Callable
    regained: Callable


def over_windows(
    rule: Callable,
    how: Any,
    params: Any,
    carry: Any,
    inputs: tuple[jax.Array, ...],
    place: jax.Array,
    valid: jax.Array | None,
    *,
    window: int,
    span: int = 1,
    kept: Callable = lambda carry: carry,
    regained: Callable = lambda kept: kept,
) -> tuple[Any, Any]:
    """Runs `rule(how, params, carry, tokens, mine, place) -> (carry, y)` over all windows in order.

    Args:
        rule: a function of a module (hashable). It gets `window` tokens, of which those of the
            window are `mine` (bool `[b c]`, the first ones), with their `place` `[b c]`. Rows
            without such a token must come out as they went in. y is a tree of arrays `[b c ...]`,
            of which only what is `mine` is taken.
        how: static, hashable, for the rule.
        params: tree of arrays that all windows share.
        carry: tree of floating-point arrays.
        inputs: arrays `[b t ...]`.
        place: int32 `[b t]`, tokens of its document before each one. A window begins where it is a
            multiple of `window`, and with the first token.
        valid: bool `[b t]`, where there is a token; None = everywhere.
        span: windows per carry that is kept, about.
        kept: what of the carry before a window has to be kept.
        regained: makes a carry of that; what was not kept must not matter to the rule in a window
            that begins with a multiple of `window`.

    Returns:
        The last carry and y, arrays `[b t ...]`, 0 where there is no token. Differentiable in
        params, carry and inputs.
    """
    front = to_front(place, valid)
    inputs, place = tuple(map(front.gather, inputs)), front.gather(place)
    room = room_for(place.shape[1], window * span)
    form = Form(rule, how, window, room, span, kept, regained)
    carry, y = _over_windows(form, params, carry, inputs, _windows(place, front.size, window))
    return carry, jax.tree.map(front.scatter, y)


def room_for(tokens: int, window: int) -> int:
    """Windows for which there is room: a quarter more than a row of one document has."""
    return max(2, int(_ROOM * -(-tokens // window)))


class Front(NamedTuple):
    """How the tokens of each row are brought together at its front.

    Attributes:
        size: int32 `[b]`, tokens of each row.
        order: `[b t]`, where each one stood; None = there already.
        inverse: `[b t]`, where each one goes.
    """

    size: jax.Array
    order: jax.Array | None
    inverse: jax.Array | None

    def gather(self, x: jax.Array) -> jax.Array:
        """`[b t ...]`, tokens in front."""
        return x if self.order is None else _permuted(x, self.order, self.inverse)

    def scatter(self, x: jax.Array) -> jax.Array:
        """`[b t ...]`, tokens where they were."""
        return x if self.order is None else _permuted(x, self.inverse, self.order)


def to_front(place: jax.Array, valid: jax.Array | None) -> Front:
    """Where the tokens of rows `[b t]` go; `valid` is where there is one, None = everywhere."""
    b, t = place.shape
    if valid is None:
        return Front(jnp.full((b,), t, jnp.int32), None, None)
    order = jnp.argsort(~valid, axis=1, stable=True)
    return Front(jnp.sum(valid, axis=1, dtype=jnp.int32), order, jnp.argsort(order, axis=1))


def _windows(place: jax.Array, size: jax.Array, window: int) -> Windows:
    """Of rows with `size` `[b]` tokens in front."""
    at = jnp.arange(place.shape[1], dtype=jnp.int32)
    begins = ((place % window == 0) | (at == 0)) & (at < size[:, None])
    count = jnp.sum(begins, axis=1, dtype=jnp.int32)
    starts = jnp.argsort(~begins, axis=1, stable=True).astype(jnp.int32)
    end = size[:, None].astype(jnp.int32)
    starts = jnp.where(at < count[:, None], starts, end)
    return Windows(jnp.concatenate([starts, end, end], axis=1), place, jnp.max(count, initial=0))


@jax.custom_vjp
def _permuted(x, order, inverse):
    """Tokens `[b t ...]` in another order `[b t]`; the way back is no scatter."""
    del inverse
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _permuted_forward(x, order, inverse):
    return _permuted(x, order, inverse), (order, inverse)


def _permuted_backward(kept, dy):
    order, inverse = kept
    return _permuted(dy, inverse, order), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_windows(form, params, carry, inputs, windows):
    return _forward(form, params, carry, inputs, windows)[0]


def _forward(form, params, carry, inputs, windows):
    b, t = windows.place.shape
    long = tuple(_longer(x, form.window) for x in inputs)
    shapes = jax.eval_shape(
        functools.partial(_run, form), params, carry, long, windows, jnp.int32(0)
    )
    y = jax.tree.map(lambda a: jnp.zeros((b, t + form.window, *a.shape[2:]), a.dtype), shapes[1])
    room = jax.tree.map(
        lambda a: jnp.zeros((form.room, *a.shape), a.dtype), jax.eval_shape(form.kept, carry)
    )
    stride = _stride(form, windows)

    def stretch(state):
        g, carry, y, room = state
        room = _stored(room, form.kept(carry), g)

        def one(w, state):
            carry, y = state
            carry, found = _run(form, params, carry, long, windows, w)
            # What is nobody's yet behind the window is written over by the next one.
            return carry, jax.tree.map(lambda a, new: _put(a, new, windows.starts[:, w]), y, found)

        end = jnp.minimum((g + 1) * stride, windows.n)
        carry, y = jax.lax.fori_loop(g * stride, end, one, (carry, y))
        return g + 1, carry, y, room

    more = lambda state: state[0] * stride < windows.n
    _, last, y, room = jax.lax.while_loop(more, stretch, (jnp.int32(0), carry, y, room))
    here = jnp.arange(t) < windows.starts[:, -1:]
    y = jax.tree.map(lambda a: _where(here, a[:, :t], 0), y)
    return (last, y), (params, carry, room, inputs, windows)


def _backward(form, residuals, cotangents):
    params, first, room, inputs, windows = residuals
    dcarry, dy = cotangents
    stride = _stride(form, windows)
    long = tuple(_longer(x, form.window) for x in inputs)
    dy = jax.tree.map(lambda x: _longer(x, form.window), dy)
    inner = -(-stride // form.inner)  # windows between two carries of a stretch
    ahead = lambda w, carry: _run(form, params, carry, long, windows, w)[0]

    def regained(kept, w):
        """The carry before window w; of the first one all matters."""
        return jax.tree.map(lambda a, b: jnp.where(w == 0, a, b), first, form.regained(kept))

    def pull(carry, w, dcarry):
        at, mine = windows.starts[:, w], _mine(form, windows, w)
        run = lambda params, carry, tokens: _rule(form, params, carry, tokens, windows, w)
        tokens = tuple(_cut(x, at, form.window) for x in long)
        _, back = jax.vjp(run, params, carry, tokens)
        mask = lambda x: _where(mine, _cut(x, at, form.window), 0)
        return back((dcarry, jax.tree.map(mask, dy)))

    def stretch(state):
        g, dparams, dcarry, dlong = state
        begin, end = g * stride, jnp.minimum((g + 1) * stride, windows.n)
        start = form.kept(regained(jax.tree.map(lambda a: a[g], room), begin))
        room_of = jax.tree.map(lambda a: a[None], start)
        if form.inner > 1:
            room_of = jax.tree.map(lambda a: jnp.zeros((form.inner, *a.shape), a.dtype), start)

            def store(i, state):
                carry, held = state
                held = _stored(held, form.kept(carry), i)
                w = begin + i * inner
                return jax.lax.fori_loop(w, jnp.minimum(w + inner, end), ahead, carry), held

            n = -(-(end - begin) // inner)
            _, room_of = jax.lax.fori_loop(0, n, store, (regained(start, begin), room_of))

        def one(i, state):
            dparams, dcarry, dlong = state
            w = end - 1 - i
            j = (w - begin) // inner
            before = begin + j * inner
            carry = regained(jax.tree.map(lambda a: a[j], room_of), before)
            carry = jax.lax.fori_loop(before, w, ahead, carry)
            more, dcarry, found = pull(carry, w, dcarry)
            at, mine = windows.starts[:, w], _mine(form, windows, w)
            keep = lambda a, new: _put(a, _where(mine, new, _cut(a, at, form.window)), at)
            dlong = jax.tree.map(keep, dlong, found)
            return jax.tree.map(jnp.add, dparams, more), dcarry, dlong

        return g - 1, *jax.lax.fori_loop(0, end - begin, one, (dparams, dcarry, dlong))

    zeros = jax.tree.map(jnp.zeros_like, (params, long))
    last = -(-windows.n // stride) - 1
    state = (last, zeros[0], dcarry, zeros[1])
    _, dparams, dcarry, dlong = jax.lax.while_loop(lambda state: state[0] >= 0, stretch, state)
    t = windows.place.shape[1]
    return dparams, dcarry, tuple(x[:, :t] for x in dlong), None


_over_windows.defvjp(_forward, _backward)


# --- A window -----------------------------------------------------------------------------------


def _run(form, params, carry, long, windows, w):
    tokens = tuple(_cut(x, windows.starts[:, w], form.window) for x in long)
    return _rule(form, params, carry, tokens, windows, w)


def _rule(form, params, carry, tokens, windows, w):
    at = jnp.minimum(windows.starts[:, w, None], windows.place.shape[1] - 1)
    place = jnp.take_along_axis(windows.place, at, axis=1) + jnp.arange(
        form.window, dtype=jnp.int32
    )
    return form.rule(form.how, params, carry, tokens, _mine(form, windows, w), place)


def _mine(form, windows, w):
    """bool `[b c]`, which of the tokens from its first one are the window's."""
    size = windows.starts[:, w + 1] - windows.starts[:, w]
    return jnp.arange(form.window) < size[:, None]


def _stride(form, windows):
    """Windows per carry that is kept, so that there is room."""
    return jnp.maximum(-(-windows.n // form.room), 1)


# --- Shapes -------------------------------------------------------------------------------------


def _where(mask, a, b):
    """a where the `[b c]` mask is true, else b."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, b)


def _longer(x, window: int):
    """`[b t ...]` with a window of zeros behind it."""
    return jnp.pad(x, [(0, window * (i == 1)) for i in range(x.ndim)])


def _cut(x, at, window: int):
    """A window `[b c ...]` of `[b t+c ...]` at places `[b]`."""
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, window))(x, at)


def _put(x, part, at):
    """Writes a window of each row."""
    return jax.vmap(lambda x, part, at: jax.lax.dynamic_update_slice_in_dim(x, part, at, 0))(
        x, part, at
    )


def _stored(room, value, at):
    """Puts a carry into its place among those that are kept."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, at, 0), room, value)
