"""How each operator runs over a row that is cut over devices: states pass, activations stay.

Every device holds a run of tokens. What an operator must know of the tokens to the left is its
state before them, and there are three ways to come by it:

    linear      The state after some tokens is D S + s, with D and s of those tokens alone. Pairs
                (D, s) are put together over the devices in log2(n) hand-overs, then each device
                runs the operator from its own state. Costs a second pass over the tokens.
    halo        The state holds the last tokens alone: they come from the neighbour.
    sequential  Neither holds (a neural memory trains on what it reads): the state goes from device
                to device, each in its turn, then all compute what they give out. Memory is shared
                between the devices, the time of the first pass is not.

A long convolution has a state as long as the row: there every device gets all tokens of some
channels instead (two all-to-alls).

The rules stand in RULES by the operator's name; an operator of somebody else's brings its own as
the attribute `sequence_rule`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.axes import Axes
from pallas_kernels.core.numerics import einsum
from seqzoo.nn.shards import Documents, Shard

Arrays = tuple[Any, ...]


class Call(NamedTuple):
    """An operator, to be called on the tokens of one device.

    Attributes:
        run: `run(args, state, ids) -> (y, state)`, y alone of an operator without a state.
        axes: of the operator.
        options: its keywords.
    """

    run: Callable
    axes: Axes
    options: Mapping[str, Any]

    def state_like(self, args: Arrays) -> Any:
        """A state before the first token: zeros."""
        shapes = jax.eval_shape(lambda *args: self.run(args, None, None)[1], *args)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def tokens(self, args: Arrays, cut: Callable) -> Arrays:
        """The arguments with `cut(x, axis of time)` of those that have one."""
        letters = self.axes.arguments
        return tuple(
            cut(x, axes.index("t")) if x is not None and "t" in axes else x
            for x, axes in zip(args, letters, strict=False)
        )


class Rule(NamedTuple):
    """How an operator runs over rows that are cut.

    Attributes:
        run: `run(call, args, state, documents, shard) -> (y, state)` inside shard_map; state as the
            call got it (None = fresh), the one that it returns is that after the tokens here.
        refuses: `refuses(sizes, options, has_ids, n) -> reason or None`: then whole rows are
            gathered on every device. sizes are those of the letters, of whole arrays.
        trades: letter that is cut in place of time while the operator runs; None = time stays cut.
    """

    run: Callable
    refuses: Callable = lambda sizes, options, has_ids, n: None
    trades: str | None = None


def rule_of(op: Any) -> Rule | None:
    """The rule of an operator, None = it needs whole rows."""
    rule = getattr(op, "sequence_rule", None) or RULES.get(op.__name__)
    return _ALONE if rule is None and not op.axes.state else rule


# An operator without a state or a rule takes each token alone.
_ALONE = Rule(lambda call, args, state, documents, shard: (call.run(args, None, None), None))


# --- Linear states -------------------------------------------------------------------------------


def linear(through: Callable, *, matrix: bool = False) -> Rule:
    """The rule of a recurrence whose state is D S + s after some tokens.

    Args:
        through: `through(call, args, state, valid) -> D`, what the tokens here do to the floating
            fields of a state: factors in a tuple, or one matrix per head. `valid` is None or bool
            `[b t]`; that documents begin among the tokens is no matter of its.
        matrix: D is `[b h k k]` and stands on the left of `[b h k v]`.
    """
    times = (lambda D, s: einsum("bhij,bhjv->bhiv", D, s)) if matrix else jnp.multiply
    apply = lambda D, s: jax.tree.map(times, D, s)

    def compose(earlier, later):
        (D1, s1), (D2, s2) = earlier, later
        return apply(D2, D1), jax.tree.map(jnp.add, apply(D2, s1), s2)

    def run(call: Call, args, state, documents: Documents, shard: Shard):
        fresh = call.state_like(args)
        state = fresh if state is None else state
        valid, alive = documents.here(shard)
        ids = documents.part(shard.start, shard.length)
        last_id, _ = documents.before(shard.start)
        *start, _ = shard.on_first(state, fresh)
        make = lambda fields: type(state)(*fields, last_id)
        *after, _ = call.run(args, make(start), ids)[1]
        D = through(call, args, make(start), valid)
        if alive is not None:
            D = jax.tree.map(lambda x: jnp.where(_wide(alive, x), x, 0), D)
        _, before = shard.composed_before((D, tuple(after)), compose)
        return call.run(args, make(shard.on_first(tuple(start), before)), ids)

    return Rule(run)


def _wide(rows: jax.Array, x: jax.Array) -> jax.Array:
    return rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim))


def _summed(log_decay: jax.Array, valid: jax.Array | None, dtype) -> jax.Array:
    """Log decays `[b t ...]` added up over the tokens here, as factors."""
    log_decay = log_decay.astype(dtype)
    if valid is not None:
        log_decay = jnp.where(_wide(valid, log_decay), log_decay, 0)
    return jnp.sum(log_decay, axis=1)


def _through_selective_scan(call: Call, args, state, valid):
    _, delta, A, *_ = args
    bias = args[7] if len(args) > 7 else None
    delta = delta.astype(state.h.dtype)
    delta = delta if bias is None else delta + bias
    if call.options.get("delta_softplus"):
        delta = jax.nn.softplus(delta)
    seconds = _summed(delta, valid, state.h.dtype)
    return (jnp.exp(seconds[..., None] * A),)


def _through_simple_gla(call: Call, args, state, valid):
    return (jnp.exp(_summed(args[3], valid, state.s.dtype))[..., None, None],)


def _through_gla(call: Call, args, state, valid):
    return (jnp.exp(_summed(args[3], valid, state.s.dtype))[..., None],)


def _through_taylor_attention(call: Call, args, state, valid):
    one = jnp.ones(state.z.shape[:1], state.z.dtype)
    return _wide(one, state.kv), _wide(one, state.z)


def _through_gated_delta_rule(call: Call, args, state, valid):
    """The rule itself, writing nothing into the unit matrix; padding passes it by."""
    q, k, _, g, beta = args
    b, _, h, width = k.shape
    unit = jnp.broadcast_to(jnp.eye(width, dtype=state.s.dtype), (b, h, width, width))
    # All tokens in one document: where others begin, D is 0 altogether.
    ids = None if valid is None else valid.astype(jnp.int32)
    nothing = jnp.zeros(k.shape, args[2].dtype)
    before = type(state)(unit, jnp.zeros_like(state.last_id))
    return (call.run((q, k, nothing, g, beta), before, ids)[1].s,)


# --- States that hold the last tokens ------------------------------------------------------------


def halo(reach: Callable, refuses: Callable | None = None) -> Rule:
    """The rule of an operator whose state is made of the last tokens alone.

    Args:
        reach: `reach(call, args) -> int`, how many tokens.
        refuses: as in `Rule`.
    """

    def run(call: Call, args, state, documents: Documents, shard: Shard):
        tokens = reach(call, args)
        if tokens > shard.length:
            return _sequential(call, args, state, documents, shard)
        fresh = call.state_like(args)
        at = shard.start - tokens
        before = _standing(fresh, *documents.before(at))
        if tokens:
            tail = call.tokens(args, lambda x, axis: shard.from_left(_last(x, tokens, axis)))
            before = call.run(tail, before, documents.part(at, tokens))[1]
        before = shard.on_first(fresh if state is None else state, before)
        return call.run(args, before, documents.part(shard.start, shard.length))

    return Rule(run, **({} if refuses is None else {"refuses": refuses}))


def _last(x: jax.Array, tokens: int, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, x.shape[axis] - tokens, x.shape[axis], axis=axis)


def _standing(state: Any, last_id: jax.Array, count: jax.Array) -> Any:
    """A state that stands in a document, after so many tokens of it."""
    new = {"last_id": last_id}
    if "count" in state._fields:
        new["count"] = count
    return state._replace(**new)


def _both_sides(call: Call, args, documents: Documents, shard: Shard, tokens: int):
    """An operator that looks `tokens` both ways, on the tokens here and those beside them."""
    x, *weights = args
    rows, t = x.shape[0], shard.length
    left = shard.from_left(_last(x, tokens, 1))
    right = shard.from_right(x[:, :tokens])
    ids = documents.ids
    if ids is None:
        ids = jnp.ones((rows, shard.n * t), jnp.int32)
    ids = jax.lax.dynamic_slice_in_dim(
        jnp.pad(ids, ((0, 0), (tokens, tokens))), shard.start, t + 2 * tokens, axis=1
    )
    y, _ = call.run((jnp.concatenate([left, x, right], axis=1), *weights), None, ids)
    return y[:, tokens : tokens + t], None


# --- States that are handed on -------------------------------------------------------------------


def _sequential(call: Call, args, state, documents: Documents, shard: Shard):
    fresh = call.state_like(args)
    start = _standing(fresh if state is None else state, *documents.before(jnp.int32(0)))
    ids = documents.part(shard.start, shard.length)

    @jax.checkpoint  # of each turn only the state is kept for the backward pass
    def turn(before, i):
        read = lambda before: call.run(args, before, ids)[1]
        after = jax.lax.cond(shard.index == i, read, lambda before: before, before)
        handed = shard.from_left(after)
        mine = shard.index == i + 1
        return jax.tree.map(lambda a, b: jnp.where(mine, a, b), handed, before), None

    before, _ = jax.lax.scan(turn, start, jnp.arange(shard.n - 1))
    return call.run(args, before, ids)


# --- One rule per operator -----------------------------------------------------------------------


def _short_conv_reach(call: Call, args) -> int:
    return args[1].shape[0] - 1


def _dilated_conv_reach(call: Call, args) -> int:
    return (args[1].shape[1] - 1) * sum(call.options["dilations"])


def _dilated_conv(call: Call, args, state, documents: Documents, shard: Shard):
    if call.options.get("symmetric"):
        return _both_sides(call, args, documents, shard, _dilated_conv_reach(call, args) // 2)
    return _DILATED.run(call, args, state, documents, shard)


def _refuses_dilated_conv(sizes, options, has_ids, n) -> str | None:
    reach = (sizes["w"] - 1) * sum(options["dilations"]) // 2
    if options.get("symmetric") and reach > sizes["t"] // n:
        return f"it looks {reach} tokens ahead, more than the {sizes['t'] // n} of a device"
    return None


def _chunk_attention_reach(call: Call, args) -> int:
    return call.options.get("window") or call.options["chunk"]


def _chunk_attention(call: Call, args, state, documents: Documents, shard: Shard):
    if call.options.get("causal", True):
        return _WINDOW.run(call, args, state, documents, shard)
    return call.run(args, None, None)


def _refuses_chunk_attention(sizes, options, has_ids, n) -> str | None:
    chunk = options.get("chunk")
    if options.get("causal", True):
        return None
    if has_ids:
        return "chunks that are seen both ways count from the start of each document"
    if sizes["t"] // n % chunk:
        return f"chunks of {chunk} would lie on two devices that hold {sizes['t'] // n} tokens each"
    return None


def _long_conv(call: Call, args, state, documents: Documents, shard: Shard):
    """All tokens of some channels, in place of all channels of some tokens."""
    there = lambda x, axis: jax.lax.all_to_all(x, shard.axis, x.ndim - 1, axis, tiled=True)
    y, state = call.run(call.tokens(args, there), state, documents.ids)
    return jax.lax.all_to_all(y, shard.axis, 1, y.ndim - 1, tiled=True), state


_DILATED = halo(_dilated_conv_reach)
_WINDOW = halo(_chunk_attention_reach)
RULES = {
    "selective_scan": linear(_through_selective_scan),
    "simple_gla": linear(_through_simple_gla),
    "gla": linear(_through_gla),
    "gated_delta_rule": linear(_through_gated_delta_rule, matrix=True),
    "taylor_attention": linear(_through_taylor_attention),
    "short_conv": halo(_short_conv_reach),
    "dilated_conv": Rule(_dilated_conv, _refuses_dilated_conv),
    "chunk_attention": Rule(_chunk_attention, _refuses_chunk_attention),
    "neural_memory": Rule(_sequential),
    "long_conv": Rule(_long_conv, trades="e"),
}
