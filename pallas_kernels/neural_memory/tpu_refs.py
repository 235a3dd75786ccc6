"""What the bodies of neural_memory's kernels do with references."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.neural_memory.tpu_blocks import Layout, Part
from pallas_kernels.neural_memory.tpu_chunk import Tokens
from pallas_kernels.neural_memory.tpu_stages import View


def get(refs: Any, *at: Any) -> Any:
    """What a tree of references holds at a place."""
    return jax.tree.map(lambda ref: ref[at], refs)


def put(refs: Any, values: Any, *at: Any) -> None:
    def one(ref, value):
        ref[at] = value

    jax.tree.map(one, refs, values)


def clear(refs: Any, *at: Any) -> None:
    """Writes zeros."""
    put(refs, jax.tree.map(lambda ref: jnp.zeros(ref.at[at].shape, ref.dtype), refs), *at)


def put_or_clear(refs: tuple, carry: tuple, at: Any) -> None:
    """Writes a carry, of which the momentum may be None: then it is 0."""
    *others, momentum = carry
    put(refs[:-1], get(tuple(others), at), at)
    if momentum is not None:
        put(refs[-1], get(momentum, at), at)
    else:
        clear(refs[-1], at)


def head_of(x: jax.Array, head: jax.Array, heads: int) -> jax.Array:
    """Columns of one head out of `[c heads*x]`, float32."""
    width = x.shape[1] // heads
    found = x[:, :width]
    for i in range(1, heads):
        found = jnp.where(head == i, x[:, i * width : (i + 1) * width], found)
    return found.astype(jnp.float32)


def put_head(ref: Any, x: jax.Array, head: jax.Array, heads: int, *, add: bool = False) -> None:
    """Writes the columns of one head, or adds to them what is 0 at the tokens of others."""
    wide = jnp.concatenate([x] * heads, axis=1) if heads > 1 else x
    old = ref[0].astype(x.dtype)
    if add:
        wide = old + wide
    if heads > 1:
        number = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1) // x.shape[1]
        wide = jnp.where(number == head, wide, old)
    ref[0] = wide.astype(ref.dtype)


def views(refs: Any, *at: Any) -> Any:
    """The matrices of a tree of references at a place."""
    return jax.tree.map(lambda ref: View(ref, at), refs)


def taken(form: Layout, work: Tokens, blocks: tuple, gates: Any, head: Any, block: Any) -> Tokens:
    """The tokens of a head, written to `work` in float32; None among q, k, v = not."""
    for ref, x in zip(work[:3], blocks, strict=True):
        if x is not None:
            ref[...] = head_of(x, head, form.heads)
    rows = gates[0, head, block].astype(jnp.float32)
    for i, ref in enumerate(work[3:]):
        ref[...] = rows[i : i + 1]
    q, k, v = (None if x is None else View(ref) for ref, x in zip(work[:3], blocks, strict=True))
    return Tokens(q, k, v, *map(View, work[3:]))


def gate_rows(gates: Any, head: Any, block: Any) -> tuple[View, ...]:
    """alpha, eta and theta of a head, `[1 c]`."""
    return tuple(View(gates, (0, head, block, pl.ds(i, 1))) for i in range(3))


def marks_of(form: Layout, cuts: Any, scratch: Any, block: Any, number: Any) -> Any:
    """What tpu_rules.py takes as marks, for the block of that number in the row.

    Args:
        form: sizes.
        cuts: references, as `Cuts`.
        scratch: a row, or for parts one number, to write to.
        block: the block's number in what `cuts` refers to.
        number: its number in the row.
    """
    if not form.aligned:
        part, documents, chunks = (View(cuts.tokens, (0, block, pl.ds(i, 1))) for i in range(3))
        return Part(part, documents, chunks, View(scratch))
    if form.t % form.block == 0:
        return None
    lane = jax.lax.broadcasted_iota(jnp.int32, scratch.shape, 1)
    scratch[...] = (lane < form.t - number * form.block).astype(jnp.float32)
    return View(scratch)
