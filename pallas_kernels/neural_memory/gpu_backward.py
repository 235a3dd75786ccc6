"""The backward kernel of neural_memory on a GPU: from the last block, each computed once more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import gpu_parts
from pallas_kernels.neural_memory import gpu_block, gpu_chunk, gpu_machine, gpu_plan
from pallas_kernels.neural_memory.gpu_block import Block, Call
from pallas_kernels.neural_memory.gpu_chunk import Tokens
from pallas_kernels.neural_memory.gpu_tiles import SIZE

TOKENS = 4  # q, k, v, dy


def backward(call: Call, kept, tokens, gates, dy, dlast):
    """Gradients of `gpu_forward.forward`.

    Args:
        call: what is static.
        kept: the carry before each block.
        tokens, gates: as there.
        dy: of y.
        dlast: of the last (start, now, momentum).

    Returns:
        Gradients by the carry, by q, k, v, and by alpha, eta, theta `[b h n 3 64]`.
    """
    plan = plan_of(call, room_of(call))
    new, f32 = jax.ShapeDtypeStruct, jnp.float32
    state, blocks = call.structs(call.b), call.form.blocks
    results = dict(
        dcarry=tuple(state._replace(gamma=None) for _ in range(2)),
        # Each block of a cluster has a share of it.
        dgamma=new((call.b, call.h, 2, blocks, SIZE), f32) if call.gain else None,
        dtokens=tuple(new(x.shape, x.dtype) for x in tokens),
        dgates=new((call.b, call.h, blocks, call.n, 3, SIZE), f32),
        far=new((call.b, call.h, blocks, plan.far, SIZE, SIZE), f32) if plan.far else None,
    )
    found = gpu_block.start(
        call,
        functools.partial(_body, plan),
        name="neural_memory_backward",
        inputs=(kept, (*tokens, dy), gates, dlast),
        results=results,
        memory=gpu_block.scratch(call, plan, TOKENS),
    )
    dcarry = found["dcarry"]
    if call.gain:
        dgamma = jnp.sum(found["dgamma"], axis=3)
        dcarry = tuple(x._replace(gamma=dgamma[:, :, i]) for i, x in enumerate(dcarry))
    return dcarry, found["dtokens"], jnp.sum(found["dgates"], axis=2)


def room_of(call: Call) -> gpu_plan.Room:
    """Of two layers, what a third tile would take holds where the other things lie; and phi is kept
    longer than a product of numbers, since it takes thirty operations."""
    tiles = call.room(0, TOKENS)
    return gpu_plan.Room(tiles, registers=2, near=12) if call.mlp else gpu_plan.Room(tiles)


def plan_of(call: Call, room: gpu_plan.Room) -> gpu_plan.Plan:
    form = call.form

    def rule(now, momentum, dnow, dmomentum, tokens, dy, first):
        def run(now, momentum, *tokens_):
            return gpu_chunk.read_and_write(
                form, now, now, momentum, Tokens(*(*tokens_, tokens.own))
            )

        pull = jax.vjp(run, now, momentum, *tokens[:6])[1]
        # Blocks of a cluster add up: what all of them have, one of them answers for.
        dy = dy if form.blocks == 1 else dy * first
        dnow, dmomentum, *others = pull((dy, dnow, dmomentum))
        dtokens = (gpu_chunk.across(form, x) for x in others[:3])
        return dnow, dmomentum, *dtokens, *others[3:]

    weights, each = call.weights, len(jax.tree.leaves(call.weights))
    # Weights and their gradients lie in device memory, vectors and bfloat16 tokens on chip.
    of_weights = [False] * (2 * each) + [
        x.shape[0] == 1 for x in jax.tree.leaves((weights, weights))
    ]
    ready = [*of_weights, *[call.narrow] * 3, *[True] * gpu_block.GATES, call.narrow, True]
    over = [2 * each + i for i in range(2 * each)] + [None] * 6
    given = (weights, weights, weights, weights, call.tokens, call.tokens.q, call.tokens.own)
    return gpu_plan.plan(rule, ready, over, room, *given)


def _body(plan: gpu_plan.Plan, block: Block, inputs, results):
    kept, tokens, gates, dlast = inputs
    call, leaves = block.call, jax.tree.leaves

    def gradients():
        found: list[Any] = [block.far(x) for x in results["dcarry"]]
        if call.gain:
            found = [x._replace(gamma=block.row("rows", i)) for i, x in enumerate(found)]
        return found

    def add(to, of, *, fresh: bool):
        """Gradients that come from outside; the first block answers for gamma."""
        for a, b in zip(leaves(to), leaves(of), strict=True):
            more = b.load()
            if more.ndim == 1 and block.blocks > 1:
                more = more * jnp.where(block.j == 0, 1.0, 0.0)
            a.store(more if fresh else a.load() + more)

    block.open()
    add(gradients(), [block.far(x) for x in dlast[1:]], fresh=True)
    if block.blocks > 1:
        one = jnp.where(block.j == 0, 1.0, 0.0)
        block.row("rows", 2).store(block.registers.cast(jnp.full((SIZE,), one, jnp.float32), 1))
    block.fetch(tokens, gates, call.n - 1, 0)

    def step(at):
        at = block.number(at)
        block.turn(at, plan)
        i, parity = call.n - 1 - at, jax.lax.rem(at, 2)
        pl.when(i > 0)(lambda: block.fetch(tokens, gates, i - 1, 1 - parity))
        (*given, dy), shares = block.fetched(tokens, i, parity)
        before = [block.far(x, i) for x in kept]
        of = gradients()
        here = (pl.ds(i * SIZE, SIZE), block.h)
        outputs = [block.once(ref, *here) for ref in results["dtokens"]]
        outputs += [block.out(results["dgates"], block.h, block.j, i, r) for r in range(3)]
        gpu_machine.run(
            plan,
            block.registers,
            [*leaves(before), *leaves(of), *given, *shares, dy, block.row("rows", 2)],
            [x.store for x in (*leaves(of), *outputs)],
            block.places(plan, results["far"], 0),
            block.across,
        )

        @pl.when(at == 0)
        def _():
            """The last block's start is the weights before it."""
            add(gradients()[0], block.far(dlast[0]), fresh=False)

    gpu_parts.each(call.n, step)
    if call.gain:
        for i, x in enumerate(gradients()):
            block.out(results["dgamma"], block.h, i, block.j).store(x.gamma.load())
    block.close()
