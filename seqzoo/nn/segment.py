"""One segment of Titans' MAC: recall, attend, write, read again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core import parts, windows
from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.neural_memory import NeuralMemoryState, Weights, recall
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.neural_memory import MemoryState, NeuralMemory, persistent_tokens
from seqzoo.nn.rotary import rotate
from seqzoo.nn.sharding import whole_rows


class Carried(NamedTuple):
    """What goes on from token to token, all floating-point.

    Attributes:
        conv: inputs of the memory's convolution, `[b w-1 e]`, in a tuple; empty without one.
        start, now, momentum: the memory, as in NeuralMemoryState.
        segment: its weights at the start of the segment, which h is recalled with.
        h_k, h_v, x_k, x_v: keys and values of the open segment, `[b c h k]`, token i in slot i:
            of what was recalled and of the tokens.
    """

    conv: tuple[jax.Array, ...]
    start: Weights
    now: Weights
    momentum: Weights
    segment: Weights
    h_k: jax.Array
    h_v: jax.Array
    x_k: jax.Array
    x_v: jax.Array

    def state(self, count: jax.Array) -> NeuralMemoryState:
        """The memory's state, at a token of the document that the row is in."""
        return NeuralMemoryState(self.start, self.now, self.momentum, count, jnp.zeros_like(count))


class Segment(nnx.Module):
    """What MAC does inside a segment, its projections of keys and values included.

    Args:
        d_model: width of the stream.
        segment: tokens (c).
        n_persistent: learned tokens that every token sees.
        rope_theta: base of the rotary wavelengths; None = no positions.
        n_heads, head_dim, norm_eps, dtype, rngs, **memory: as in `NeuralMemory`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        segment: int,
        n_persistent: int,
        rope_theta: float | None,
        n_heads: int,
        head_dim: int,
        norm_eps: float,
        dtype: str,
        rngs: nnx.Rngs,
        **memory,
    ):
        self.segment, self.rope_theta, self.dtype = segment, rope_theta, dtype
        self.n_heads, self.head_dim = n_heads, head_dim
        common = dict(dtype=dtype, rngs=rngs)
        heads, inner = dict(n_heads=n_heads, head_dim=head_dim), n_heads * head_dim
        project = lambda: linear(d_model, inner, axes=("embed", "heads"), **common)
        self.k_proj, self.v_proj = project(), project()
        self.memory = NeuralMemory(inner, **heads, norm_eps=norm_eps, **memory, **common)
        self.h_norm = GatedRMSNorm(inner, n_groups=n_heads, eps=norm_eps, **common)
        self.h_proj = linear(inner, d_model, axes=("heads", "embed"), **common)
        # Assigned once: an attribute that was None first would be static.
        self.persistent = persistent_tokens(n_persistent, d_model, rngs) if n_persistent else None

    def __call__(self, carry: Carried, tokens, mine, place):
        """A part of a segment, in every row: the carry after it, and y, m `[b c e]` and the gates.

        Args:
            carry: before it.
            tokens: what the memory is asked, queries without and with positions, keys, values;
                `[b c h k]` each.
            mine: bool `[b c]`, the tokens of the part; None = all.
            place: int32 `[b c]`, tokens of the document before each one; None = the part begins a
                segment in the middle of a document.
        """
        asked, plain, q, k, v = tokens
        b, c = q.shape[:2]
        mine = jnp.ones((b, c), bool) if mine is None else mine
        if place is None:
            slot = jnp.broadcast_to(jnp.arange(c), (b, c))
            carry = carry._replace(segment=carry.now)
            count = jnp.full((b,), self.segment, jnp.int32)
        else:
            slot = place % self.segment
            count = jnp.min(jnp.where(mine, place, jnp.iinfo(jnp.int32).max), axis=1)
            carry = self._begun(carry, mine, place)
        h = recall(carry.segment, jnp.swapaxes(asked, 1, 2), **self._network())
        h = jax.lax.collapse(jnp.swapaxes(h, 1, 2), 2)
        h = self.h_proj(self.h_norm(h))
        h_k, h_v = self._heads(self.k_proj(h)), self._heads(self.v_proj(h))
        if self.rope_theta is not None:
            h_k = rotate(h_k, slot, theta=self.rope_theta)
        carry = carry._replace(**self._kept(carry, mine, slot, h_k=h_k, h_v=h_v, x_k=k, x_v=v))
        y = self._attend(plain, q, slot, carry)
        y = jnp.where(mine[..., None], y, 0)
        none = jnp.zeros((b,), jnp.int32)
        convs = tuple(ShortConvState(x, none) for x in carry.conv)
        m, (convs, memory), gates = self.memory.run(
            y,
            segment_ids=mine.astype(jnp.int32),
            state=MemoryState(convs, carry.state(count)),
        )
        carry = carry._replace(
            conv=tuple(x.x for x in convs),
            start=memory.start,
            now=memory.now,
            momentum=memory.momentum,
        )
        return carry, (y, m, *gates)

    def _begun(self, carry: Carried, mine, place) -> Carried:
        """Where a segment or a document begins with the part."""
        document = jnp.any(mine & (place == 0), axis=1)
        segment = jnp.any(mine & (place % self.segment == 0), axis=1)
        wide = lambda rows, x: rows.reshape(rows.shape + (1,) * (x.ndim - 1))
        choose = lambda rows, a, b: jax.tree.map(lambda a, b: jnp.where(wide(rows, b), a, b), a, b)
        now = choose(document, self.memory.weights(), carry.now)
        return carry._replace(
            conv=choose(document, jax.tree.map(jnp.zeros_like, carry.conv), carry.conv),
            segment=choose(segment, now, carry.segment),
        )

    def _kept(self, carry: Carried, mine, slot, **new):
        """The keys and values of the segment, with the new ones in their slots."""
        b, c = mine.shape
        at = jnp.full((b, self.segment + 1), -1, jnp.int32)
        slot = jnp.where(mine, slot, self.segment)  # the last one is nobody's
        at = at.at[jnp.arange(b)[:, None], slot].set(jnp.arange(c, dtype=jnp.int32), mode="drop")
        at = at[:, : self.segment, None, None]
        put = lambda old, x: jnp.where(
            at >= 0, jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1).astype(old.dtype), old
        )
        return {name: put(getattr(carry, name), x) for name, x in new.items()}

    def _attend(self, plain, q, slot, carry: Carried):
        """`[b c h*k]`: each token to the persistent ones and the slots up to its own."""
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        product = lambda equation, *x: jnp.einsum(
            equation, *(a.astype(q.dtype) for a in x), preferred_element_type=dtype
        )
        seen = (jnp.arange(self.segment) <= slot[..., None])[:, None]  # [b 1 c s]
        scores = [
            jnp.where(seen, product("bchk,bshk->bhcs", q, k), -jnp.inf)
            for k in (carry.h_k, carry.x_k)
        ]
        if self.persistent is not None:
            tokens = self.persistent[...]
            k, v = self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens))
            scores.append(product("bchk,nhk->bhcn", plain, k))
        scores = self.head_dim**-0.5 * jnp.concatenate(scores, axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)
        s = self.segment
        y = product("bhcs,bshk->bchk", weights[..., :s], carry.h_v)
        y = y + product("bhcs,bshk->bchk", weights[..., s : 2 * s], carry.x_v)
        if self.persistent is not None:
            y = y + product("bhcn,nhk->bchk", weights[..., 2 * s :], v)
        return jax.lax.collapse(y.astype(q.dtype), 2)

    def _heads(self, y):
        return y.reshape(*y.shape[:-1], self.n_heads, self.head_dim)

    def _network(self):
        options = dict(self.memory.options)
        return {name: options[name] for name in ("activation", "norm_eps")}

    def init_state(self, batch_size: int) -> Carried:
        """Before the first token: it holds no weights yet."""
        convs, memory = self.memory.init_state(batch_size)
        shape = (batch_size, self.segment, self.n_heads, self.head_dim)
        return Carried(
            tuple(x.x for x in convs),
            *memory[:3],
            jax.tree.map(jnp.zeros_like, memory.now),
            *(jnp.zeros(shape, state_dtype(self.dtype)) for _ in range(4)),
        )

    def opened(self, batch_size: int) -> Carried:
        """At the start of a document."""
        empty = self.init_state(batch_size)
        # Parameters are float32; a state may be wider.
        rows = lambda x, state: jnp.broadcast_to(x, state.shape).astype(state.dtype)
        return empty._replace(now=jax.tree.map(rows, self.memory.weights(), empty.now))

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the memories and the segment's keys and values; and with the conv inputs."""
        memory = self.memory.state_bytes()["recurrent"]
        slots = 4 * state_dtype(self.dtype).itemsize * self.segment * self.n_heads * self.head_dim
        recurrent = memory + memory // 3 + slots
        conv = self.memory.inputs.state_bytes()
        return {"recurrent": recurrent, "total": recurrent + max(conv - 4, 0)}


