"""The neural memory of Titans as a layer: what stands before it, its gates, its first weights."""

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.neural_memory import (
    ACTIVATIONS,
    LIMITS,
    NeuralMemoryState,
    Weights,
    neural_memory,
)
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.param import param
from seqzoo.nn.projections import Projections, plain
from seqzoo.nn.report import report
from seqzoo.nn.sharded import sharded


class MemoryState(NamedTuple):
    """What the layer keeps of everything it has read; its size does not grow.

    Attributes:
        convs: the last `d_conv - 1` inputs of the convolution; empty without one.
        memory: weights and momentum of every head, the chunk that is open included.
    """

    convs: tuple[ShortConvState, ...]
    memory: NeuralMemoryState


class NeuralMemory(nnx.Module):
    """m_t = M_t(q_t) with M_t trained on (k_1, v_1) ... (k_t, v_t), head by head.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v));  q, k of length 1
        alpha   = sigmoid(x w_a + b_a)             what is forgotten
        eta     = sigmoid(x w_e + b_e)             what stays of the momentum
        theta   = theta_max sigmoid(x w_t + b_t)   the step size; all three per head and token

    Args:
        d_in: width of what comes in.
        n_heads: heads (h).
        head_dim: width of queries, keys and values of a head (k).
        chunk: tokens whose gradients are taken at the same weights.
        memory_layers: layers of the network; 1 = linear.
        memory_expand: its inner width over head_dim.
        memory_norm: LayerNorm of its output, scaled, and its input added.
        activation: between its layers, "gelu" or "silu".
        empty_memory: its last layer starts at 0 (and is learned), so that it holds nothing at
            first; else Xavier's uniform like the others.
        memory_lr: peak learning rate of these weights; None = the optimizer's.
        d_conv: taps of the convolution, 0 = none.
        conv_init_std: it starts as the identity plus normal values of this standard deviation.
        use_momentum: else eta is 0.
        use_forgetting: else alpha is 0.
        theta_max: largest step size; None = (1 - eta) / chunk with the eta of eta_bias.
        alpha_bias, eta_bias, theta_bias: b_a, b_e, b_t at the start.
        limit: of each token's gradient by each matrix: "none", "clip" or "normalise".
        max_norm: to which length.
        detach_norm: whether that length counts as a constant when differentiated.
        n_persistent: learned tokens that every document begins with, written before its own.
        norm_eps: of the network's norm.
        implementation: which implementation of the operators; None = the best.
        dtype: of projections; weights of the memory, gates and sums are float32 at least.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Warns:
        UserWarning: theta_max is above (1 - eta) / chunk.
    """

    def __init__(
        self,
        d_in: int,
        *,
        n_heads: int,
        head_dim: int,
        chunk: int,
        memory_layers: int = 2,
        memory_expand: float = 4.0,
        memory_norm: bool = True,
        activation: str = "gelu",
        empty_memory: bool = False,
        memory_lr: float | None = None,
        d_conv: int = 4,
        conv_init_std: float = 0.02,
        use_momentum: bool = True,
        use_forgetting: bool = True,
        theta_max: float | None = None,
        alpha_bias: float = -4.0,
        eta_bias: float = 1.0,
        theta_bias: float = 0.0,
        limit: str = "clip",
        max_norm: float = 1.0,
        detach_norm: bool = False,
        n_persistent: int = 0,
        norm_eps: float = 1e-5,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(1, n_heads=n_heads, head_dim=head_dim, chunk=chunk, memory_layers=memory_layers)
        at_least(0, d_conv=d_conv, n_persistent=n_persistent, conv_init_std=conv_init_std)
        inner = round(memory_expand * head_dim)
        if inner < 1 or abs(inner - memory_expand * head_dim) > 1e-5 * inner:
            raise ValueError(
                f"memory_expand is {memory_expand}: it makes {memory_expand * head_dim:g} inner "
                f"channels of head_dim {head_dim}; that must be a whole number of at least 1"
            )
        for name, choice, allowed in (
            ("limit", limit, LIMITS),
            ("activation", activation, tuple(ACTIVATIONS)),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} is {choice!r}; allowed: {', '.join(allowed)}")
        for name, value in dict(max_norm=max_norm, norm_eps=norm_eps).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.n_heads, self.head_dim, self.use_conv = n_heads, head_dim, d_conv > 0
        self.use_momentum, self.use_forgetting = use_momentum, use_forgetting
        self.theta_max = _step_size(theta_max, chunk, eta_bias if use_momentum else None)
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))
        self.options = (
            ("chunk", chunk),
            ("activation", activation),
            ("limit", limit),
            ("max_norm", float(max_norm)),
            ("detach_norm", detach_norm),
            ("norm_eps", float(norm_eps)),
        )
        self.inputs = Projections(
            d_in,
            n_heads,
            head_dim,
            unit=2,
            n_out=3,
            d_conv=d_conv,
            conv_init_std=conv_init_std,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        gates = 0.02 * jax.random.normal(rngs.params(), (d_in, n_heads, 3))
        self.gates = param(gates, axes=("embed", "heads", None))
        bias = jnp.asarray([alpha_bias, eta_bias, theta_bias], jnp.float32)
        self.gates_bias = param(
            jnp.broadcast_to(bias, (n_heads, 3)), axes=("heads", None), decay=False
        )
        self._make_weights(memory_layers, inner, memory_norm, empty_memory, memory_lr, rngs)
        # Assigned once: an attribute that was None first would be static.
        self.persistent = persistent_tokens(n_persistent, d_in, rngs) if n_persistent else None

    def _make_weights(self, layers, inner, norm, empty, lr, rngs):
        h, k = self.n_heads, self.head_dim
        draw = inits.xavier_uniform(1.0, batch_axis=(0,))
        made = lambda *shape: draw(rngs.params(), (h, *shape), jnp.float32)
        weight = lambda x: param(x, axes=("heads",) + (None,) * (x.ndim - 1), lr=lr)
        last = made(k, inner if layers > 1 else k)
        self.w_out = weight(jnp.zeros_like(last) if empty else last)
        self.w_in = weight(made(inner, k)) if layers > 1 else None
        hidden = [made(inner, inner) for _ in range(layers - 2)]
        self.w_hidden = weight(jnp.stack(hidden, axis=1)) if hidden else None
        gamma = param(jnp.zeros((h, k)), axes=("heads", None), decay=False, lr=lr)
        self.gamma = gamma if norm else None
        # Of the state of a row: the layer may be without arrays, or several of them stacked.
        self.shapes = tuple(None if x is None else x.shape for x in self._variables())

    def _variables(self):
        return self.w_out, self.w_in, self.w_hidden, self.gamma

    def weights(self) -> Weights:
        """That every document begins with, before the persistent tokens are written."""
        return Weights(*(None if x is None else x[...] for x in self._variables()))

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MemoryState | None = None,
        opening: tuple[Weights, Weights] | None = None,
    ) -> tuple[jax.Array, MemoryState]:
        """Writes and reads `[b t d]`.

        Args:
            x: any float type.
            segment_ids: int32 `[b t]` or None.
            state: where the stream stopped; None = a fresh one.
            opening: from `self.opening()`; None = as it is without persistent tokens.

        Returns:
            `[b t h*k]` (0 at padding), and the state after the last token.
        """
        m, state, gates = self.run(x, segment_ids=segment_ids, state=state, opening=opening)
        self.report(gates, segment_ids, state.memory)
        return m, state

    def run(self, x, *, segment_ids=None, state=None, opening=None):
        """As a call, and alpha, eta and theta `[b t h]`; nothing is reported."""
        states = None if state is None else state.convs
        tokens, convs = self.inputs(x, segment_ids=segment_ids, states=states)
        gates = self._gates(x)
        weights, momenta = (self.weights(), (None,) * 4) if opening is None else opening
        m, memory = sharded(
            neural_memory,
            *tokens,
            *gates,
            *weights,
            *momenta,
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
            **dict(self.options),
        )
        return jax.lax.collapse(m, 2), MemoryState(convs, memory), gates

    def opening(self, state: MemoryState | None, *, steps: bool = False):
        """Weights and momenta after the persistent tokens, and what the memory says at those.

        Args:
            state: of the stream.
            steps: whether what it says is not needed and each stream stays in its document (no
                segment ids): then nothing is computed unless a stream has read nothing yet.

        Returns:
            (weights, momenta) or None, and `[n h*k]` or None, without persistent tokens.
        """
        if self.persistent is None:
            return None, None
        if not steps or state is None:
            return self._written()
        skip = lambda: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self._written)
        )
        return jax.lax.cond(jnp.any(state.memory.count == 0), self._written, skip)

    def _written(self):
        x = self.persistent[...]
        m, state = neural_memory(
            *self.inputs.shared(x),
            *self._gates(x[None]),
            *self.weights(),
            implementation=plain(self.implementation),
            **dict(self.options),
        )
        first = lambda tree: jax.tree.map(lambda a: a[0], tree)
        return (first(state.now), first(state.momentum)), jax.lax.collapse(m[0], 1)

    def persistent_tokens(self) -> jax.Array | None:
        """The learned tokens `[n d]`, None = there are none."""
        return None if self.persistent is None else self.persistent[...]

    def _gates(self, x):
        """alpha, eta and theta `[b t h]`, float32."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shares = jax.nn.sigmoid(
            jnp.einsum("btd,dhg->bthg", x, self.gates[...]) + self.gates_bias[...]
        )
        alpha, eta, theta = (shares[..., i] for i in range(3))
        if not self.use_forgetting:
            alpha = jnp.zeros_like(alpha)
        if not self.use_momentum:
            eta = jnp.zeros_like(eta)
        return alpha, eta, self.theta_max * theta

    def report(self, gates, segment_ids, memory: NeuralMemoryState) -> None:
        """Tells what tokens forgot, kept and learned, and how large momentum and weights are."""
        valid = jnp.ones(gates[0].shape[:2]) if segment_ids is None else segment_ids > 0
        share = valid / jnp.maximum(jnp.sum(valid), 1)
        names = ("memory_forgetting", "memory_momentum", "memory_step_size")
        for name, gate in zip(names, gates, strict=True):
            report(self, name, jnp.sum(share[..., None] * gate) / self.n_heads)
        report(self, "memory_surprise", _norm(memory.momentum))
        report(self, "memory_state_norm", _norm(memory.now))

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first token: it holds no weights yet."""
        dtype = state_dtype(self.dtype)
        row = lambda shape: shape and jnp.zeros((batch_size, *shape), dtype)
        rows = lambda: Weights(*map(row, self.shapes))
        # One array each: a state is donated, and no buffer can be given away twice.
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        memory = NeuralMemoryState(rows(), rows(), rows(), count, last_id)
        return MemoryState(self.inputs.init_states(batch_size), memory)

    def state_bytes(self) -> dict[str, int]:
        """Weights now, at the chunk's start, and momentum; and with the conv inputs and counts."""
        each = state_dtype(self.dtype).itemsize
        weights = 3 * each * sum(math.prod(shape) for shape in self.shapes if shape)
        return {"recurrent": weights, "total": weights + 8 + self.inputs.state_bytes()}


