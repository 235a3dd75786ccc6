"""Which tokens a chunk's tokens and its state see: one int32 per token, for TPU kernels.

For rules that hand a state from chunk to chunk, in kernels that have tokens on lanes.

Bit 0: there is a token; 1: it sees the state before its chunk; 2: it goes into the state after it;
3: the state before the chunk stays in the state after it (the same for all of a chunk). The number
of its document stands above them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.tpu import pad_to

_DOCUMENT = 4  # bits below it


class Seen(NamedTuple):
    """Masks of one chunk; None = all true.

    Attributes:
        pairs: `[c c]`, whether a token (second) sees another one (first) or itself.
        valid, head, tail: `[1 c]`.
        kept: `[1 1]`.
    """

    pairs: jax.Array
    valid: jax.Array | None = None
    head: jax.Array | None = None
    tail: jax.Array | None = None
    kept: jax.Array | None = None


def pack(document: jax.Array, valid: jax.Array, chunk: int, t: int) -> jax.Array:
    """Of documents' numbers (0 = the state's) and tokens `[b t]`: `[b 1 t]`, padded to length t."""
    b = document.shape[0]
    document = jnp.pad(document, [(0, 0), (0, t - document.shape[1])], mode="edge")
    valid = pad_to(valid, 1, t)
    last = document.reshape(b, t // chunk, chunk)[..., -1]
    before = jnp.pad(last[:, :-1], [(0, 0), (1, 0)])
    wide = lambda x: jnp.repeat(x, chunk, axis=1)
    bits = (valid, document == wide(before), valid & (document == wide(last)), wide(last == before))
    packed = sum(bit.astype(jnp.int32) << n for n, bit in enumerate(bits))
    return (packed + (document << _DOCUMENT))[:, None]


def seen(places: jax.Array | None, chunk: int) -> Seen:
    """Inside a kernel: the masks of a chunk from its `[1 c]` places."""
    token = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    pairs = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0) <= token
    if places is None:
        return Seen(pairs)
    bit = lambda n: (places & (1 << n)) != 0
    document = jnp.broadcast_to(places >> _DOCUMENT, (chunk, chunk))
    return Seen(pairs & (document == document.T), bit(0), bit(1), bit(2), bit(3)[:, :1])


def only(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x, and 0 where the mask is false, whatever stands there."""
    return x if mask is None else jnp.where(mask, x, 0)
