"""The loop of the chunked form: blocks of queries against their keys, whose weights live for one
block only. The backward pass computes them again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.forms import Form
from pallas_kernels.chunk_attention.scores import products, weigh


class Cut(NamedTuple):
    """How a loop goes: queries `[b n l ...]` are taken `group` by `rows`, keys `group` by `keys`.

    Attributes:
        steps: of the loop.
        group: chunks at a time; 1 in a band.
        rows: queries of each.
        keys: keys that they meet.
        blocks: blocks of a chunk; 0 = a band, in which keys move along with the queries.
        first: the first query of a chunk that the loop takes.
    """

    steps: int
    group: int
    rows: int
    keys: int
    blocks: int
    first: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(q, k, v, bias, queries, keys, how):
    """y `[b n l g r v]` from q `[b n l g r k]`, k `[b n s g k]`, v `[b n s g v]`.

    Args:
        bias: `[h 2 chunk - 1]`, or None.
        queries, keys: labels int32 `[b or 1, n, l]` and `[b or 1, n, s]`: who has the same sees
            each other.
        how: the cuts, the form, the dtype of sums.
    """
    return _forward(q, k, v, bias, queries, keys, how)[0]


def _forward(q, k, v, bias, queries, keys, how):
    cuts, form, dtype = how

    def one_block(cut, y, i):
        run, arrays, (at, _, _) = _block(i, (q, k, v, bias, queries, keys), cut, form, dtype)
        return _put(y, run(*arrays).astype(y.dtype), at), None

    y = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for cut in cuts:
        y, _ = jax.lax.scan(functools.partial(one_block, cut), y, jnp.arange(cut.steps))
    return y, (q, k, v, bias, queries, keys)


def _backward(how, residuals, dy):
    q, k, v, bias, _, _ = residuals
    cuts, form, dtype = how

    def one_block(cut, carry, i):
        dq, dk, dv, dbias = carry
        run, arrays, (at, keys_at, sizes) = _block(i, residuals, cut, form, dtype)
        _, pull = jax.vjp(run, *arrays)
        dq_c, dk_c, dv_c, dbias_c = pull(_take(dy, at, (cut.group, cut.rows)).astype(dtype))
        # A key is met by the queries of several blocks.
        add = lambda total, part: _put(total, _take(total, keys_at, sizes) + part, keys_at)
        dbias = None if bias is None else dbias + dbias_c
        return (_put(dq, dq_c.astype(dq.dtype), at), add(dk, dk_c), add(dv, dv_c), dbias), None

    carry = (
        jnp.zeros_like(q),
        jnp.zeros(k.shape, dtype),
        jnp.zeros(v.shape, dtype),
        None if bias is None else jnp.zeros(bias.shape, dtype),
    )
    for cut in cuts:
        carry, _ = jax.lax.scan(functools.partial(one_block, cut), carry, jnp.arange(cut.steps))
    dq, dk, dv, dbias = carry
    if bias is not None and dbias is not None:
        dbias = dbias.astype(bias.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None


attend.defvjp(_forward, _backward)


def _block(i, arrays, cut: Cut, form: Form, dtype):
    """Step i of a loop: a function of (q, k, v, bias), those of the step, and where they lie."""
    *floats, bias, queries, keys = arrays
    if cut.blocks:  # the distance of key s from query r is s - r - shift
        chunk = i // cut.blocks * cut.group
        shift = cut.first + i % cut.blocks * cut.rows
        at, keys_at = (chunk, shift), (chunk, 0)
    else:
        at = keys_at = (0, i * cut.rows)
        shift = form.slots - 1
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
