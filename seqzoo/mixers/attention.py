"""Softmax attention with grouped queries and rotary positions: the baseline."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.segments import boundaries
from seqzoo.nn import inits
from seqzoo.nn.checks import check_call
from seqzoo.nn.linear import linear
from seqzoo.nn.ring_attention import full_attention
from seqzoo.nn.rotary import count_positions, rotate
from seqzoo.nn.sharded import sharded
from seqzoo.nn.sharding import rows_are_cut

_NO_STATE = "attention with causal=False sees later tokens: it reads whole sequences, stateless"


class AttentionState(NamedTuple):
    """A cache of keys and values, filled from the left; padding takes no slot.

    The documents of a row lie one after the other, so where the current one starts is all that
    has to be remembered of them.

    Attributes:
        k: rotated keys `[b g l k]` in the compute dtype; l slots, g key-value heads. The slots of a
            head lie side by side: so a step reads the cache once, as it lies, at the speed of
            memory.
        v: values `[b g l k]`.
        length: int32 `[b]`, slots in use.
        start: int32 `[b]`, slot of the first token of the current document.
        last_id: int32 `[b]`, id of the current document; 0 = none yet, or not tracked.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    start: jax.Array
    last_id: jax.Array


class Attention(nnx.Module):
    """Softmax attention, causal or both ways; several query heads may share one key-value head.

        y = softmax(q k^T / sqrt(head_dim) + mask) v W_o,    q, k turned by their positions

    Positions count from the start of each document. The state is a cache of `max_length` slots:
    it must be sized beforehand, and tokens that find it full come out as NaN. A step reads all
    its slots, used or not. With causal=False every token sees its whole document, and there is
    neither state nor step.

    Args:
        d_model: width of the input and output.
        n_heads: query heads (h).
        n_kv_heads: key-value heads (g), a divisor of n_heads; None = n_heads.
        head_dim: width of a head (k), even with rope; None = d_model / n_heads.
        causal: tokens see no later ones; False = an encoder's attention.
        rope: turn queries and keys by their positions; without it, order shows in the mask alone.
        rope_theta: base of the rotary wavelengths.
        use_bias: bias on all four projections.
        n_residuals: residual additions of the whole network; W_o starts divided by its root.
        implementation: of jax.nn.dot_product_attention, for whole sequences: "xla", "cudnn" or None
            = its own choice.
        dtype: what to compute in; parameters and the softmax are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762); Su et al., "RoFormer"
    (arXiv 2104.09864); Ainslie et al., "GQA" (arXiv 2305.13245). Rotary halves as in Llama.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rope: bool = True,
        rope_theta: float = 10000.0,
        use_bias: bool = False,
        n_residuals: int = 1,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if d_model < 1 or n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads is {n_heads} and n_kv_heads {n_kv_heads}; "
                "n_heads must be a multiple of n_kv_heads, both at least 1"
            )
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model is {d_model} and n_heads {n_heads}: d_model is no multiple of n_heads; "
                "change one or set head_dim"
            )
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if head_dim < 1 or (rope and head_dim % 2):
            raise ValueError(f"head_dim is {head_dim}; it must be at least 1, and even with rope")
        if implementation not in (None, "xla", "cudnn"):
            raise ValueError(f"implementation is {implementation!r}; allowed: null, xla, cudnn")

        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.causal, self.causality = causal, "exact" if causal else "none"
        self.rope, self.rope_theta = rope, float(rope_theta)
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        common = dict(use_bias=use_bias, dtype=self.dtype, rngs=rngs)
        inner, kv_inner = n_heads * head_dim, n_kv_heads * head_dim
        init, init_out = inits.normal(), inits.normal(n_residuals)
        self.q_proj = linear(d_model, inner, axes=("embed", "heads"), kernel_init=init, **common)
        self.k_proj = linear(
            d_model, kv_inner, axes=("embed", "kv_heads"), kernel_init=init, **common
        )
        self.v_proj = linear(
            d_model, kv_inner, axes=("embed", "kv_heads"), kernel_init=init, **common
        )
        self.out_proj = linear(
            inner, d_model, axes=("heads", "embed"), kernel_init=init_out, **common
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: AttentionState | None = None,
    ) -> tuple[jax.Array, AttentionState | None]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = `init_state(b, max_length=t)`.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token (None with
            causal=False).

        Raises:
            ValueError: the chunk alone is longer than the cache.
            NotImplementedError: a state was given with causal=False.
        """
        if not self.causal:
            if state is not None:
                raise NotImplementedError(_NO_STATE)
            check_call(x, segment_ids, None, AttentionState)
            return self._both_ways(x, segment_ids), None
        check_call(x, segment_ids, state, AttentionState)
        b, t, _ = x.shape
        whole = state is None
        if whole:
            state = self.init_state(b, max_length=t)
        slots = state.k.shape[2]
        if t > slots:
            raise ValueError(
                f"{t} tokens do not fit into a cache of {slots}: "
                "give init_state a larger max_length"
            )
        slot, start, valid, new = _place(segment_ids, state, t)
        q, k, v = self._project(x, slot - start)
        if valid is not None:  # what stands at padding must not reach anyone, not even as 0 * nan
            k, v = (jnp.where(valid[:, :, None, None], a, 0) for a in (k, v))
        if whole and valid is None:
            new = new._replace(k=jnp.swapaxes(k, 1, 2), v=jnp.swapaxes(v, 1, 2))
        else:
            new = new._replace(k=_write(state.k, k, slot, valid), v=_write(state.v, v, slot, valid))
        if whole:  # keys stay where they came in: id and order say who sees whom
            y = self._attend(q, k, v, segment_ids)
        else:
            places = jnp.arange(slots)
            seen = (places >= start[..., None]) & (places <= slot[..., None])  # [b t l]
            y = _look_up(q, new.k, new.v, seen)
            y = jnp.where((slot >= slots)[:, :, None, None], jnp.nan, y)
        if valid is not None:
            y = jnp.where(valid[:, :, None, None], y, 0)
        return self._out(y, valid), new

    def _both_ways(self, x, segment_ids):
        """Whole sequences `[b t d]`, every token seeing its document."""
        b, t, _ = x.shape
        start = jnp.zeros((b,), jnp.int32)
        q, k, v = self._project(x, count_positions(segment_ids, start, start, t)[0])
        valid = None if segment_ids is None else segment_ids > 0
        if valid is not None:
            k, v = (jnp.where(valid[:, :, None, None], a, 0) for a in (k, v))
        return self._out(self._attend(q, k, v, segment_ids), valid)

    def _attend(self, q, k, v, segment_ids):
        """Attention of `[b t h k]` to keys and values `[b t g k]` of the same document."""
        options = dict(causal=self.causal, implementation=self.implementation)
        # GSPMD cuts rows and heads by itself; over tokens that are cut, keys go round in a ring.
        attend = functools.partial(sharded, full_attention) if rows_are_cut() else full_attention
        return attend(q, k, v, segment_ids=segment_ids, **options)

    def _out(self, y, valid):
        """Maps heads `[b t h k]` to `[b t d]`, 0 at padding."""
        out = self.out_proj(jax.lax.collapse(y, 2))
        # A bias would show at padding.
        return out if valid is None else jnp.where(valid[..., None], out, 0)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> AttentionState:
        """An empty cache of `max_length` slots.

        Raises:
            ValueError: without max_length the cache has no size.
            NotImplementedError: with causal=False there is none.
        """
        if not self.causal:
            raise NotImplementedError(_NO_STATE)
        if max_length is None:
            raise ValueError("attention keeps every token: init_state needs max_length")
        shape = (batch_size, self.n_kv_heads, max_length, self.head_dim)
        # One array each: a state is donated, and no buffer can be given away twice.
        k, v = (jnp.zeros(shape, self.dtype) for _ in range(2))
        length, start, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(3))
        return AttentionState(k, v, length, start, last_id)

    def step(self, x_t: jax.Array, state: AttentionState) -> tuple[jax.Array, AttentionState]:
        """One token `[b d]`: returns `[b d]` and the state after it; not with causal=False."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: keys and values, and with the three counters; not with
        causal=False."""
        if not self.causal:
            raise NotImplementedError(_NO_STATE)
        itemsize = jnp.dtype(self.dtype).itemsize
        cache = 2 * context_length * self.n_kv_heads * self.head_dim * itemsize
        return {"recurrent": cache, "total": cache + 12}

    def _project(self, x, positions):
        """Queries `[b t h k]`, keys and values `[b t g k]`, turned by `positions` `[b t]`."""
        b, t, _ = x.shape
        q = self.q_proj(x).reshape(b, t, self.n_heads, self.head_dim)
        k = self.k_proj(x).reshape(b, t, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(b, t, self.n_kv_heads, self.head_dim)
        if self.rope:
            q, k = (rotate(a, positions, theta=self.rope_theta) for a in (q, k))
        return q, k, v


def _place(segment_ids, state: AttentionState, t: int):
    """Where t new tokens go.

    Returns:
        slot `[b t]`: the cache slot of each token (of the next one, at padding);
        start `[b t]`: the slot where its document starts;
        valid `[b t]` or None: not padding;
        the state with its counters brought up to date.
    """
    if segment_ids is None:
        slot = state.length[:, None] + jnp.arange(t, dtype=jnp.int32)
        start = jnp.broadcast_to(state.start[:, None], slot.shape)
        return slot, start, None, state._replace(length=state.length + t)
    reset, valid, last_id = boundaries(segment_ids, state.last_id)
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    slot = state.length[:, None] + count - valid
    start = jax.lax.cummax(jnp.where(reset, slot, state.start[:, None]), axis=1)
    if t:
        state = state._replace(length=state.length + count[:, -1], start=start[:, -1])
    new = state._replace(last_id=last_id)
    return slot, start, valid, new


def _write(cache, rows, slot, valid):
    """Puts `rows` `[b t g k]` into their slots; padding and what finds no room is dropped."""
    b, g, slots, _ = cache.shape
    rows = jnp.swapaxes(rows, 1, 2).astype(cache.dtype)  # [b g t k]
    if valid is not None:
        slot = jnp.where(valid, slot, slots)
    if b * g * slot.shape[1] == 1:
        # A single row would be no scatter but an update, which XLA does once for each reader of the
        # cache, on copies of it: beside a second row, which is dropped, it stays a scatter.
        rows = jnp.concatenate([rows, rows], axis=2)
        slot = jnp.concatenate([slot, jnp.full_like(slot, slots)], axis=1)
    at = (jnp.arange(b)[:, None, None], jnp.arange(g)[:, None], slot[:, None])
    return cache.at[at].set(rows, mode="drop")


def _look_up(q, k, v, seen):
    """Attention of `[b t h k]` to a cache `[b g l k]`, as far as `seen` `[b t l]` says."""
    b, t, h, width = q.shape
    g, slots = k.shape[1:3]
    # One matrix product per sequence and key-value head, in the order in which the cache lies:
    # with an einsum over all axes, XLA may turn the cache round first.
    r = h // g
    q = jnp.swapaxes(q.reshape(b, t, g, r * width), 1, 2).reshape(b * g, t * r, width)
    k, v = (x.reshape(b * g, slots, width) for x in (k, v))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("xqk,xlk->xql", q, k, preferred_element_type=dtype) * width**-0.5
    seen = jnp.repeat(jnp.repeat(seen, g, axis=0), h // g, axis=1)
    scores = jnp.where(seen, scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("xql,xlk->xqk", weights, v).reshape(b, g, t, h // g, width)
    return jnp.swapaxes(y, 1, 2).reshape(b, t, h, width)
