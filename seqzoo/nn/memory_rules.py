"""The rules by which a memory of MoM is written and read: one class each, all of one shape.

A rule says which numbers a token gives each memory beside key and value (`gates`), and makes of
what arrives in a memory the arguments of its operator.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.chunks import over_memories
from pallas_kernels.gated_delta_rule import GatedDeltaRuleState, gated_delta_rule
from pallas_kernels.gla import GLAState, gla
from pallas_kernels.simple_gla import SimpleGLAState, simple_gla
from seqzoo.nn import inits
from seqzoo.nn.decay import SoftplusDecay
from seqzoo.nn.gated_norm import l2_norm
from seqzoo.nn.param import param


class PerMemory(nnx.Module):
    """y_r = x W_r: a linear map for each of r memories, stacked.

    Args:
        r: maps; 1 where all memories share it.
        d_in, d_out: widths.
        axis: logical name of the second width.
        init_gain: each starts uniform within this times Xavier's bound.
        dtype: what to compute in.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        r: int,
        d_in: int,
        d_out: int,
        *,
        axis: str | None,
        init_gain: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dtype = str(jnp.dtype(dtype))
        start = inits.xavier_uniform(init_gain, batch_axis=(0,))
        kernel = start(rngs.params(), (r, d_in, d_out), jnp.float32)
        self.kernel = param(kernel, axes=(None, "embed", axis))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[... d]` to `[... r e]`."""
        return jnp.einsum(
            "...d,rde->...re", x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        )


class Rule(nnx.Module):
    """What all rules offer; this one needs no gates.

    Args:
        r: memories with projections of their own; 1 where all share them.
        d_model: width of the input.
        n_heads: heads (h).
        head_dim: width of queries and keys per head (k).
        **settings: rngs; common, the keywords of `PerMemory` beside it; and what rule gla wants.

    Attributes:
        op, state: the operator, and the class of its state.
        op_over_memories: the operator with block_memory as its last argument.
        options: static keywords of the operator.
    """

    op: Any
    op_over_memories: Any
    state: Any
    options: dict[str, Any] = {}

    def __init__(self, r: int, d_model: int, n_heads: int, head_dim: int, **settings: Any):
        del r, d_model, head_dim, settings
        self.n_heads = n_heads

    @classmethod
    def gate_parameters(cls, d_model: int, n_heads: int, head_dim: int, low_rank: int) -> int:
        """Parameters of the gates that each memory has for itself."""
        del d_model, n_heads, head_dim, low_rank
        return 0

    def gates(self, x: jax.Array) -> jax.Array | None:
        """`[... r c]` of `[... d]`, what is asked for beside keys and values; None = nothing."""
        del x

    def arguments(self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array | None) -> tuple:
        """The operator's arguments: q, k `[b t h k]`, v `[b t h v]`, gates `[b t c]`."""
        raise NotImplementedError


class GatedDeltaNet(Rule):
    """S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T,  keys and queries of length 1.

    beta = sigmoid(x W_beta),  g = -exp(A_log) softplus(x W_a + dt_bias)
    """

    op, state = staticmethod(gated_delta_rule), GatedDeltaRuleState
    op_over_memories = staticmethod(over_memories(gated_delta_rule))

    def __init__(self, r, d_model, n_heads, head_dim, *, rngs, common, **settings):
        del head_dim, settings
        self.n_heads = n_heads
        make = lambda: PerMemory(r, d_model, n_heads, axis="heads", rngs=rngs, **common)
        self.b_proj, self.a_proj = make(), make()
        self.decay = SoftplusDecay(n_heads, rngs=rngs)

    @classmethod
    def gate_parameters(cls, d_model, n_heads, head_dim, low_rank):
        return 2 * d_model * n_heads

    def gates(self, x):
        return jnp.concatenate([self.a_proj(x), self.b_proj(x)], axis=-1)

    def arguments(self, q, k, v, gates):
        a, beta = jnp.split(gates, 2, axis=-1)
        beta = jax.nn.sigmoid(beta.astype(jnp.promote_types(beta.dtype, jnp.float32)))
        return l2_norm(q), l2_norm(k), v, self.decay(a), beta


class GLA(Rule):
    """S <- diag(exp(g)) S + k v^T,  g = logsigmoid(x W_1 W_2 + b) / gate_normalizer per channel."""

    op, state = staticmethod(gla), GLAState
    op_over_memories = staticmethod(over_memories(gla))

    def __init__(self, r, d_model, n_heads, head_dim, *, low_rank, gate_normalizer, rngs, common):
        self.n_heads, self.gate_normalizer = n_heads, float(gate_normalizer)
        width = n_heads * head_dim
        self.down = PerMemory(r, d_model, low_rank, axis=None, rngs=rngs, **common)
        start = inits.xavier_uniform(common["init_gain"], batch_axis=(0,))
        up = start(rngs.params(), (r, low_rank, width), jnp.float32)
        self.up = param(up, axes=(None, None, "heads"))
        self.bias = param(jnp.zeros((r, width)), axes=(None, "heads"), decay=False)

    @classmethod
    def gate_parameters(cls, d_model, n_heads, head_dim, low_rank):
        return d_model * low_rank + (low_rank + 1) * n_heads * head_dim

    def gates(self, x):
        low = self.down(x)
        up, bias = (a[...].astype(low.dtype) for a in (self.up, self.bias))
        return jnp.einsum("...rl,rle->...re", low, up) + bias

    def arguments(self, q, k, v, gates):
        wide = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
        g = jax.nn.log_sigmoid(wide) / self.gate_normalizer
        return q, k, v, g.reshape(k.shape)


class Retention(Rule):
    """S <- gamma_h S + k v^T,  gamma_h = 1 - 2^(-5-h): a decay that no token chooses."""

    op, state = staticmethod(simple_gla), SimpleGLAState
    op_over_memories = staticmethod(over_memories(simple_gla))

    def arguments(self, q, k, v, gates):
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        log_gamma = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.n_heads, dtype=dtype))))
        return q, k, v, jnp.broadcast_to(log_gamma, v.shape[:3])


class Mamba2(Rule):
    """S <- exp(-exp(A_log) dt) S + k (dt v)^T,  dt = softplus(x W_dt + dt_bias), read unscaled."""

    op, state = staticmethod(simple_gla), SimpleGLAState
    op_over_memories = staticmethod(over_memories(simple_gla))
    options = {"scale": 1.0}

    def __init__(self, r, d_model, n_heads, head_dim, *, rngs, common, **settings):
        del head_dim, settings
        self.n_heads = n_heads
        self.dt_proj = PerMemory(r, d_model, n_heads, axis="heads", rngs=rngs, **common)
        self.decay = SoftplusDecay(n_heads, rngs=rngs)

    @classmethod
    def gate_parameters(cls, d_model, n_heads, head_dim, low_rank):
        return d_model * n_heads

    def gates(self, x):
        return self.dt_proj(x)

    def arguments(self, q, k, v, gates):
        wide = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
        dt = jax.nn.softplus(wide + self.decay.dt_bias[...])
        return q, k, (v * dt[..., None]).astype(v.dtype), self.decay(gates)


class Linear(Rule):
    """S <- S + phi_k(k) v^T, read by phi_q(q);  phi(x) = (W_1 x + b_1) * (W_2 x + b_2) per head."""

    op, state = staticmethod(simple_gla), SimpleGLAState
    op_over_memories = staticmethod(over_memories(simple_gla))

    def __init__(self, r, d_model, n_heads, head_dim, *, rngs, common, **settings):
        del r, d_model, settings
        self.n_heads = n_heads
        make = lambda: Hadamard(head_dim, dtype=common["dtype"], rngs=rngs)
        self.q_map, self.k_map = make(), make()

    def arguments(self, q, k, v, gates):
        no_decay = jnp.zeros(v.shape[:3], jnp.promote_types(v.dtype, jnp.float32))
        return self.q_map(q), self.k_map(k), v, no_decay


class Hadamard(nnx.Module):
    """(x W_1 + b_1) * (x W_2 + b_2) over the last axis: a feature map of second order.

    Args:
        width: of the last axis, one head's; heads share the map.
        dtype: what to compute in.
        rngs: source of the initial values.
    """

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        # Products of two small numbers would vanish: each factor starts with the size of x.
        each = jax.random.normal(rngs.params(), (2, width, width)) * width**-0.5
        self.kernel = param(each, axes=(None, None, None))
        self.bias = param(jnp.zeros((2, width)), axes=(None, None), decay=False)
        self.dtype = str(jnp.dtype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[... k]` to `[... k]`."""
        kernel, bias = (a[...].astype(self.dtype) for a in (self.kernel, self.bias))
        both = jnp.einsum("...k,rkl->r...l", x.astype(self.dtype), kernel)
        first, second = (both[i] + bias[i] for i in range(2))
        return first * second


RULES: dict[str, type[Rule]] = {
    "gated_deltanet": GatedDeltaNet,
    "gla": GLA,
    "retention": Retention,
    "mamba2": Mamba2,
    "linear": Linear,
}
