"""MEGA's moving average over any row: its kernel, and its recurrence chunk by chunk.

    h_t = q h_{t-1} + a x_t        [d n], n components per channel
    y_t = sum_n c_n h_t,n = sum_{s <= t} k[t - s] x_s,    k[l] = sum_n c_n a_n q_n^l

Inside a chunk, y is a product with a Toeplitz matrix per channel; what came before it is seen
through h at its start. Nothing of the size of d n is kept per token. Channels come first in the
arrays of these products: they are batches of matrix products then, without turning anything round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import einsum
from pallas_kernels.core.segments import boundaries
from seqzoo.nn.chunk_conv import chunk_conv
from seqzoo.nn.sequence_parallel import linear


class Rates(NamedTuple):
    """What a moving average does, `[d n]` each.

    Attributes:
        log_q: log of the decay per token, below 0.
        into: a, what a token adds.
        out: c, what is read.
    """

    log_q: jax.Array
    into: jax.Array
    out: jax.Array

    def decay(self, tokens) -> jax.Array:
        """q^tokens for `[...]` numbers of tokens: `[... d n]`."""
        return jnp.exp(jnp.asarray(tokens)[..., None, None] * self.log_q)


class EMAState(NamedTuple):
    """What a moving average keeps of everything it has read.

    Attributes:
        h: `[b d n]` float32, the components of every channel.
        last_id: int32 `[b]`, id of the document they are of; 0 = none yet, or not tracked.
    """

    h: jax.Array
    last_id: jax.Array


def kernel(rates: Rates, length: int) -> jax.Array:
    """k `[d length]`: q^(i * size + j) = q^(i * size) q^j, a product of two small tables."""
    size = max(1, int(length**0.5))
    rows = -(-length // size)
    coarse = rates.decay(jnp.arange(rows) * size) * rates.into * rates.out
    fine = rates.decay(jnp.arange(size))
    return einsum("idn,jdn->dij", coarse, fine).reshape(-1, rows * size)[:, :length]


def moving_average(
    x: jax.Array,
    log_q: jax.Array,
    into: jax.Array,
    out: jax.Array,
    *,
    chunk: int,
    initial_state: EMAState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, EMAState]:
    """`ema_scan` as an operator: what `sharded` can spread over a mesh."""
    h, last_id = (None, None) if initial_state is None else initial_state
    rates = Rates(log_q, into, out)
    y, after = ema_scan(x, rates, h, last_id, segment_ids=segment_ids, chunk=chunk)
    last_id = jnp.zeros(x.shape[:1], jnp.int32) if last_id is None else last_id
    if segment_ids is not None:
        _, _, last_id = boundaries(segment_ids, last_id)
    return y, EMAState(after, last_id)


def _through(call, args, state, valid):
    x, log_q, *_ = args
    tokens = jnp.full(x.shape[:1], x.shape[1]) if valid is None else jnp.sum(valid, axis=1)
    return (jnp.exp(tokens[:, None, None] * log_q),)


moving_average.axes = axes(  # type: ignore[attr-defined]
    "b t e, e n, e n, e n -> b t e", state="b e n, b", independent="b e"
)
moving_average.sequence_rule = linear(_through)  # type: ignore[attr-defined]


def ema_scan(
    x: jax.Array,
    rates: Rates,
    h: jax.Array | None = None,
    last_id: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    chunk: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """The moving average of whole rows, or of the next part of a stream.

    Args:
        x: `[b t d]`, float32.
        rates: of the average.
        h: `[b d n]` before the first token; None = zeros.
        last_id: int32 `[b]`, the document that h is of; None = not tracked.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
        chunk: tokens at a time.

    Returns:
        y `[b t d]` (0 at padding) and h after the last token.
    """
    b, t, _ = x.shape
    chunk = min(chunk, t)
    marks = _marks(segment_ids, last_id, b, t, chunk)
    if segment_ids is not None:
        x = jnp.where((segment_ids > 0)[..., None], x, 0)
    x = _chunks(x, chunk)  # [b i c d]
    lanes, places = jnp.moveaxis(x, 3, 0), jnp.arange(chunk)
    only = lambda x, seen: x if seen is None else jnp.where(seen, x, 0)

    adds = einsum(
        "dbic,cdn->ibdn", only(lanes, marks.end), rates.decay(chunk - 1 - places) * rates.into
    )
    before = jnp.zeros(adds.shape[1:], adds.dtype)
    to_outputs = None
    if h is not None and marks.documents is None:
        before = h
    elif h is not None:
        to_outputs, to_state = _goes_on(rates, h, marks)
        adds = adds + to_state
    through = rates.decay(chunk)

    def carry(h, inputs):
        add, stays = inputs
        kept = through * h
        return (kept if stays is None else jnp.where(stays[:, None, None], kept, 0)) + add, h

    stays = None if marks.documents is None else (marks.enters == marks.leaves).T
    _, starts = jax.lax.scan(carry, before, (adds, stays))
    old = einsum("ibdn,cdn->dbic", starts, rates.decay(places + 1) * rates.out)
    y = chunk_conv(lanes, kernel(rates, chunk), marks.documents) + only(old, marks.start)
    y = jnp.moveaxis(y, 0, 3)
    y = y if to_outputs is None else y + to_outputs
    return y.reshape(b, -1, y.shape[-1])[:, :t], _last(x, rates, h, starts, marks)


class _Marks(NamedTuple):
    """Where the tokens of i chunks of c tokens stand; None where there is one document.

    Attributes:
        first, last: int32 `[b]`, places of the first and the last token; t and -1 = there is none.
        documents: int32 `[b i c]`, counted in this call, 0 = the state's; -1 = padding.
        enters, leaves: int32 `[b i]`, the document before a chunk, and at its end.
        start, end: bool `[b i c]`, whether a token is of the one or the other.
    """

    first: jax.Array
    last: jax.Array
    documents: jax.Array | None = None
    enters: jax.Array | None = None
    leaves: jax.Array | None = None
    start: jax.Array | None = None
    end: jax.Array | None = None


def _marks(segment_ids, last_id, b: int, t: int, chunk: int) -> _Marks:
    zero = jnp.zeros((b,), jnp.int32)
    if segment_ids is None:
        return _Marks(zero, zero + t - 1)
    reset, valid, _ = boundaries(segment_ids, zero if last_id is None else last_id)
    document = jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), -1)
    at = jnp.arange(t, dtype=jnp.int32)
    first = jnp.min(jnp.where(valid, at, t), axis=1)
    last = jnp.max(jnp.where(valid, at, -1), axis=1)
    documents = _chunks(document, chunk, fill=-1)
    leaves = jax.lax.cummax(jnp.maximum(jnp.max(documents, axis=2), 0), axis=1)
    enters = jnp.concatenate([zero[:, None], leaves[:, :-1]], axis=1)
    start, end = (documents == which[..., None] for which in (enters, leaves))
    return _Marks(first, last, documents, enters, leaves, start, end)


def _goes_on(rates: Rates, h, marks: _Marks):
    """What a state gives to a document that goes on in the middle of a chunk, behind padding.

    Returns:
        for the outputs of that chunk `[b i c d]`, and for the state after it `[i b d n]`.
    """
    _, n_chunks, chunk = marks.documents.shape
    entry, at = marks.first // chunk, marks.first % chunk
    here = jnp.arange(n_chunks) == entry[:, None]  # [b i]
    ages = jnp.arange(chunk) - at[:, None]  # [b c]
    sees = here[..., None] & (ages >= 0)[:, None] & (marks.documents == 0)
    read = jnp.sum(rates.decay(jnp.maximum(ages, 0) + 1) * rates.out * h[:, None], axis=-1)
    left = (rates.decay(chunk - at) * h)[None]
    lives = (here & (marks.leaves == 0)).T[..., None, None]
    return jnp.where(sees[..., None], read[:, None], 0), jnp.where(lives, left, 0)


def _last(x, rates: Rates, h, starts, marks: _Marks):
    """h `[b d n]` after the last token: only its chunk is looked at."""
    chunk = x.shape[2]
    which, at = jnp.maximum(marks.last, 0) // chunk, marks.last % chunk
    ages = at[:, None] - jnp.arange(chunk)  # [b c]
    decays = rates.decay(jnp.maximum(ages, 0)) * rates.into  # [b c d n]
    seen, before = ages >= 0, _of_row(jnp.swapaxes(starts, 0, 1), which)
    before = rates.decay(at + 1) * before
    if marks.documents is not None:
        document = marks.leaves[:, -1]
        seen &= _of_row(marks.documents, which) == document[:, None]
        enters = _of_row(marks.enters, which) == document
        before = jnp.where(enters[:, None, None], before, 0)
    new = jnp.where(seen[..., None], _of_row(x, which), 0)[..., None] * decays
    after = before + jnp.sum(new, axis=1)
    if marks.documents is None:
        return after
    h = jnp.zeros_like(after) if h is None else h
    # A document that goes on in this very chunk, as in _goes_on.
    goes_on = (marks.first // chunk == which) & (document == 0)
    old = rates.decay(jnp.maximum(marks.last - marks.first, 0) + 1) * h
    after = after + jnp.where(goes_on[:, None, None], old, 0)
    return jnp.where((marks.last < 0)[:, None, None], h, after)


def _chunks(x, chunk: int, fill=0):
    """`[b t ...]` as `[b i c ...]`, filled up."""
    b, t = x.shape[:2]
    widths = [(0, -t % chunk * (axis == 1)) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill).reshape(b, -1, chunk, *x.shape[2:])


def _of_row(x, index):
    """`x[row, index[row]]` of each row."""
    index = index.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)[:, 0]
