"""Packed documents and streams for the GPU kernels of neural_memory: chunks wherever they lie.

A window is a chunk of one document: its first token is at a multiple of the chunk from where the
document begins. XLA brings each to a tile of its own: the kernels cannot copy it from where it is,
for a copy into tiles of 8 rows begins at a multiple of 8 (TMA counts tiles, then rows in them). A
block of threads goes through the windows of a row, and takes the weights that documents begin with
where one does. A stream may come with a chunk that is open, whose gradients are taken at weights of
their own: its last tokens are dual.py's, before the kernel. There is room for a quarter more
windows than a row of one document has; where a row has more (documents far shorter than four
chunks), the xla form does all of the call.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import parts, windows
from pallas_kernels.neural_memory import dual, gpu_backward, gpu_forward, xla
from pallas_kernels.neural_memory.gpu_call import Call, Cuts
from pallas_kernels.neural_memory.gpu_layouts import cut, fill, filled
from pallas_kernels.neural_memory.gpu_tiles import SIZE


class Rows(NamedTuple):
    """Where windows lie in rows whose tokens stand together at the front; int32.

    Attributes:
        place: tokens of its document before each token, `[b t]`.
        size: tokens of each row, `[b]`.
        starts: the first token of each window, behind the last one the row's size, `[b n+1]`.
        n_windows: of each row, `[b]`.
    """

    place: jax.Array
    size: jax.Array
    starts: jax.Array
    n_windows: jax.Array


def run(call: Call, opening, state, tokens, segment_ids, *, fresh: bool):
    """As pallas_gpu.run, for packed documents or with a state that was carried on.

    Args:
        call: what is static, with room for `call.n` windows per row.
        opening: weights and momentum that documents begin with, `[h ...]`.
        state: start, now, momentum, count, last_id.
        tokens: q, k, v, alpha, eta, theta.
        segment_ids: int32 `[b t]` or None.
        fresh: whether nothing was read before.

    Returns:
        y and the state's fields.
    """
    *carry, count, last_id = state
    t = tokens[0].shape[1]
    place, valid, count, last_id = parts.places(segment_ids, count, last_id, t)
    front = windows.to_front(place, valid)
    tokens = tuple(map(front.gather, tokens))
    rows = rows_of(call, front.gather(place), front.size)
    carry = tuple(carry)
    head = None
    if not fresh and call.form.how.chunk > 1:
        carry, head = _finish(call, opening, carry, tokens, rows)
    y, carry = _memory(call, opening, carry, tokens, rows)
    if head is not None:
        # What belongs to no window is 0 in y.
        y = y.at[:, : head.shape[1]].add(head)
    return front.scatter(y), (*carry, count, last_id)


def rows_of(call: Call, place: jax.Array, size: jax.Array) -> Rows:
    """Where windows lie; place `[b t]` and size `[b]` are as in Rows."""
    t, n = place.shape[1], call.n
    at = jnp.arange(t, dtype=jnp.int32)
    begins = _begins(call, place) & (at < size[:, None])
    count = jnp.sum(begins, axis=1, dtype=jnp.int32)
    starts = jnp.argsort(~begins, axis=1, stable=True).astype(jnp.int32)
    starts = jnp.where(at < count[:, None], starts, size[:, None])
    behind = jnp.broadcast_to(size[:, None], (place.shape[0], max(n + 1 - t, 0)))
    starts = jnp.concatenate([starts, behind], axis=1)[:, : n + 1]
    return Rows(place, size, starts, count)


def _begins(call: Call, place: jax.Array) -> jax.Array:
    return place % call.form.how.chunk == 0


def _finish(call: Call, opening, carry, tokens, rows: Rows):
    """Reads the tokens of a chunk that the state has left open: the carry after them, and y."""
    c = min(tokens[0].shape[1], call.form.how.chunk - 1)
    length = jnp.where(rows.n_windows > 0, rows.starts[:, 0], rows.size)
    mine = jnp.arange(c) < length[:, None]
    first = tuple(x[:, :c] for x in tokens)
    carry, y = dual.any_documents(call.form.how, opening, carry, first, mine, rows.place[:, :c])
    return carry, jnp.where(mine[..., None, None], y, 0)


# --- The windows of a row -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(call: Call, opening, carry, tokens, rows: Rows):
    """y `[b t h v]`, 0 at tokens of no window, and the last (start, now, momentum)."""
    return _forward(call, opening, carry, tokens, rows, keep=False)[0]


def _forward(call: Call, opening, carry, tokens, rows: Rows, *, keep: bool = True):
    def kernel(opening, carry, tokens):
        given = _filled(call, opening), _filled(call, carry)
        y, last, kept = gpu_forward.forward(
            call,
            given[1],
            _filled_tiles(rows, tokens[:3]),
            _gates(call, tokens[3:], rows),
            keep=keep,
            opening=given[0],
            cuts=_cuts(rows),
        )
        (y,) = _of_tiles(call, rows, (y,), tokens[2:3])
        return y, tuple(map(cut, last, carry)), kept

    def portable(opening, carry, tokens):
        y, last = _portable(call, opening, carry, tokens, rows)
        shapes = gpu_forward.kept_structs(call) if keep else None
        return y, last, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    y, last, kept = jax.lax.cond(_fits(call, rows), kernel, portable, opening, carry, tokens)
    return (y, last), (kept, opening, carry, tokens, rows)


def _backward(call: Call, residuals, cotangents):
    kept, *given, rows = residuals

    def kernel(opening, carry, tokens, dy, dlast):
        *tiled, dy = _filled_tiles(rows, (*tokens[:3], dy))
        found = gpu_backward.backward(
            call,
            kept,
            tuple(tiled),
            _gates(call, tokens[3:], rows),
            dy,
            _filled(call, dlast),
            cuts=_cuts(rows),
        )
        dnow, dmomentum = found.dcarry
        none = rows.n_windows == 0
        dstart = jax.tree.map(lambda x: x * none.reshape(-1, *[1] * (x.ndim - 1)), dlast[0])
        dopening = jax.tree.map(lambda x: jnp.sum(x, axis=0), found.dopening)
        dtokens = (
            *_of_tiles(call, rows, found.dtokens, tokens[:3]),
            *_shares(call, found.dgates, tokens[3:], rows),
        )
        return (
            tuple(map(cut, dopening, opening)),
            (dstart, cut(dnow, carry[1]), cut(dmomentum, carry[2])),
            dtokens,
        )

    def portable(opening, carry, tokens, *cotangents):
        run = lambda opening, carry, tokens: _portable(call, opening, carry, tokens, rows)
        return jax.vjp(run, opening, carry, tokens)[1](cotangents)

    found = jax.lax.cond(_fits(call, rows), kernel, portable, *given, *cotangents)
    return *found, None


_memory.defvjp(_forward, _backward)


def _fits(call: Call, rows: Rows) -> jax.Array:
    return jnp.max(rows.n_windows, initial=0) <= call.n


def _portable(call: Call, opening, carry, tokens, rows: Rows):
    """The same by the xla form."""
    how, mine = call.form.how, _inside(rows)
    carry, y = xla.any_documents(how, opening, carry, tokens, rows.place, mine)
    return y, carry


def _inside(rows: Rows) -> jax.Array:
    """bool `[b t]`, which tokens belong to a window."""
    at = jnp.arange(rows.place.shape[1])
    return (at >= rows.starts[:, :1]) & (at < rows.size[:, None])


# --- What the kernels are given -------------------------------------------------------------------


def _filled(call: Call, carry):
    return tuple(filled(x, call.form.blocks * SIZE) for x in carry)


def _cuts(rows: Rows) -> Cuts:
    first = jnp.minimum(rows.starts[:, :-1], rows.place.shape[1] - 1)
    begins = jnp.take_along_axis(rows.place, first, axis=1) == 0
    return Cuts(begins.astype(jnp.int32), rows.n_windows)


def _tiled(rows: Rows, arrays) -> list[jax.Array]:
    """`[b t ...]` with each window at the front of a tile, and 0 behind it: `[b n*64 ...]`."""
    (b, t), at = rows.place.shape, rows.starts[:, :-1, None] + jnp.arange(SIZE)
    own = (at < rows.starts[:, 1:, None]).reshape(b, -1)
    at = jnp.minimum(at, t - 1).reshape(b, -1)

    def one(x):
        wide = lambda of: of.reshape(b, -1, *[1] * (x.ndim - 2))
        # What is not the window's may be nan of padding.
        return jnp.where(wide(own), jnp.take_along_axis(x, wide(at), axis=1), 0)

    return [one(x) for x in arrays]


def _filled_tiles(rows: Rows, arrays) -> tuple[jax.Array, ...]:
    return tuple(fill(x, SIZE) for x in _tiled(rows, arrays))


def _of_tiles(call: Call, rows: Rows, arrays, likes) -> tuple[jax.Array, ...]:
    """The way back, as `likes`; 0 at tokens of no window."""
    (b, t), inside = rows.place.shape, _inside(rows)
    window = jnp.cumsum(_begins(call, rows.place) & inside, axis=1, dtype=jnp.int32) - 1
    window = jnp.clip(window, 0, call.n - 1)
    row = jnp.arange(t, dtype=jnp.int32) - jnp.take_along_axis(rows.starts, window, axis=1)
    at = window * SIZE + jnp.clip(row, 0, SIZE - 1)

    def one(x, like):
        more = [1] * (x.ndim - 2)
        x = jnp.take_along_axis(x, at.reshape(b, t, *more), axis=1)
        x = jnp.where(inside.reshape(b, t, *more), x, 0)
        return x[..., : like.shape[-1]].astype(like.dtype)

    return tuple(map(one, arrays, likes))


def _gates(call: Call, shares, rows: Rows) -> jax.Array:
    """alpha, eta, theta and 1 for the tokens of each window, as `[b h n 4 64]`."""
    shares = (*(x.astype(jnp.float32) for x in shares), jnp.ones(shares[0].shape, jnp.float32))
    tiles = jnp.stack(_tiled(rows, shares), axis=1).reshape(
        call.b, len(shares), call.n, SIZE, call.h
    )
    return jnp.transpose(tiles, (0, 4, 2, 1, 3))


def _shares(call: Call, dgates: jax.Array, shares, rows: Rows) -> tuple[jax.Array, ...]:
    """Gradients by alpha, eta, theta `[b t h]` of those by the rows of tiles, `[b h n 3 64]`."""
    each = jnp.transpose(dgates, (3, 0, 2, 4, 1)).reshape(3, call.b, call.n * SIZE, call.h)
    return _of_tiles(call, rows, each, shares)
