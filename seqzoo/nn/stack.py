"""Layers, one after the other, compiled once per kind: what to compile does not grow with depth.

A pattern such as mamba, mamba, attention, mamba, mamba, attention, mamba is cut into runs of
repeated periods, here (mamba, mamba, attention) x 2 and (mamba) x 1. The parameters of a run are
stacked along a leading axis, and one lax.scan goes over its repeats.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.block import NORM_PLACES, Block
from seqzoo.nn.param import declare
from seqzoo.nn.report import Reports, captured, gather
from seqzoo.nn.sharding import constrain

# What a layer keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Run(NamedTuple):
    """`repeats` times the layers `period`, the first of them being layer `start`."""

    start: int
    period: tuple[str, ...]
    repeats: int


def cut(layers: Sequence[str]) -> list[Run]:
    """Cuts a list of layer kinds into runs, so that the fewest blocks are compiled."""
    n = len(layers)
    best: list[tuple[int, int, Run | None]] = [(0, 0, None)]  # (blocks, runs, last run) of a prefix
    for stop in range(1, n + 1):
        found = []
        for start in reversed(range(stop)):  # of equals, the one with the longest run first
            period = _shortest_period(layers[start:stop])
            blocks, runs, _ = best[start]
            run = Run(start, tuple(period), (stop - start) // len(period))
            found.append((blocks + len(period), runs + 1, run))
        best.append(min(found, key=lambda one: one[:2]))
    runs: list[Run] = []
    while n:
        runs.append(best[n][2])
        n = runs[-1].start
    return runs[::-1]


def _shortest_period(layers: Sequence[str]) -> Sequence[str]:
    n = len(layers)
    for length in range(1, n + 1):
        if n % length == 0 and all(layers[i] == layers[i - length] for i in range(length, n)):
            return layers[:length]
    return layers


class StackOutput(NamedTuple):
    """What a stack gives.

    Attributes:
        x: `[b t d]`, the residual stream after the last layer.
        state: per run a tuple of mixer states, one per layer of its period, each with a leading
            axis of repeats; None unless asked for.
        reports: what the mixers told.
    """

    x: jax.Array
    state: list | None
    reports: Reports


class Stack(nnx.Module):
    """Blocks by pattern.

    Args:
        d_model: width of the residual stream.
        n_layers: layers in all.
        pattern: mixers by name, repeated to n_layers.
        mixers: what makes each of them: `{name: make}` with `make(rngs=...)`.
        channel_mixer: what makes the channel mixer after each; None = there is none.
        norm: "rmsnorm", "layernorm" or "scalenorm".
        norm_place: "pre" = what a mixer reads is normalised; "post" = the sum behind it.
        norm_eps: added under the root of the norms.
        dropout: rate, on what each mixer adds.
        remat: what a layer keeps for the backward pass: none (keeps all), full (keeps nothing),
            dots (matrix products), dots_no_batch (those with weights).
        dtype: what layers compute in.
        rngs: source of the initial values; layer i draws from its own key.

    Raises:
        ValueError: a setting is out of range, or the pattern names a mixer that is not given.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_layers: int,
        pattern: Sequence[str],
        mixers: Mapping[str, object],
        channel_mixer=None,
        norm: str = "rmsnorm",
        norm_place: str = "pre",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        remat: str = "none",
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if n_layers < 1 or not pattern:
            raise ValueError(f"n_layers is {n_layers} and pattern {list(pattern)}: no layers")
        for name in pattern:
            if name not in mixers:
                raise ValueError(f"pattern names '{name}'; mixers has {sorted(mixers)}")
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {remat!r}; allowed: {', '.join(REMAT_POLICIES)}")
        if norm_place not in NORM_PLACES:
            raise ValueError(f"norm_place is {norm_place!r}; allowed: {', '.join(NORM_PLACES)}")
        self.remat = remat
        self.layers = tuple(pattern[i % len(pattern)] for i in range(n_layers))
        self.plan = tuple(cut(self.layers))
        make = lambda name, key: Block(
            d_model,
            mixer=mixers[name],
            channel_mixer=channel_mixer,
            norm=norm,
            norm_place=norm_place,
            norm_eps=norm_eps,
            dropout=dropout,
            dtype=dtype,
            rngs=nnx.Rngs(key),
        )
        key = rngs.params()
        self.runs = nnx.List([_stacked(run, make, key) for run in self.plan])

    def __call__(
        self, x: jax.Array, *, segment_ids=None, state=None, return_state=False, key=None
    ) -> StackOutput:
        """Runs all layers over `[b t d]`.

        Args:
            x: `[b t d]`; its dtype is that of the residual stream.
            segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding.
            state: from `init_state` or an earlier call; None = fresh.
            return_state: whether to give the state after the last token.
            key: a PRNG key for dropout; None = off.
        """
        states, reported = [], []
        for i in range(len(self.plan)):
            x, new, told = self._scan(
                i, x, None if state is None else state[i], segment_ids, return_state, key
            )
            states.append(new)
            reported.append(told)
        return StackOutput(x, states if return_state else None, gather(reported))

    def _scan(self, i, x, state, segment_ids, return_state, key):
        run = self.plan[i]
        graphdef, variables = nnx.split(self.runs[i])

        def period(x, inputs):
            variables, state, repeat = inputs
            blocks = nnx.merge(graphdef, variables)
            new, told = [], []
            for j, block in enumerate(blocks):
                x = constrain(x, "batch", "length", None)
                layer = run.start + repeat * len(run.period) + j
                layer_key = None if key is None else jax.random.fold_in(key, layer)
                call = functools.partial(
                    Block.__call__,
                    segment_ids=segment_ids,
                    state=None if state is None else state[j],
                    key=layer_key,
                )
                with jax.named_scope(run.period[j]):
                    (x, one), sown = captured(block, call, x)
                new.append(one if return_state else None)
                told.append(sown)
            return x, (tuple(new), tuple(told))

        if self.remat != "none":
            period = jax.checkpoint(period, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x, (new, told) = jax.lax.scan(period, x, (variables, state, jnp.arange(run.repeats)))
        return x, new, told

    def step(self, x_t: jax.Array, state):
        """One token `[b d]` through all layers; returns it with the state after it."""
        states = []
        for i, run in enumerate(self.plan):
            graphdef, variables = nnx.split(self.runs[i])

            def period(x_t, inputs, graphdef=graphdef, run=run):
                variables, state = inputs
                new = []
                for j, block in enumerate(nnx.merge(graphdef, variables)):
                    with jax.named_scope(run.period[j]):
                        x_t, one = block.step(x_t, state[j])
                    new.append(one)
                return x_t, tuple(new)

            x_t, new = jax.lax.scan(period, x_t, (variables, state[i]), unroll=run.repeats == 1)
            states.append(new)
        return x_t, states

    def prepared(self) -> "Stack":
        """The same layers with what follows from parameters alone computed: to read much with.

        A mixer with a method `prepared()` gives way to what that returns. Not for training.
        """
        ready = copy.copy(self)
        ready.runs = nnx.List([_prepared(blocks) for blocks in self.runs])
        return ready

    def unrolled(self) -> "Stack":
        """The layers of `prepared()`, each a run of its own with arrays of its own: for writing.

        A scan over layers copies what it hands to each of them. That is nothing beside a whole
        sequence, but a step does little more than read its weights and its state once.
        """
        apart = copy.copy(self)
        apart.plan = tuple(
            Run(run.start + i * len(run.period), run.period, 1)
            for run in self.plan
            for i in range(run.repeats)
        )
        apart.runs = nnx.List()
        for run, blocks in zip(self.plan, self.runs, strict=True):
            graphdef, variables = nnx.split(blocks)
            for one in _apart(variables, run.repeats):
                apart.runs.append(_prepared(nnx.merge(graphdef, one)))
        return apart

    def unrolled_state(self, state: list) -> list:
        """A state of this stack as one of `unrolled()`."""
        return [
            one
            for run, part in zip(self.plan, state, strict=True)
            for one in _apart(part, run.repeats)
        ]

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> list:
        """The state before the first token; max_length sizes caches."""
        states = []
        for blocks in self.runs:
            graphdef, variables = nnx.split(blocks)

            def one(variables, graphdef=graphdef):
                made = nnx.merge(graphdef, variables)
                return tuple(b.mixer.init_state(batch_size, max_length=max_length) for b in made)

            states.append(jax.vmap(one)(variables))
        return states

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Bytes kept per sequence while decoding, all layers together."""
        total = {"recurrent": 0, "total": 0}
        for run, blocks in zip(self.plan, self.runs, strict=True):
            for block in blocks:
                for name, count in block.mixer.state_bytes(context_length).items():
                    total[name] += run.repeats * count
        return total


@functools.partial(jax.jit, static_argnums=1)
def _apart(tree, repeats: int) -> list:
    """Arrays with a leading axis of repeats, cut into trees with one of 1."""
    return [jax.tree.map(lambda x, i=i: x[i : i + 1], tree) for i in range(repeats)]


def _prepared(blocks: nnx.List) -> nnx.List:
    """The blocks of a run, their mixers prepared where they know how."""
    if not any(hasattr(block.mixer, "prepared") for block in blocks):
        return blocks
    graphdef, variables = nnx.split(blocks)

    def make(variables):
        made = nnx.merge(graphdef, variables)
        for block in made:
            if hasattr(block.mixer, "prepared"):
                block.mixer = block.mixer.prepared()
        return made

    first = jax.tree.map(lambda x: x[0], variables)
    graphdef_after, _ = nnx.split(nnx.eval_shape(lambda: make(first)))
    return nnx.merge(graphdef_after, jax.vmap(lambda one: nnx.split(make(one))[1])(variables))


def _stacked(run: Run, make, key: jax.Array) -> nnx.List:
    """The blocks of one period, their parameters stacked over its repeats."""
    size = len(run.period)

    def build(first):
        blocks = nnx.List(
            [make(name, jax.random.fold_in(key, first + j)) for j, name in enumerate(run.period)]
        )
        declare(blocks)
        return blocks

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(0)))
    first = run.start + size * jnp.arange(run.repeats)
    return nnx.merge(graphdef, jax.vmap(lambda n: nnx.split(build(n))[1])(first))
