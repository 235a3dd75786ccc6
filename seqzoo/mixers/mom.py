"""MoM: a mixture of memories, of which each token writes and reads a few."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from pallas_kernels.short_conv import ShortConvState
from seqzoo.nn import inits
from seqzoo.nn import slots as mom_slots
from seqzoo.nn.checks import at_least, check_call
from seqzoo.nn.conv import ShortConv
from seqzoo.nn.gated_norm import GatedRMSNorm
from seqzoo.nn.linear import linear
from seqzoo.nn.memory_rules import RULES, PerMemory
from seqzoo.nn.report import report, report_loss
from seqzoo.nn.router import Routed, load_balance, report_routing, route
from seqzoo.nn.sharded import sharded
from seqzoo.nn.slots import Slots


class MoMState(NamedTuple):
    """What a MoM layer keeps. The shared memory is the last of the m.

    All memories are in the document that the row is in: what one holds of an earlier document is
    set to 0 when the row goes on to the next.

    Attributes:
        conv: the last `d_conv - 1` inputs of the convolution in each memory, `[b m w-1 e]` float32;
            e goes over heads, and in each over its query, key and value.
        s: the memories, `[b m h k v]` float32.
        last_id: int32 `[b]`, id of the document; 0 = none yet, or not tracked.
    """

    conv: jax.Array
    s: jax.Array
    last_id: jax.Array


class MoM(nnx.Module):
    """Each token goes to `topk` of `num_memories` memories, and all go to a shared one.

        p           = softmax(x W_router);   w_m = p_m / sum of the chosen p
        q, k_m, v_m = x W_q, x W_k,m, x W_v,m
        o_m         = rule(silu(conv(q, k_m, v_m)))     over the tokens that chose memory m alone
        out         = (norm(sum_m w_m o_m + o_shared) * silu(x W_gate)) W_o

    A memory reads the tokens that chose it as if they were a sequence of their own: its convolution
    and its decay know of no others. They are sorted into slots (nn/slots.py), so that one call of
    the operator runs through all memories; shapes do not depend on who goes where. Keys and values
    are computed for every memory and those of the chosen ones taken: (m + 1) / (k + 1) times the
    products, in exchange for no gather of weights.

    The auxiliary loss "load_balance" is aux_loss_scale / n_layers * num_memories sum_m f_m p_m with
    f_m the fraction of tokens that went to memory m and p_m the mean probability, over the tokens
    of this layer; when all is even the sum over layers is aux_loss_scale * topk.

    Args:
        d_model: width of the input and output.
        num_memories: memories that tokens are routed to (m, the shared one not counted).
        topk: memories per token (k).
        n_heads: heads (h) of each memory.
        head_dim: width of queries and keys per head; None = d_model / n_heads.
        expand_v: width of values over that of keys.
        shared_mem: whether there is a memory that every token goes to, with weight 1.
        single_kv_proj: one projection for keys, values and gates, shared by all memories.
        rule: how a memory is written: gated_deltanet, gla, retention, mamba2, linear.
        d_conv: taps of the convolution (w), which all memories share; 0 = none, nor silu after it.
        use_output_gate: multiply by silu(x W_gate) after the norm.
        normalize_weights: divide the weights of the chosen memories by their sum. With topk 1 they
            are 1 then, and the router learns from the auxiliary loss alone.
        norm_eps: added under the root of the output norm.
        aux_loss_scale: weight of the load-balance loss.
        n_layers: MoM layers of the whole network, over which that loss is a mean. A configuration
            takes model.n_layers: in a hybrid, set how many of them are MoM.
        init_gain: matrices start uniform within init_gain times Xavier's bound, the root of
            6 / (inputs + outputs). The authors' value makes small models slow to begin; 1 does not.
        gate_low_rank: rank of the gates of rule gla.
        gate_normalizer: divides the log decays of rule gla.
        implementation: which implementation of the operators ("xla", ...); None = the best.
        dtype: what to compute in; parameters, state, router and norm are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Warns:
        UserWarning: topk is 1 and the weights are normalised.

    Source: Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories" (arXiv 2502.13685);
    `MomAttention` of fla-org/flash-linear-attention. The other rules follow the authors' earlier
    code and the papers of their mixers.

    Differs from source: convolutions stop at the start of a memory's tokens in training too (there
    they run on from the memory before: a leak of later tokens); time order inside a memory holds
    (there an unstable sort breaks it); the load-balance loss is taken layer by layer, since memory
    m of one layer has nothing to do with memory m of another (there all layers are pooled, and two
    collapsed layers can look even); the router is computed in float32; queries are projected once
    per token; documents can be packed and streamed; `capacity` does not exist. A router whose
    logits are nan gives nan at those tokens, drops none, and training stops at the step.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_memories: int = 4,
        topk: int = 2,
        n_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        shared_mem: bool = True,
        single_kv_proj: bool = False,
        rule: str = "gated_deltanet",
        d_conv: int = 4,
        use_output_gate: bool = True,
        normalize_weights: bool = True,
        norm_eps: float = 1e-5,
        aux_loss_scale: float = 0.01,
        n_layers: int = 1,
        init_gain: float = 2**-2.5,
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        at_least(
            1,
            d_model=d_model,
            num_memories=num_memories,
            n_heads=n_heads,
            n_layers=n_layers,
            gate_low_rank=gate_low_rank,
        )
        if not 1 <= topk <= num_memories:
            raise ValueError(
                f"topk is {topk}; it must lie in 1 .. num_memories, which is {num_memories}"
            )
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model is {d_model} and n_heads {n_heads}: d_model is no multiple of n_heads; "
                "change one or set head_dim"
            )
        head_dim = d_model // n_heads if head_dim is None else head_dim
        value_dim = round(head_dim * expand_v)
        if head_dim < 1 or value_dim < 1 or abs(value_dim - head_dim * expand_v) > 1e-5 * value_dim:
            raise ValueError(
                f"head_dim is {head_dim} and expand_v {expand_v}: they make "
                f"{head_dim * expand_v:g} channels of a value; both must be whole numbers of at "
                "least 1"
            )
        at_least(0, d_conv=d_conv, aux_loss_scale=aux_loss_scale)
        for name, value in dict(gate_normalizer=gate_normalizer, init_gain=init_gain).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if topk == 1 < num_memories and normalize_weights:
            warnings.warn(
                "topk is 1: the weight of the chosen memory is always 1, so the router gets no "
                f"gradient but that of the load-balance loss (aux_loss_scale is {aux_loss_scale}); "
                "normalize_weights=false weighs by the probability instead",
                stacklevel=2,
            )

        self.d_model, self.n_heads, self.head_dim, self.value_dim = (
            d_model, n_heads, head_dim, value_dim,
        )  # fmt: skip
        self.num_memories, self.topk, self.shared_mem = num_memories, topk, shared_mem
        self.single_kv_proj, self.d_conv = single_kv_proj, d_conv
        self.normalize_weights = normalize_weights
        self.aux_loss_scale, self.n_layers = float(aux_loss_scale), n_layers
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))

        keys, values = n_heads * head_dim, n_heads * value_dim
        common = dict(dtype=self.dtype, rngs=rngs)
        per_memory = dict(dtype=self.dtype, init_gain=init_gain)
        init = inits.xavier_uniform(init_gain)
        project = lambda width: linear(
            d_model, width, axes=("embed", "heads"), kernel_init=init, **common
        )
        self.router = linear(
            d_model,
            num_memories,
            axes=("embed", None),
            kernel_init=init,
            dtype=str(jnp.promote_types(self.dtype, jnp.float32)),
            rngs=rngs,
        )
        # One projection per memory, the shared one's last.
        r = 1 if single_kv_proj else self.n_states
        self.q_proj = project(keys)
        self.k_proj = PerMemory(r, d_model, keys, axis="heads", rngs=rngs, **per_memory)
        self.v_proj = PerMemory(r, d_model, values, axis="heads", rngs=rngs, **per_memory)
        # Assigned once: an attribute that was None first would be static.
        self.conv = (
            ShortConv(
                2 * keys + values, d_conv, use_bias=False, implementation=implementation, **common
            )
            if d_conv
            else None
        )
        self.rule = RULES[rule](
            r,
            d_model,
            n_heads,
            head_dim,
            low_rank=gate_low_rank,
            gate_normalizer=gate_normalizer,
            rngs=rngs,
            common=per_memory,
        )
        own = keys + values
        self.idle_per_memory = d_model * own + RULES[rule].gate_parameters(
            d_model, n_heads, head_dim, gate_low_rank
        )
        self.gate = project(values) if use_output_gate else None
        self.norm = GatedRMSNorm(value_dim, eps=norm_eps, **common)
        self.out_proj = linear(values, d_model, axes=("heads", "embed"), kernel_init=init, **common)

    @property
    def n_states(self) -> int:
        """Memories in all, the shared one counted (m)."""
        return self.num_memories + self.shared_mem

    @property
    def _kept(self) -> int:
        """Inputs that the convolution keeps (w-1)."""
        return max(self.d_conv - 1, 0)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: MoMState | None = None,
    ) -> tuple[jax.Array, MoMState]:
        """Mixes whole sequences, or the next chunk of a stream.

        Args:
            x: `[b t d]`, any float type.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document
                (with a state: the one that the state is in).
            state: where the stream stopped; None = a fresh one.

        Returns:
            `[b t d]` in `dtype` (0 at padding) and the state after the last token.
        """
        check_call(x, segment_ids, state, MoMState)
        b, t, _ = x.shape
        fresh = state is None
        state = self.init_state(b) if state is None else state
        if not x.size:  # nothing to read
            return x.astype(self.dtype), state
        documents = mom_slots.documents_of(segment_ids, state.last_id, t)
        if documents.valid is not None:  # what stands at padding must not reach anyone
            x = jnp.where(documents.valid[..., None], x, 0)
        routed = self._route(x)
        visits, weights = self._visits(routed)
        slots = mom_slots.place(
            visits,
            documents.ids,
            documents.entry,
            n_memories=self.n_states,
            keep=self._kept,
        )
        self._report(routed, documents.valid, slots)
        to_slots = lambda y: mom_slots.memories_to_slots(y, slots)
        q = mom_slots.tokens_to_slots(self.q_proj(x), slots)
        parts = self._heads(q, to_slots(self.k_proj(x)), to_slots(self.v_proj(x)))
        several = documents.valid is not None
        parts, past = self._convolved(parts, state.conv, slots, fresh, several)
        gates = self.rule.gates(x)
        arguments = self.rule.arguments(*parts, None if gates is None else to_slots(gates))
        entry = jnp.broadcast_to(documents.entry[:, None], (b, self.n_states))
        y, after = sharded(
            self.rule.op_over_memories,
            *arguments,
            slots.memory,
            initial_state=self.rule.state(state.s, entry),
            segment_ids=slots.ids,
            implementation=self.implementation,
            **self.rule.options,
        )
        found = mom_slots.slots_to_visits(jax.lax.collapse(y, 2), slots)
        out = self._output(x, found, weights)
        new = MoMState(past, after.s, documents.last_id)
        if several:
            new = _forget(new, after.last_id != documents.last_id[:, None])
        return out, new

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MoMState:
        """The state before the first token; `max_length` changes nothing here."""
        del max_length
        m, h, k, v = self.n_states, self.n_heads, self.head_dim, self.value_dim
        dtype = state_dtype(self.dtype)
        return MoMState(
            jnp.zeros((batch_size, m, self._kept, h * (2 * k + v)), dtype),
            jnp.zeros((batch_size, m, h, k, v), dtype),
            jnp.zeros((batch_size,), jnp.int32),
        )

    def step(self, x_t: jax.Array, state: MoMState) -> tuple[jax.Array, MoMState]:
        """One token `[b d]`: returns `[b d]` and the state after it.

        Memories that it does not go to are the same to the last bit afterwards.
        """
        check_call(x_t[:, None], None, state, MoMState)
        b, _ = x_t.shape
        visits, weights = self._visits(self._route(x_t))
        j = visits.shape[-1]
        rows = jnp.arange(b)[:, None]
        take = lambda a: a[rows, visits].reshape(b * j, *a.shape[2:])
        # A visit is a row of its own from here on.
        mine = lambda y: (
            jnp.broadcast_to(y, (b, j, y.shape[-1])) if y.shape[1] == 1 else y[rows, visits]
        ).reshape(b * j, 1, y.shape[-1])
        parts = self._heads(
            mine(self.q_proj(x_t)[:, None]), mine(self.k_proj(x_t)), mine(self.v_proj(x_t))
        )
        past = take(state.conv)
        if self.conv is not None:
            fresh_id = jnp.zeros((b * j,), jnp.int32)
            y, (past, _) = self.conv(_joined(parts), state=ShortConvState(past, fresh_id))
            parts = self._split(y)
        gates = self.rule.gates(x_t)
        y, after = sharded(
            self.rule.op,
            *self.rule.arguments(*parts, None if gates is None else mine(gates)),
            initial_state=self.rule.state(take(state.s), jnp.zeros((b * j,), jnp.int32)),
            implementation=self.implementation,
            **self.rule.options,
        )
        out = self._output(x_t, y.reshape(b, j, self.n_heads * self.value_dim), weights)
        put = lambda a, new: a.at[rows, visits].set(new.reshape(b, j, *a.shape[2:]))
        return out, MoMState(put(state.conv, past), put(state.s, after.s), state.last_id)

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence: the memories alone, and with the conv inputs and the id."""
        del context_length
        m, h, k, v = self.n_states, self.n_heads, self.head_dim, self.value_dim
        each = state_dtype(self.dtype).itemsize
        recurrent = each * m * h * k * v
        past = each * m * self._kept * h * (2 * k + v)
        return {"recurrent": recurrent, "total": recurrent + past + 4}

    def idle_parameters(self) -> int:
        """Parameters that a token does not use: those of the memories that it does not go to."""
        if self.single_kv_proj:
            return 0
        return (self.num_memories - self.topk) * self.idle_per_memory

    def _route(self, x: jax.Array) -> Routed:
        """In full precision: a logit that is rounded sends a token elsewhere."""
        with jax.default_matmul_precision("highest"):
            return route(self.router(x), self.topk, normalize=self.normalize_weights)

    def _visits(self, routed: Routed) -> tuple[jax.Array, jax.Array]:
        """The memories that tokens go to and what each counts, `[... j]`; the shared one last."""
        visits, weights = routed.chosen, routed.weights
        if self.shared_mem:
            shape = (*visits.shape[:-1], 1)
            shared = jnp.full(shape, self.num_memories, jnp.int32)
            visits = jnp.concatenate([visits, shared], axis=-1)
            weights = jnp.concatenate([weights, jnp.ones(shape, weights.dtype)], axis=-1)
        return visits, weights

    def _report(self, routed: Routed, valid: jax.Array | None, slots: Slots) -> None:
        scale = self.aux_loss_scale / self.n_layers
        report_loss(self, "load_balance", scale * load_balance(routed, valid))
        report_routing(self, routed, valid)
        b, t, j = slots.slot.shape
        tokens = b * t if valid is None else jnp.sum(valid)
        report(self, "router_dropped", j * tokens - jnp.sum(slots.visit < t * j))

    def _heads(self, *parts: jax.Array) -> tuple[jax.Array, ...]:
        h = self.n_heads
        return tuple(y.reshape(*y.shape[:2], h, y.shape[-1] // h) for y in parts)

    def _split(self, y: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys and values of each head out of `[b s e]`: the inverse of `_joined`."""
        (y,) = self._heads(y)
        return tuple(jnp.split(y, [self.head_dim, 2 * self.head_dim], axis=-1))

    def _convolved(self, parts, past, slots: Slots, fresh: bool, several: bool):
        """q, k, v after the convolution along each memory's tokens, and what it keeps.

        The slots of the past, zeros at first, part the memories; documents must be cut.
        """
        if self.conv is None:
            return parts, past
        packed = _joined(parts)
        if not fresh:
            packed = mom_slots.with_past(packed, past, slots)
        y, _ = self.conv(packed, segment_ids=slots.groups if several else None)
        return self._split(y), mom_slots.kept(packed, past, slots)

    def _output(self, x, found, weights):
        """`[... d]` from what the visits of each token brought, `[... j e]`."""
        wide = found.astype(weights.dtype)
        total = jnp.sum(wide * weights[..., None], axis=-2)
        heads = lambda y: y.reshape(*y.shape[:-1], self.n_heads, self.value_dim)
        gate = None if self.gate is None else heads(self.gate(x))
        y = self.norm(heads(total), gate)
        return self.out_proj(jax.lax.collapse(y, y.ndim - 2))


def _joined(parts: tuple[jax.Array, ...]) -> jax.Array:
    """`[b s e]`: head by head its query, key and value, so that heads can be cut apart."""
    return jax.lax.collapse(jnp.concatenate(parts, axis=-1), 2)


def _forget(state: MoMState, memories: jax.Array) -> MoMState:
    """The state with some memories (bool `[b m]`) as before the first token."""
    clear = lambda a: jnp.where(memories.reshape(memories.shape + (1,) * (a.ndim - 2)), 0, a)
    return MoMState(*map(clear, state[:-1]), state.last_id)