def persistent_tokens(n: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """n learned tokens that do not depend on the data."""
    return param(0.02 * jax.random.normal(rngs.params(), (n, width)), axes=(None, "embed"))


def _step_size(theta_max: float | None, chunk: int, eta_bias: float | None) -> float:
    """The largest step size; warns of one that may diverge."""
    eta = 0.0 if eta_bias is None else 1 / (1 + math.exp(-eta_bias))
    bound = (1 - eta) / chunk
    if theta_max is None:
        return bound
    if theta_max <= 0:
        raise ValueError(f"theta_max is {theta_max}; it must be above 0, or null")
    if theta_max > bound * (1 + 1e-6):
        warnings.warn(
            f"theta_max is {theta_max}: above (1 - eta) / chunk = {bound:.4g} (eta {eta:.2g} at "
            f"the start, chunk {chunk}) the memory may diverge where keys are alike; lower "
            "theta_max, chunk or eta_bias",
            stacklevel=4,
        )
    return float(theta_max)


def _norm(weights: Weights) -> jax.Array:
    """Root of the sum of squares of all weights of a head, mean over rows and heads."""
    square = sum(
        jnp.sum(jnp.square(x), axis=tuple(range(2, x.ndim))) for x in jax.tree.leaves(weights)
    )
    return jnp.mean(jnp.sqrt(square))


def memory_heads(d_model: int, n_heads: int | None, head_dim: int) -> int:
    """Heads as given, else as many as make d_model, at least one."""
    at_least(1, d_model=d_model, head_dim=head_dim)
    return max(1, round(d_model / head_dim)) if n_heads is None else n_heads
