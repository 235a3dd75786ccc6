"""Chunks: what rules share that read some tokens at a time and hand a state `[b h k v]` on.

A rule that is linear in its state is computed inside a chunk by matrix products, and from chunk to
chunk by its state. How a rule uses this page (gated_delta_rule does so):

    # api.py: checks, and where the call starts from
    s, last_id, segment_ids, block_memory = chunks.open_call(
        "rule", sizes, initial_state, segment_ids, block_memory, dtype)

    # xla.py: n chunks of c tokens; the last one is filled up
    plan, last_id = chunks.plan(t, c, segment_ids, last_id, block_memory)
    q, k, v, g = (chunks.cut(x, c, plan, s.dtype) for x in (q, k, v, g))  # [n b h c ...]
    mask = chunks.sees(plan, c)              # token i sees token j              [n b 1 c c]
    mask = chunks.sees_start(plan)           # i sees the state that came in     [n b 1 c]
    mask = chunks.reaches_end(plan)          # the state that goes out sees j    [n b 1 c]
    mask = chunks.start_reaches_end(plan)    # what came in goes out             [n b 1]
    s, (starts, ...) = chunks.carry(step, s, (k, v, ...), plan.memory)  # all chunks in order
    y = chunks.join(y, t)                    # [b t h v]

    # the backward pass: s is the gradient of the last states, and becomes that of the first ones
    ds, (...) = chunks.carry(step_back, ds, (...), plan.memory, reverse=True)

`cut` sets arguments to 0 where there is no token (padding, what was filled up), log decays among
them; then nothing but documents needs a mask.

Memories: with `block_memory` int32 `[b blocks]`, each block of tokens belongs to one of m memories
of its row, a memory's blocks lie together and run in order, and the state is `[b m h k v]` with
last_id `[b m]`. `carry` takes each chunk's state out of its memory's place and puts it back, so a
memory without blocks keeps its state, and its gradient passes by.

Everything is linear in the length; nothing here grows with length x state but what `step` gives
out per chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import numerics
from pallas_kernels.core.axes import Axes
from pallas_kernels.core.segments import boundaries


class Plan(NamedTuple):
    """How a call is cut; n chunks of c tokens, None = nothing to mask.

    Attributes:
        valid: `[n b c]`, true where there is a token; None = everywhere.
        document: int32 `[n b c]`, documents that began in this chunk so far: 0 = still the one that
            the state is in; None = no chunk holds two.
        memory: int32 `[n b]`, whose state the chunk takes and gives; None = there is one.
    """

    valid: jax.Array | None
    document: jax.Array | None
    memory: jax.Array | None


# --- A call ------------------------------------------------------------------------------------


def open_call(
    op: str,
    sizes: dict[str, int],
    initial_state: Any,
    segment_ids: jax.Array | None,
    block_memory: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Checks state, documents and memories of a call, and gives the state to start from.

    Args:
        op: for messages.
        sizes: b, t, h, k, v by letter.
        initial_state: (s, last_id) or None = zeros.
        segment_ids: int32 `[b t]` or None.
        block_memory: int32 `[b blocks]` or None.
        dtype: of the state.

    Returns:
        s `[b h k v]`, or `[b m h k v]` with memories; last_id int32 `[b]` or `[b m]`; segment_ids
        and block_memory as int32, or None.

    Raises:
        ValueError: shapes do not fit; memories without an initial state (it says how many there
            are); blocks that are no power of two.
        TypeError: ids are not integers.
    """
    b, t = sizes["b"], sizes["t"]
    no_id = jnp.zeros((b,), jnp.int32)
    if initial_state is None:
        if block_memory is not None:
            raise ValueError(
                f"{op}: block_memory is given and initial_state is not; initial_state.s "
                "[b m h k v] says how many memories there are (zeros for fresh ones)"
            )
        initial_state = (jnp.zeros([sizes[x] for x in "bhkv"], dtype), no_id)
    s, last_id = initial_state
    if block_memory is None:
        numerics.check_shapes(op, sizes, initial_state_s=("b h k v", s))
        segment_ids, last_id = numerics.check_documents(op, sizes, segment_ids, last_id)
        return s.astype(dtype), last_id, segment_ids, None

    numerics.check_shapes(op, sizes, initial_state_s=("b m h k v", s))
    segment_ids, _ = numerics.check_documents(op, sizes, segment_ids, no_id)
    blocks = block_memory.shape[-1] if block_memory.ndim else 0
    if not blocks or t % blocks or (t // blocks) & (t // blocks - 1):
        raise ValueError(
            f"{op}: block_memory has shape {block_memory.shape} and there are {t} tokens; it must "
            "be [b blocks], and t / blocks a power of two"
        )
    for name, array, shape in (
        ("block_memory", block_memory, (b, blocks)),
        ("last_id of initial_state", last_id, (b, s.shape[1])),
    ):
        if array.shape != shape:
            raise ValueError(f"{op}: {name} has shape {array.shape}; it must be {shape}")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{op}: {name} has dtype {array.dtype}; it must be int32")
    return s.astype(dtype), last_id.astype(jnp.int32), segment_ids, block_memory.astype(jnp.int32)


def over_memories(op: Callable) -> Callable:
    """The operator with block_memory as its last positional argument.

    Arrays must be arguments to be spread over a mesh (seqzoo/nn/sharded.py): where a mixer has
    memories, it calls `sharded(over_memories(op), q, k, ..., block_memory, ...)`.
    """
    axes: Axes = op.axes  # type: ignore[attr-defined]

    def with_memories(*arguments, **options):
        *arrays, block_memory = arguments
        return op(*arrays, block_memory=block_memory, **options)

    with_memories.__name__ = f"{op.__name__}_over_memories"
    with_memories.axes = axes._replace(  # type: ignore[attr-defined]
        arguments=(*axes.arguments, ("b", "blocks")),
        state=(("b", "m", "h", "k", "v"), ("b", "m")),
    )
    return with_memories


def resets(
    segment_ids: jax.Array, last_id: jax.Array, block_memory: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `segments.boundaries`, with or without memories: reset `[b t]`, valid `[b t]`, last_id."""
    if block_memory is None:
        return boundaries(segment_ids, last_id)
    valid = segment_ids > 0
    memory = by_token(block_memory, segment_ids.shape[1])
    at_row = lambda x, places: jnp.take_along_axis(x, places, axis=1)
    # The token before each one, -1 = none; the id before it is that token's if both are of one
    # memory, else what the memory came with.
    places = jnp.where(valid, jnp.arange(segment_ids.shape[1]), -1)
    before = jnp.pad(jax.lax.cummax(places, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    known = (before >= 0) & (at_row(memory, jnp.maximum(before, 0)) == memory)
    id_before = jnp.where(
        known, at_row(segment_ids, jnp.maximum(before, 0)), at_row(last_id, memory)
    )
    reset = valid & (segment_ids != id_before) & (id_before > 0)
    # Ids never fall inside a memory: the largest is the last.
    own = memory[:, :, None] == jnp.arange(last_id.shape[1])
    largest = jnp.max(jnp.where(own, segment_ids[:, :, None], 0), axis=1)
    return reset, valid, jnp.maximum(last_id, largest)


def by_token(block_memory: jax.Array, t: int) -> jax.Array:
    """int32 `[b t]`, the memory of each of t tokens (or other equal parts of a row)."""
    return jnp.repeat(block_memory, t // block_memory.shape[1], axis=1)


def fitting(chunk: int, t: int, block_memory: jax.Array | None) -> int:
    """The chunk, or where there are memories a block of theirs if that is shorter."""
    return chunk if block_memory is None else min(chunk, t // block_memory.shape[1])


# --- Chunks ------------------------------------------------------------------------------------


def plan(
    t: int,
    chunk: int,
    segment_ids: jax.Array | None,
    last_id: jax.Array,
    block_memory: jax.Array | None = None,
    *,
    fill: int = 1,
) -> tuple[Plan, jax.Array]:
    """How t tokens are cut into chunks, and the ids to carry on.

    Args:
        t: tokens, at least 1.
        chunk: tokens per chunk; divides the blocks of memories.
        segment_ids: int32 `[b t]` or None.
        last_id: int32 `[b]`, or `[b m]` with memories.
        block_memory: int32 `[b blocks]` or None.
        fill: the number of chunks is filled up to a multiple of it, by chunks without tokens.

    Raises:
        ValueError: the chunk does not divide the blocks of memories.
    """
    padding = -t % (chunk * fill)
    memory = None
    if block_memory is not None:
        block = t // block_memory.shape[1]
        if block % chunk:
            raise ValueError(
                f"chunk is {chunk}; with block_memory it must divide the blocks of {block} tokens"
            )
        memory = by_token(block_memory, t // chunk).T
        memory = jnp.pad(memory, ((0, padding // chunk), (0, 0)), mode="edge")
    if segment_ids is None:
        if not padding:
            return Plan(None, None, memory), last_id
        valid = jnp.broadcast_to(jnp.arange(t + padding) < t, (last_id.shape[0], t + padding))
        return Plan(_by_chunk(valid, chunk), None, memory), last_id
    reset, valid, last_id = resets(segment_ids, last_id, block_memory)
    valid, reset = (_by_chunk(jnp.pad(x, ((0, 0), (0, padding))), chunk) for x in (valid, reset))
    return Plan(valid, jnp.cumsum(reset, axis=2, dtype=jnp.int32), memory), last_id


def cut(x: jax.Array, chunk: int, plan: Plan | None = None, dtype: Any = None) -> jax.Array:
    """`[b t h ...]` as `[n b h c ...]`; 0 where the plan says that there is no token."""
    x = _by_chunk(x if dtype is None else x.astype(dtype), chunk)
    if plan is not None and plan.valid is not None:
        x = jnp.where(plan.valid.reshape(plan.valid.shape + (1,) * (x.ndim - 3)), x, 0)
    return jnp.swapaxes(x, 2, 3)


def join(x: jax.Array, t: int) -> jax.Array:
    """`[n b h c ...]` as `[b t h ...]`: the inverse of `cut`."""
    n, b, h, c, *rest = x.shape
    return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3)).reshape(b, n * c, h, *rest)[:, :t]


def sees(plan: Plan, chunk: int, *, strictly: bool = False) -> jax.Array:
    """Whether token i of a chunk sees token j, `[... i j]`: j <= i (j < i), of one document.

    Shape `[n b 1 c c]`, or `[c c]` without documents.
    """
    lower = jnp.tri(chunk, k=-1 if strictly else 0, dtype=bool)
    if plan.document is None:
        return lower
    document = plan.document[:, :, None]
    return lower & (document[..., :, None] == document[..., None, :])


def sees_start(plan: Plan) -> jax.Array | None:
    """Whether a token sees the state at the start of its chunk, `[n b 1 c]`; None = all do."""
    return None if plan.document is None else (plan.document == 0)[:, :, None]


def reaches_end(plan: Plan) -> jax.Array | None:
    """Whether the state at the end of the chunk sees a token, `[n b 1 c]`; None = all."""
    if plan.document is None:
        return None
    return (plan.document == plan.document[:, :, -1:])[:, :, None]


def start_reaches_end(plan: Plan) -> jax.Array | None:
    """Whether the state at the start lives on at the end of the chunk, `[n b 1]`; None = always."""
    return None if plan.document is None else (plan.document[:, :, -1] == 0)[:, :, None]


def keep(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x where the mask is true, else 0; None = everywhere. For numbers that are finite anyway:
    differences of log decays are masked before exp."""
    return x if mask is None else jnp.where(mask, x, 0)


def carry(
    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    s: jax.Array,
    inputs: Any,
    memory: jax.Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, Any]:
    """Hands states from chunk to chunk.

    Args:
        step: `step(s, one chunk's inputs) -> (s after it, what it gives out)`, s `[b h k v]`.
        s: `[b h k v]`; `[b m h k v]` with memories.
        inputs: pytree of arrays `[n ...]`.
        memory: int32 `[n b]`, whose state each chunk takes and gives; None = there is one.
        reverse: from the last chunk to the first, as gradients go.

    Returns:
        The states after all chunks, and what the steps gave out `[n ...]`.
    """
    if memory is None:
        return jax.lax.scan(step, s, inputs, reverse=reverse)

    def one(states, x):
        memory, inputs = x
        after, out = step(jax.vmap(_take)(states, memory), inputs)
        return jax.vmap(_put)(states, after, memory), out

    return jax.lax.scan(one, s, (memory, inputs), reverse=reverse)


def _take(states, i):
    return jax.lax.dynamic_index_in_dim(states, i, keepdims=False)


def _put(states, s, i):
    return jax.lax.dynamic_update_index_in_dim(states, s, i, 0)


def _by_chunk(x: jax.Array, chunk: int) -> jax.Array:
    """`[b t ...]` as `[n b c ...]`, filled up with zeros."""
    b, t, *rest = x.shape
    x = jnp.pad(x, [(0, (-t % chunk) * (i == 1)) for i in range(x.ndim)])
    return jnp.swapaxes(x.reshape(b, -1, chunk, *rest), 0, 1)
