"""The block of MEGA: a `move` along time, gated attention inside chunks, a gated residual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.chunk_attention import ChunkAttentionState, chunk_attention
from pallas_kernels.core.numerics import state_dtype
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.linear import NORMS, linear
from seqzoo.nn.param import param
from seqzoo.nn.relative_bias import BIASES
from seqzoo.nn.sharded import sharded

ATTENTIONS = ("softmax", "laplace", "relu2")


class MegaState(NamedTuple):
    """What a MEGA block keeps of everything it has read; its size does not grow.

    Attributes:
        move: the state of the move.
        attention: keys and values of the current chunk.
    """

    move: Any
    attention: ChunkAttentionState


class MegaBlock(nnx.Module):
    """A block that has its own norm and its own residual connection; width z of queries and keys,
    v of values:

        n       = norm(x)                                      (post-norm: n = x)
        m       = move(n)                                      silu(f(n) + omega n)
        u|s|r|c = m W_m + b_m                                  widths d, z, v, d
        Q, K    = silu(s) * gamma_i + beta_i                   i = 0, 1
        V       = silu(n W_v + b_v)                            of n, not of m
        o       = attention(Q, K, V)                           inside chunks of chunk_size tokens
        h       = silu(c + (o * silu(r)) W_h + b_h)
        y       = x + sigmoid(u) * (h - x)                     (post-norm: norm of it)

    Chunks do not overlap and count from the start of each document; what lies before the chunk is
    seen through the move alone. Any length works: the last chunk may be short.

    A move is a module with
        `move(x [b t d], segment_ids=None, state=None) -> (m [b t d] in its dtype, state)`
        `move.step(x_t [b d], state) -> (m_t, state)`
        `move.init_state(batch_size) -> state`
        `move.state_bytes(context_length) -> {"recurrent": .., "total": ..}`
        `move.causal`: whether it looks back only (else it has no step and takes no state)
        `move.causality`: "exact", "fft" or "none", as the suite of mixers reads it.
    It gives m itself: silu and the skip omega n are the move's. x is 0 at padding, and m is any
    finite number there.

    Args:
        d_model: width of the input and output.
        move: that module.
        z_dim: width of queries and keys (z); None = d_model / 4, at least 2, made even.
        v_dim: width of values (v); None = 2 d_model.
        chunk_size: tokens of a chunk; None = the whole row (only where the move looks both ways).
        attention: "softmax", or element by element "laplace" or "relu2".
        rel_pos_bias: added to the scores by distance: "simple" (learned numbers) or "rotary".
        max_positions: simple bias without chunks: tokens of the longest row.
        norm: "layernorm", "scalenorm" or "rmsnorm".
        norm_eps: added under its root.
        prenorm: norm of what comes in; else of what goes out.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, norms and attention's weights are float32.
        rngs: source of the initial values: matrices normal with 0.02.

    Raises:
        ValueError: a setting is out of range.

    Source: Ma et al., "Mega" (arXiv 2209.10655); `MovingAverageGatedAttention` of
    facebookresearch/mega.

    Differs from source: no dropout inside; a length that is no multiple of the chunk; documents can
    be packed and streamed; attention divides by the keys that a query sees, where the source's
    laplace and relu2 divide by the chunk in a last chunk that is short. Weight decay spares delta,
    alpha and omega of the average, gamma and beta of q and k, norms and biases; the source's
    optimizer decays every parameter.
    """

    owns_residual = True

    def __init__(
        self,
        d_model: int,
        *,
        move: nnx.Module,
        z_dim: int | None = None,
        v_dim: int | None = None,
        chunk_size: int | None = 128,
        attention: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        prenorm: bool = True,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        z = max(2, d_model // 8 * 2) if z_dim is None else z_dim
        v = 2 * d_model if v_dim is None else v_dim
        at_least(1, d_model=d_model, z_dim=z, v_dim=v, max_positions=max_positions)
        for name, value, allowed in (
            ("attention", attention, ATTENTIONS),
            ("rel_pos_bias", rel_pos_bias, tuple(BIASES)),
            ("norm", norm, tuple(NORMS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if chunk_size is None and move.causal:
            raise ValueError(
                "chunk_size is null and the mixer is causal: its state holds the keys of a chunk; "
                "set chunk_size (at least the length for full attention), or causal=false"
            )
        if chunk_size is not None:
            at_least(1, chunk_size=chunk_size)
        self.z_dim, self.v_dim, self.chunk_size = z, v, chunk_size
        self.attention, self.prenorm = attention, prenorm
        self.causal, self.causality = move.causal, move.causality
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        project = lambda d_in, d_out, axes: linear(
            d_in,
            d_out,
            axes=axes,
            use_bias=True,
            kernel_init=inits.normal(std=0.02),
            dtype=self.dtype,
            rngs=rngs,
        )
        wide = str(jnp.promote_types(self.dtype, jnp.float32))
        self.norm = NORMS[norm](d_model, eps=norm_eps, dtype=wide, rngs=rngs)
        self.move = move
        self.v_proj = project(d_model, v, ("embed", "inner"))
        self.mx_proj = project(d_model, 2 * d_model + z + v, ("embed", None))
        self.h_proj = project(v, d_model, ("inner", "embed"))
        gamma = 0.02 * jax.random.normal(rngs.params(), (2, z))
        self.gamma = param(gamma, axes=(None, None), decay=False)
        self.beta = param(jnp.zeros((2, z)), axes=(None, None), decay=False)
        self.rel_pos_bias = BIASES[rel_pos_bias](
            z, max_positions=max_positions if chunk_size is None else chunk_size, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MegaState | None = None,
    ) -> tuple[jax.Array, MegaState | None]:
        """The stream after the block, of whole sequences or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type: the stream before it.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` (0 at padding), the residual connection included, in `dtype` or that of x,
            whichever is wider (a stream does not narrow), and the state after the last token (None
            of a block that looks both ways).

        Raises:
            NotImplementedError: a state for a block that looks both ways.
        """
        if state is not None:
            self._refuse_streams("a state")
        check_call(x, segment_ids, state, MegaState)
        n = self._before(x)
        if segment_ids is not None:
            n = jnp.where((segment_ids > 0)[..., None], n, 0)
        m, move = self.move(n, segment_ids=segment_ids, state=None if state is None else state.move)
        attend = lambda q, k, v: self._attend(q, k, v, segment_ids, state)
        y, attention = self._mix(x, n, m, attend)
        if segment_ids is not None:
            y = jnp.where((segment_ids > 0)[..., None], y, 0)
        return y, MegaState(move, attention) if self.causal else None

    def step(self, x_t: jax.Array, state: MegaState) -> tuple[jax.Array, MegaState]:
        """One token `[b d]`: returns `[b d]` and the state after it."""
        self._refuse_streams("step")
        check_call(x_t[:, None], None, state, MegaState)
        n = self._before(x_t)
        m, move = self.move.step(n, state.move)
        attend = lambda q, k, v: self._attend(q, k, v, None, state)
        y, attention = self._mix(x_t[:, None], n[:, None], m[:, None], attend)
        return y[:, 0], MegaState(move, attention)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MegaState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        self._refuse_streams("init_state")
        shape, dtype = (batch_size, 1, self.chunk_size), state_dtype(self.dtype)
        ring = lambda width: jnp.zeros((*shape, width), dtype)
        # One array each: a state is donated, and no buffer can be given away twice.
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        attention = ChunkAttentionState(ring(self.z_dim), ring(self.v_dim), count, last_id)
        return MegaState(self.move.init_state(batch_size), attention)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the move's and the keys and values of a chunk."""
        self._refuse_streams("state_bytes")
        move = self.move.state_bytes(context_length)
        chunk = state_dtype(self.dtype).itemsize * self.chunk_size * (self.z_dim + self.v_dim)
        return {"recurrent": move["recurrent"] + chunk, "total": move["total"] + chunk + 8}

    def _before(self, x):
        return (self.norm(x) if self.prenorm else x).astype(self.dtype)

    def _attend(self, q, k, v, segment_ids, state):
        """`[b t 1 v]` and the keys and values to carry on."""
        chunk = max(1, q.shape[1]) if self.chunk_size is None else self.chunk_size
        return sharded(
            chunk_attention,
            q,
            k,
            v,
            self.rel_pos_bias(chunk)[None],
            chunk=chunk,
            score=self.attention,
            causal=self.causal,
            initial_state=None if state is None else state.attention,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _mix(self, x, n, m, attend):
        """From the stream x, what was moved (n) and what came of it (m), all `[b t d]`."""
        d, z, v = x.shape[-1], self.z_dim, self.v_dim
        u, s, r, c = jnp.split(self.mx_proj(m), (d, d + z, d + z + v), axis=-1)
        q, k = (
            (jax.nn.silu(s) * self.gamma[i] + self.beta[i]).astype(self.dtype)[:, :, None]
            for i in range(2)
        )
        values = jax.nn.silu(self.v_proj(n))[:, :, None]
        o, state = attend(q, k, values)
        h = jax.nn.silu(c + self.h_proj(o[:, :, 0] * jax.nn.silu(r)))
        stream = jnp.promote_types(x.dtype, self.dtype)
        x, h, u = (a.astype(stream) for a in (x, h, jax.nn.sigmoid(u)))
        y = x + u * (h - x)
        return y if self.prenorm else self.norm(y).astype(stream), state

    def _refuse_streams(self, what: str) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{what}: this mixer looks both ways (causal=false), so a token's output depends "
                "on tokens that a stream has not read yet"
            )
