"""The forward kernel of neural_memory: block after block, the weights of a few heads on chip."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import kernel_call
from pallas_kernels.neural_memory import tpu_plan, tpu_rules, tpu_stages
from pallas_kernels.neural_memory.tpu_blocks import (
    Cuts,
    Layout,
    block_structs,
    cuts_spec,
    estimate,
    gates_spec,
    kept_specs,
    state_specs,
    state_structs,
    tokens_spec,
)
from pallas_kernels.neural_memory.tpu_refs import (
    get,
    marks_of,
    put,
    put_head,
    put_or_clear,
    taken,
    views,
)
from pallas_kernels.neural_memory.tpu_stages import View


def forward(form: Layout, opening, carry, q, k, v, gates, cuts: Cuts | None, *, keep: bool):
    """Reads and writes all tokens.

    Args:
        form: what is static.
        opening: weights and momentum `[h x y]` that documents begin with; None = not needed.
        carry: (now, momentum) `[b h x y]` if form.aligned, the momentum None if it is 0; else
            (start, now, momentum).
        q, k, v: `[b t h*x]`.
        gates: alpha, eta, theta, `[b h n 3 c]`.
        cuts: None if form.aligned.
        keep: whether what the backward pass needs is wanted.

    Returns:
        y `[b t h*v]`, the last (start, now, momentum), and the carry before each span but the
        first, `[b spans-1 h x y]`; None if there is only one, or not to keep.
    """
    at, before = (lambda i: i), (lambda i: jnp.maximum(i // form.span - 1, 0))
    inputs = (q, k, v, gates, cuts, opening, carry)
    specs = (
        *(tokens_spec(form, x, at) for x in (q, k, v)),
        gates_spec(form, at),
        cuts_spec(form, at),
        state_specs(form, opening),
        state_specs(form, carry),
    )
    new = jax.ShapeDtypeStruct
    state = state_structs(carry)
    last = (state[-2], *state[-2:])
    kept = None
    if keep and form.spans > 1:
        more = lambda x: new((x.shape[0], form.spans - 1, *x.shape[1:]), x.dtype)
        kept = jax.tree.map(more, state)
    results = (new(v.shape, v.dtype), last, kept)
    result_specs = (
        tokens_spec(form, v, at),
        state_specs(form, last, once=False),
        kept_specs(form, kept, before),
    )
    tokens, marks = block_structs(form, q, v)
    rule = functools.partial(tpu_rules.forward, form)
    plan = tpu_plan.plan(rule, opening, state, marks, tokens)
    matrix = lambda x: pltpu.VMEM(x.shape, x.dtype)
    row = (1, form.block) if form.aligned else (1, 1)
    scratch = (
        jax.tree.map(matrix, (tokens, tokens.v)),
        pltpu.VMEM(row, jnp.float32),
        tpu_stages.scratch(plan),
    )
    given, tree = jax.tree.flatten(inputs)
    wanted, result_tree = jax.tree.flatten(results)
    places, scratch_tree = jax.tree.flatten(scratch)
    found = kernel_call(
        functools.partial(_body, form, plan, (tree, result_tree, scratch_tree)),
        name="neural_memory_forward",
        config=form.configs[0],
        grid=(form.b, form.groups, form.last + 1),
        in_specs=jax.tree.leaves(specs),
        out_specs=jax.tree.leaves(result_specs),
        out_shape=wanted,
        scratch_shapes=places,
        semantics=("parallel", "parallel", "arbitrary"),
        cost=estimate(form, inputs, results, backward=False),
    )(*given)
    return jax.tree.unflatten(result_tree, found)


def _body(form: Layout, plan, trees, *refs):
    split = []
    for tree in trees:
        split.append(jax.tree.unflatten(tree, refs[: tree.num_leaves]))
        refs = refs[tree.num_leaves :]
    (q, k, v, gates, cuts, opening, carry), (y, last, kept), scratch = split
    (work, found), row, places = scratch
    i = pl.program_id(2)
    held = last[1:] if form.aligned else last

    pl.when(i == 0)(lambda: put_or_clear(held, carry, ...))
    if kept is not None:
        begins = (i > 0) & (i % form.span == 0)
        pl.when(begins)(lambda: put(kept, get(held, slice(None)), slice(None), 0))

    if form.aligned:
        pl.when(i == form.last)(lambda: put(last[0], get(last[1], ...), ...))

    marks = marks_of(form, cuts, row, 0, i)

    def head(g, _):
        tokens = taken(form, work, (q[0], k[0], v[0]), gates, g, 0)
        now = views(held, 0, g)
        inputs = (views(opening, g), now, marks, tokens)
        run = lambda: tpu_stages.run(plan, inputs, places, (now, View(found)))
        if form.aligned:
            run()
            put_head(y, found[...], g, form.heads)
            return 0

        put_head(y, jnp.zeros(found.shape, jnp.float32), g, form.heads)

        def part(s, _):
            row[...] = jnp.full((1, 1), s, jnp.float32)
            run()
            put_head(y, found[...], g, form.heads, add=True)
            return 0

        jax.lax.fori_loop(0, cuts.parts[0, 0, i], part, 0)
        return 0

    jax.lax.fori_loop(0, form.heads, head, 0)
