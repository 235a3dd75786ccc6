"""The forward kernel of neural_memory on a GPU: chunk after chunk, the weights on chip."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import gpu_parts
from pallas_kernels.neural_memory import gpu_block, gpu_chunk, gpu_machine, gpu_plan
from pallas_kernels.neural_memory.gpu_block import Block
from pallas_kernels.neural_memory.gpu_call import GATES, Call, Cuts
from pallas_kernels.neural_memory.gpu_tiles import SIZE

TOKENS = 3  # q, k, v


def forward(
    call: Call,
    carry,
    tokens,
    gates,
    *,
    keep: bool,
    opening=None,
    cuts: Cuts | None = None,
):
    """Reads and writes all tokens.

    Args:
        call: what is static.
        carry: weights now and momentum, `[b h x y]`; with cuts, weights at the chunk's start
            before these.
        tokens: q, k, v `[b t h 64]`.
        gates: alpha, eta, theta and what counts, `[b h n 4 64]`.
        keep: whether what the backward pass needs is wanted.
        opening: with cuts, weights and momentum that documents begin with, `[h x y]`.
        cuts: where documents begin; None = with the first block, and it goes through all of them.

    Returns:
        y `[b t h 64]`, the last (start, now, momentum), and weights and momentum before each
        block, `[b n 2 h x y]`, if they are to be kept.
    """
    plan = _plan(call)
    new, f32 = jax.ShapeDtypeStruct, jnp.float32
    results = dict(
        y=new(tokens[2].shape, tokens[2].dtype),
        last=call.structs(call.b, 3),
        kept=kept_structs(call) if keep else None,
        far=new((call.b, call.h, call.form.blocks, plan.far, SIZE, SIZE), f32)
        if plan.far
        else None,
    )
    found = gpu_block.start(
        call,
        functools.partial(_body, plan),
        name="neural_memory_forward",
        inputs=(stacked(carry), opening and stacked(_of_rows(call, opening)), cuts, tokens, gates),
        results=results,
        memory=gpu_block.scratch(call, plan, TOKENS, states=_states(call)),
    )
    last = tuple(jax.tree.map(lambda x, i=i: x[:, i], found["last"]) for i in range(3))
    return found["y"], last, found["kept"]


def kept_structs(call: Call):
    return call.structs(call.b, call.n, 2)


def stacked(several):
    """Several sets of weights `[b ...]` as one `[b s ...]`: the compiler keeps where each array
    begins in registers, of which there are too few for all of them."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *several)


def _of_rows(call: Call, weights):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (call.b, *x.shape)), weights)


def _states(call: Call) -> int:
    return 4 if call.mlp else 2


def _plan(call: Call) -> gpu_plan.Plan:
    def rule(now, momentum, tokens):
        return gpu_chunk.read_and_write(call.form, now, now, momentum, tokens)

    count = 2 * len(jax.tree.leaves(call.weights))
    ready = [True] * count + [call.narrow] * TOKENS + [True] * GATES
    # A third tile in registers would spill where tiles have three parts.
    tiles, registers = call.room(_states(call), TOKENS), 2 if call.mlp and not call.narrow else 3
    room = gpu_plan.Room(tiles, registers)
    weights = call.weights
    return gpu_plan.plan(rule, ready, [None, *range(count)], room, weights, weights, call.tokens)


def _body(plan: gpu_plan.Plan, block: Block, inputs, results):
    carry, opening, block.cuts, tokens, gates = inputs
    call, leaves = block.call, jax.tree.leaves
    block.open()
    count = block.count
    held = block.states()
    far = lambda sets, *at: leaves(block.far(sets, *at))
    both = lambda sets, first, *at: [*far(sets, *at, first), *far(sets, *at, first + 1)]
    move(leaves(held), both(carry, 0 if block.cuts is None else 1))
    if block.cuts is None:
        block.fetch(tokens, gates, 0, 0)
    else:  # a row may have no block
        move(far(results["last"], 0), far(carry, 0))
        pl.when(count > 0)(lambda: block.fetch(tokens, gates, 0, 0))

    def step(at):
        # Else every address that depends on it would be counted up in a register of its own. What
        # is done in some turns only hangs on the number itself, or the count of bytes would not
        # know in which.
        i = block.number(at)
        block.turn(i, plan)
        parity = jax.lax.rem(i, 2)
        pl.when(at + 1 < count)(lambda: block.fetch(tokens, gates, i + 1, 1 - parity))
        block.when_begins(i, lambda: move(leaves(held), both(opening, 0)))
        given, shares = block.fetched(tokens, i, parity)
        if results["kept"] is not None:
            move(both(results["kept"], 0, i), leaves(held))

        @pl.when(at + 1 == count)
        def _():
            move(far(results["last"], 0), leaves(held[0]))

        y = block.once(results["y"], pl.ds(i * SIZE, SIZE), block.h)
        outputs = [y.store, *(x.store for x in leaves(held))]
        gpu_machine.run(
            plan,
            block.registers,
            [*leaves(held), *given, *shares],
            outputs,
            block.places(plan, results["far"], _states(call)),
            block.across,
        )

    gpu_parts.each(count, step)
    move(both(results["last"], 1), leaves(held))
    block.close()


def move(to, of) -> None:
    for a, b in zip(to, of, strict=True):
        a.store(b.load())
