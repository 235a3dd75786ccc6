"""The chunked form for XLA: tokens of a chunk see each other, and nobody else.

Where every row begins at the start of a chunk and holds one document, the rows are cut into chunks
and a block of queries meets the keys of its chunk. Else chunks begin anywhere: a block of queries
meets the band of keys that any chunk of its own could hold, and labels of chunks say who is who.
Both are loops over blocks (blocks.py).
"""

import itertools

import jax.numpy as jnp

from pallas_kernels.chunk_attention.blocks import Cut, attend
from pallas_kernels.chunk_attention.forms import Form
from pallas_kernels.chunk_attention.places import PADDING_KEY, PADDING_QUERY, Places, in_order

# A long causal chunk is climbed in so many stairs: the first quarter of its queries meets the first
# quarter of its keys, and so on, which is 5/8 of all pairs.
STAIRS = 4


def run(q, k, v, bias, ring_k, ring_v, count, place: Places, *, form: Form, block: int):
    """y `[b t h v]`; the ring `[b g l k]`, `[b g l v]` in the dtype to compute in."""
    b, t, h, _ = q.shape
    chunk, g = form.slots, k.shape[2]
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
    chunk = min(form.slots, t)
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
    stairs = min(STAIRS, blocks) if form.causal else 1
    edges = [blocks * i // stairs for i in range(stairs + 1)]
    cuts = tuple(
        Cut(
            steps=n // group * (stop - start),
            group=group,
            rows=rows,
            keys=min(stop * rows, chunk),
            blocks=stop - start,
            first=start * rows,
        )
        for start, stop in itertools.pairwise(edges)
    )
    y = attend(
        chunks(q, rows * blocks),
        chunks(k, chunk),
        chunks(v, chunk),
        _middle(bias, form.slots, chunk),
        _pad(jnp.where(there, 0, PADDING_QUERY), 2, 0, rows * blocks - chunk, PADDING_QUERY),
        jnp.where(there, 0, PADDING_KEY),
        (cuts, form._replace(slots=chunk), str(dtype)),
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
    y = attend(
        one(q),
        one(k),
        one(v),
        bias,
        one(queries, PADDING_QUERY),
        one(keys, PADDING_KEY),
        ((cut,), form, str(dtype)),
    )
    return y[:, 0, :t]


def _middle(bias, chunk: int, fewer: int):
    """Of `[h 2 chunk - 1]` the distances that `fewer` tokens have."""
    return None if bias is None else bias[:, chunk - fewer : chunk + fewer - 1]


def _pad(x, axis: int, before: int, behind: int, fill=0):
    widths = [(before, behind) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
