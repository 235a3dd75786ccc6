"""The chunked form for XLA: tokens of a chunk see each other, and nobody else.

Where every row begins at the start of a chunk and holds one document, the rows are cut into chunks
and a block of queries meets the keys of its chunk. Else chunks begin anywhere: a block of queries
meets the band of keys that any chunk of its own could hold, and labels of chunks say who is who.
Both are one loop over blocks; the backward pass computes the weights of each block again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.forms import Form
from pallas_kernels.chunk_attention.places import PADDING_KEY, PADDING_QUERY, Places, in_order
from pallas_kernels.chunk_attention.scores import products, weigh


class Cut(NamedTuple):
    """How the loop goes: queries `[b n l ...]` are taken `group` by `rows`, keys `group` by `keys`.

    Attributes:
        steps: of the loop.
        group: chunks at a time; 1 in a band.
        rows: queries of each.
        keys: keys that they meet.
        blocks: blocks of a chunk; 0 = a band, in which keys move along with the queries.
    """

    steps: int
    group: int
    rows: int
    keys: int
    blocks: int


def run(q, k, v, bias, ring_k, ring_v, count, place: Places, *, form: Form, block: int):
    """y `[b t h v]`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in."""
    b, t, h, _ = q.shape
    chunk, g = form.chunk, k.shape[2]
    q = q.reshape(b, t, g, h // g, -1)
    if form.fresh and place.valid is None:
        y = _grid(q, k, v, bias, ring_k.dtype, form, block)
    else:
        place = place._replace(queries=_labels(place, count, chunk, t))
        oldest = count - count % chunk  # of the chunk that the state is in
        if form.causal:
            keys, labels = in_order(ring_k, k, count, place, oldest)
            values, _ = in_order(ring_v, v, count, place, oldest)
        else:
            labels = jnp.where(place.queries == PADDING_QUERY, PADDING_KEY, place.queries)
            ahead = lambda x, fill=0: _pad(x, 1, chunk - 1, chunk - 1, fill)
            keys, values, labels = ahead(k), ahead(v), ahead(labels, PADDING_KEY)
        y = _band(q, keys, values, bias, place.queries, labels, ring_k.dtype, form, block)
    return y.reshape(b, t, h, -1)


def _labels(place: Places, count, chunk: int, t: int):
    """Numbers int32 `[b t]` that tell chunks of the call apart; 0 = the chunk of the state."""
    if place.valid is None:
        return ((count % chunk)[:, None] + jnp.arange(t, dtype=jnp.int32)) // chunk
    begins = place.valid & (place.position % chunk == 0)
    return jnp.where(place.valid, jnp.cumsum(begins, axis=1, dtype=jnp.int32), PADDING_QUERY)


# --- How the rows are laid for the loop ----------------------------------------------------------


def _grid(q, k, v, bias, dtype, form: Form, block: int):
    """y `[b t g r v]`; chunk i of every row holds its tokens i * chunk .. (i + 1) * chunk - 1."""
    b, t = q.shape[:2]
    chunk = min(form.chunk, t)
    blocks = -(-chunk // block)
    rows = -(-chunk // blocks)
    n = -(-t // chunk)
    # Of small chunks as many at a time as make up the pairs of one large block.
    group = min(n, max(1, block // chunk) ** 2)
    n = -(-n // group) * group

    def chunks(x, size):
        x = _pad(x, 1, 0, n * chunk - t).reshape(b, n, chunk, *x.shape[2:])
        return _pad(x, 2, 0, size - chunk)

    there = jnp.arange(n * chunk).reshape(1, n, chunk) < t
    cut = Cut(n // group * blocks, group, rows, chunk, blocks)
    y = _attend(
        chunks(q, rows * blocks),
        chunks(k, chunk),
        chunks(v, chunk),
        _middle(bias, form.chunk, chunk),
        _pad(jnp.where(there, 0, PADDING_QUERY), 2, 0, rows * blocks - chunk, PADDING_QUERY),
        jnp.where(there, 0, PADDING_KEY),
        (cut, form._replace(chunk=chunk), str(dtype)),
    )
    return y[:, :, :chunk].reshape(b, n * chunk, *y.shape[3:])[:, :t]


def _band(q, k, v, bias, queries, keys, dtype, form: Form, block: int):
    """y `[b t g r v]`; chunk - 1 keys stand before the first query, and as many behind the last one
    of what looks both ways."""
    t = q.shape[1]
    rows = min(block, t)
    more = -t % rows
    one = lambda x, fill=0: _pad(x, 1, 0, more, fill)[:, None]
    cut = Cut((t + more) // rows, 1, rows, rows + k.shape[1] - t, 0)
    y = _attend(
        one(q),
        one(k),
        one(v),
        bias,
        one(queries, PADDING_QUERY),
        one(keys, PADDING_KEY),
        (cut, form, str(dtype)),
    )
    return y[:, 0, :t]


def _middle(bias, chunk: int, fewer: int):
    """Of `[h 2 chunk - 1]` the distances that `fewer` tokens have."""
    return None if bias is None else bias[:, chunk - fewer : chunk + fewer - 1]


# --- The loop ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, queries, keys, how):
    """y `[b n l g r v]` from q `[b n l g r k]`, k `[b n s g k]`, v `[b n s g v]`.

    Args:
        bias: `[h 2 chunk - 1]`, or None.
        queries, keys: labels int32 `[b or 1, n, l]` and `[b or 1, n, s]`: who has the same sees
            each other.
        how: the cut, the form, the dtype of sums.
    """
    return _forward(q, k, v, bias, queries, keys, how)[0]


def _forward(q, k, v, bias, queries, keys, how):
    def one_block(y, i):
        run, arrays, (at, _, _) = _block(i, (q, k, v, bias, queries, keys), how)
        return _put(y, run(*arrays).astype(y.dtype), at), None

    y = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    y, _ = jax.lax.scan(one_block, y, jnp.arange(how[0].steps))
    return y, (q, k, v, bias, queries, keys)


def _backward(how, residuals, dy):
    q, k, v, bias, _, _ = residuals
    cut, _, dtype = how

    def one_block(carry, i):
        dq, dk, dv, dbias = carry
        run, arrays, (at, keys_at, sizes) = _block(i, residuals, how)
        _, pull = jax.vjp(run, *arrays)
        dq_c, dk_c, dv_c, dbias_c = pull(_take(dy, at, (cut.group, cut.rows)).astype(dtype))
        # A key is met by the queries of several blocks.
        add = lambda total, part: _put(total, _take(total, keys_at, sizes) + part, keys_at)
        dbias = None if bias is None else dbias + dbias_c
        return (_put(dq, dq_c.astype(dq.dtype), at), add(dk, dk_c), add(dv, dv_c), dbias), None

    zeros = (
        jnp.zeros_like(q),
        jnp.zeros(k.shape, dtype),
        jnp.zeros(v.shape, dtype),
        None if bias is None else jnp.zeros(bias.shape, dtype),
    )
    (dq, dk, dv, dbias), _ = jax.lax.scan(one_block, zeros, jnp.arange(cut.steps))
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None


_attend.defvjp(_forward, _backward)


def _block(i, arrays, how):
    """Step i of the loop: a function of (q, k, v, bias), those of the step, and where they lie."""
    cut, form, dtype = how
    *floats, bias, queries, keys = arrays
    if cut.blocks:  # the distance of key s from query r is s - r - shift
        chunk, shift = i // cut.blocks * cut.group, i % cut.blocks * cut.rows
        at, keys_at = (chunk, shift), (chunk, 0)
    else:
        at = keys_at = (0, i * cut.rows)
        shift = form.chunk - 1
    sizes, keys_sizes = (cut.group, cut.rows), (cut.group, cut.keys)
    q_c = _take(floats[0], at, sizes).astype(dtype)
    k_c, v_c = (_take(x, keys_at, keys_sizes).astype(dtype) for x in floats[1:])
    queries, keys = _take(queries, at, sizes), _take(keys, keys_at, keys_sizes)
    seen = queries[..., :, None] == keys[..., None, :]  # [b n r s]
    if form.causal:
        seen &= jnp.arange(cut.keys) <= jnp.arange(cut.rows)[:, None] + shift
    product = products(floats[0].dtype)

    def run(q, k, v, bias):
        scores = product("bnigrk,bnsgk->bngris", q, k)
        if bias is not None:
            bias = _by_distance(bias, shift, cut.rows, cut.keys)
            bias = bias.reshape(*scores.shape[2:4], cut.rows, cut.keys)
        weights = weigh(form.score, scores, bias, seen[:, :, None, None], form.scale)
        return product("bngris,bnsgv->bnigrv", weights, v)

    bias = None if bias is None else bias.astype(dtype)
    return run, (q_c, k_c, v_c, bias), (at, keys_at, keys_sizes)


def _by_distance(bias, shift, rows: int, keys: int):
    """`[h rows keys]`: entry (r, s) is the bias of distance s - r - shift; any number beyond it.

    Without a gather, whose gradient would be a scatter: the numbers are written row after row, one
    place further back each time.
    """
    h, width = bias.shape
    wide = jnp.pad(bias, ((0, 0), (rows - 1, rows + keys)))
    length = rows + keys
    line = jax.lax.dynamic_slice_in_dim(wide, width // 2 - shift, length, axis=1)
    lines = jnp.broadcast_to(line[:, None], (h, rows, length)).reshape(h, rows * length)
    lines = lines[:, rows - 1 : rows - 1 + rows * (length - 1)]
    return lines.reshape(h, rows, length - 1)[:, :, :keys]


def _take(x, at, sizes):
    """A part of `[b n l ...]` that begins at (n, l) = at."""
    start = (0, *at, *(0,) * (x.ndim - 3))
    return jax.lax.dynamic_slice(x, start, (x.shape[0], *sizes, *x.shape[3:]))


def _put(x, part, at):
    return jax.lax.dynamic_update_slice(x, part, (0, *at, *(0,) * (x.ndim - 3)))


def _pad(x, axis: int, before: int, behind: int, fill=0):
    widths = [(before, behind) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
