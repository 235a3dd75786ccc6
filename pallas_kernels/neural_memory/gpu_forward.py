"""The forward kernel of neural_memory on a GPU: chunk after chunk, the weights on chip."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import gpu_parts
from pallas_kernels.neural_memory import gpu_block, gpu_chunk, gpu_machine, gpu_plan
from pallas_kernels.neural_memory.gpu_block import Block, Call
from pallas_kernels.neural_memory.gpu_tiles import SIZE

TOKENS = 3  # q, k, v


def forward(call: Call, carry, tokens, gates, *, keep: bool):
    """Reads and writes all tokens.

    Args:
        call: what is static.
        carry: weights now and momentum, `[b h x y]`.
        tokens: q, k, v `[b t h 64]`.
        gates: alpha, eta, theta and what counts, `[b h n 4 64]`.
        keep: whether what the backward pass needs is wanted.

    Returns:
        y `[b t h 64]`, the last (start, now, momentum), and the carry before each block,
        `[b n h x y]`, if it is to be kept.
    """
    plan = _plan(call)
    new, f32 = jax.ShapeDtypeStruct, jnp.float32
    state, many = call.structs(call.b), call.structs(call.b, call.n)
    results = dict(
        y=new(tokens[2].shape, tokens[2].dtype),
        last=(state, state, state),
        kept=(many, many) if keep else None,
        far=new((call.b, call.h, call.form.blocks, plan.far, SIZE, SIZE), f32)
        if plan.far
        else None,
    )
    found = gpu_block.start(
        call,
        functools.partial(_body, plan),
        name="neural_memory_forward",
        inputs=(carry, tokens, gates),
        results=results,
        memory=gpu_block.scratch(call, plan, TOKENS, states=_states(call)),
    )
    return found["y"], found["last"], found["kept"]


def _states(call: Call) -> int:
    return 4 if call.mlp else 2


def _plan(call: Call) -> gpu_plan.Plan:
    def rule(now, momentum, tokens):
        return gpu_chunk.read_and_write(call.form, now, now, momentum, tokens)

    count = 2 * len(jax.tree.leaves(call.weights))
    ready = [True] * count + [call.narrow] * TOKENS + [True] * gpu_block.GATES
    room = gpu_plan.Room(call.room(_states(call), TOKENS))
    weights = call.weights
    return gpu_plan.plan(rule, ready, [None, *range(count)], room, weights, weights, call.tokens)


def _body(plan: gpu_plan.Plan, block: Block, inputs, results):
    carry, tokens, gates = inputs
    call, leaves = block.call, jax.tree.leaves
    block.open()
    held = block.states()
    move(leaves(held), leaves([block.far(x) for x in carry]))
    block.fetch(tokens, gates, 0, 0)

    def step(i):
        # Else every address that depends on it would be counted up in a register of its own.
        i = block.number(i)
        block.turn(i, plan)
        parity = jax.lax.rem(i, 2)
        pl.when(i + 1 < call.n)(lambda: block.fetch(tokens, gates, i + 1, 1 - parity))
        given, shares = block.fetched(tokens, i, parity)
        if results["kept"] is not None:
            move(leaves([block.far(x, i) for x in results["kept"]]), leaves(held))

        @pl.when(i + 1 == call.n)
        def _():
            move(leaves(block.far(results["last"][0])), leaves(held[0]))

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

    gpu_parts.each(call.n, step)
    move(leaves([block.far(x) for x in results["last"][1:]]), leaves(held))
    block.close()


def move(to, of) -> None:
    for a, b in zip(to, of, strict=True):
        a.store(b.load())
