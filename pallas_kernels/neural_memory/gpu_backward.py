"""The backward kernel of neural_memory on a GPU: from the last block, each computed once more."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import gpu_parts
from pallas_kernels.neural_memory import gpu_block, gpu_chunk, gpu_machine, gpu_plan
from pallas_kernels.neural_memory.gpu_block import Block
from pallas_kernels.neural_memory.gpu_call import GATES, Call, Cuts
from pallas_kernels.neural_memory.gpu_chunk import Tokens
from pallas_kernels.neural_memory.gpu_forward import stacked
from pallas_kernels.neural_memory.gpu_tiles import SIZE

TOKENS = 4  # q, k, v, dy


class Gradients(NamedTuple):
    """What the backward pass gives.

    Attributes:
        dcarry: by weights and momentum before the first block, `[b h x y]`.
        dopening: by those that documents begin with, of each row; None without cuts.
        dtokens: by q, k, v.
        dgates: by alpha, eta, theta, `[b h n 3 64]`.
    """

    dcarry: Any
    dopening: Any
    dtokens: Any
    dgates: jax.Array


def backward(call: Call, kept, tokens, gates, dy, dlast, *, cuts: Cuts | None = None) -> Gradients:
    """Gradients of `gpu_forward.forward`.

    Args:
        call: what is static.
        kept: weights and momentum before each block, where a document begins those that it begins
            with, `[b n 2 h x y]`.
        tokens, gates: as there.
        dy: of y.
        dlast: of the last (start, now, momentum).
        cuts: as there.
    """
    plan = plan_of(call, room_of(call))
    new, f32 = jax.ShapeDtypeStruct, jnp.float32
    blocks, sets = call.form.blocks, 2 if cuts is None else 4
    results = dict(
        # By weights and momentum, and by those that documents begin with.
        weights=call.structs(call.b, sets)._replace(gamma=None),
        # Each block of a cluster has a share of it.
        gamma=new((call.b, sets, call.h, blocks, SIZE), f32) if call.gain else None,
        dtokens=tuple(new(x.shape, x.dtype) for x in tokens),
        dgates=new((call.b, call.h, blocks, call.n, 3, SIZE), f32),
        far=new((call.b, call.h, blocks, plan.far, SIZE, SIZE), f32) if plan.far else None,
    )
    found = gpu_block.start(
        call,
        functools.partial(_body, plan),
        name="neural_memory_backward",
        inputs=(kept, cuts, (*tokens, dy), gates, stacked(dlast)),
        results=results,
        memory=gpu_block.scratch(call, plan, TOKENS),
    )
    gamma = jnp.sum(found["gamma"], axis=3) if call.gain else None
    weights = found["weights"]._replace(gamma=gamma)
    each = [jax.tree.map(lambda x, i=i: x[:, i], weights) for i in range(sets)]
    dgates = jnp.sum(found["dgates"], axis=2)
    return Gradients(tuple(each[:2]), tuple(each[2:]) or None, found["dtokens"], dgates)


def room_of(call: Call) -> gpu_plan.Room:
    """Of two layers, what a third tile would take holds where the other things lie; and phi is kept
    longer than a product of numbers, since it takes thirty operations. In float32, where a tile has
    three parts, a second one would spill."""
    tiles = call.room(0, TOKENS)
    if not call.mlp:
        return gpu_plan.Room(tiles)
    return gpu_plan.Room(tiles, registers=2 if call.narrow else 1, near=12)


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
    ready = [*of_weights, *[call.narrow] * 3, *[True] * GATES, call.narrow, True]
    over = [2 * each + i for i in range(2 * each)] + [None] * 6
    given = (weights, weights, weights, weights, call.tokens, call.tokens.q, call.tokens.own)
    return gpu_plan.plan(rule, ready, over, room, *given)


def _body(plan: gpu_plan.Plan, block: Block, inputs, results):
    kept, block.cuts, tokens, gates, dlast = inputs
    call, leaves = block.call, jax.tree.leaves
    rarely = block.cuts is not None

    def gradients(**how):
        found: list[Any] = [block.far(results["weights"], i, **how) for i in range(2)]
        if call.gain:
            found = [x._replace(gamma=block.row("rows", i)) for i, x in enumerate(found)]
        return found

    def shares_of_gamma(i, h, j):
        return block.out(results["gamma"], i, h, j)

    def of_opening():
        found: list[Any] = [block.far(results["weights"], i, rarely=True) for i in (2, 3)]
        if call.gain:
            at = (lambda: block.number(block.h)), (lambda: block.number(block.j))
            found = [
                x._replace(gamma=shares_of_gamma(i, *at))
                for i, x in zip((2, 3), found, strict=True)
            ]
        return found

    def add(to, of, *, fresh: bool):
        """Gradients that come from outside; the first block answers for gamma."""
        for a, b in zip(leaves(to), leaves(of), strict=True):
            more = b.load()
            if more.ndim == 1 and block.blocks > 1:
                more = more * jnp.where(block.j == 0, 1.0, 0.0)
            a.store(more if fresh else a.load() + more)

    def clear(places):
        for x, like in zip(leaves(places), leaves((call.weights, call.weights)), strict=True):
            shape = like.shape if like.shape[0] > 1 else like.shape[1:]
            x.store(block.registers.cast(jnp.zeros(shape, jnp.float32), 1))

    def give_to_opening():
        given = gradients(rarely=True)
        for a, b in zip(leaves(of_opening()), leaves(given), strict=True):
            a.store(a.load() + b.load())
        clear(given)

    block.open()
    count = block.count
    add(gradients(), [block.far(dlast, i) for i in (1, 2)], fresh=True)
    if block.blocks > 1:
        one = jnp.where(block.j == 0, 1.0, 0.0)
        block.row("rows", 2).store(block.registers.cast(jnp.full((SIZE,), one, jnp.float32), 1))
    if block.cuts is None:
        block.fetch(tokens, gates, count - 1, 0)
    else:  # a row may have no block
        clear(of_opening())
        pl.when(count > 0)(lambda: block.fetch(tokens, gates, count - 1, 0))

    def step(index):
        at = block.number(index)
        block.turn(at, plan)
        i, parity = count - 1 - at, jax.lax.rem(at, 2)
        pl.when(index + 1 < count)(lambda: block.fetch(tokens, gates, i - 1, 1 - parity))
        (*given, dy), shares = block.fetched(tokens, i, parity)
        before = [block.far(kept, i, which) for which in range(2)]
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

        @pl.when(index == 0)
        def _():
            """The last block's start is the weights before it."""
            add(gradients(rarely=rarely)[0], block.far(dlast, 0, rarely=rarely), fresh=False)

        block.when_begins(i, give_to_opening)

    gpu_parts.each(count, step)
    if call.gain:
        for i, x in enumerate(gradients()):
            shares_of_gamma(i, block.h, block.j).store(x.gamma.load())
    block.close()