def segments(graphdef, params, carry: Carried, tokens, place, valid, segment: int):
    """All segments of a call: the last carry, and y, m, gates `[b t ...]`.

    Args:
        graphdef: of a `Segment`.
        params: its parameters, as pure arrays.
        carry: before the first token.
        tokens: `[b t h k]`, as `Segment` takes them.
        place, valid: `[b t]`, from `parts.places`.
        segment: tokens of one.
    """
    call = (_part, graphdef, params, carry, tokens)
    if place.shape[1] == 1:
        return parts.over_parts(*call, parts.cut(place, valid, 1, segment), block=1)
    return windows.over_windows(
        *call, place, valid, window=segment, kept=_without_segment, regained=_with_segment
    )


def one_document(graphdef, params, carry: Carried, tokens, segment: int):
    """`segments` of rows that are one document from its start; carry from `Segment.opened`."""
    return parts.over_parts(
        _part,
        graphdef,
        params,
        carry,
        tokens,
        parts.Parts(None, None),
        block=segment,
        kept=_without_segment,
        regained=_with_segment,
    )


def _part(graphdef, params, carry, tokens, mine, place):
    with whole_rows():  # a segment is short, and one comes after the other
        return nnx.merge(graphdef, params)(carry, tokens, mine, place)


def _without_segment(carry: Carried):
    return carry._replace(segment=None)


def _with_segment(kept: Carried) -> Carried:
    return kept._replace(segment=kept.now)
