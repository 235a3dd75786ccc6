"""The backward kernel of neural_memory: from the last block, with what each began with found again.

A step of the grid is one block, the last of its span first. The first step of a span runs the
span's writes from the state that was kept before it, and holds what each block begins with; a
block's gradients are those of its function (tpu_chunk.py), which JAX differentiates in the body.
"""

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
    structs,
    tokens_spec,
)
from pallas_kernels.neural_memory.tpu_refs import (
    clear,
    gate_rows,
    get,
    head_of,
    marks_of,
    put,
    put_head,
    put_or_clear,
    taken,
    views,
)
from pallas_kernels.neural_memory.tpu_stages import View


def backward(form: Layout, opening, carry, kept, q, k, v, gates, cuts: Cuts | None, dy, dlast):
    """Gradients of `forward`.

    Args:
        form: what is static.
        opening, carry, q, k, v, gates, cuts: as there.
        kept: the carry before each span but the first, or None.
        dy: of y.
        dlast: of the last (start, now, momentum), `[b h x y]`; None = 0.

    Returns:
        Gradients by what documents begin with (`[b h x y]`, of each row; None if it is), by the
        carry, and by q, k, v and gates.
    """
    span = lambda i, j: form.spans - 1 - i
    block = lambda i, j: jnp.minimum((form.spans - i) * form.span - 1 - j, form.last)
    before = lambda i, j: jnp.maximum(form.spans - 2 - i, 0)
    inputs = (q, k, v, gates, cuts, opening, carry, kept, dy, dlast)
    specs = (
        tokens_spec(form, q, block),
        *(tokens_spec(form, x, span, form.span) for x in (k, v)),
        gates_spec(form, span, form.span),
        cuts_spec(form, span, form.span),
        state_specs(form, opening),
        state_specs(form, carry),
        kept_specs(form, kept, before),
        tokens_spec(form, dy, block),
        state_specs(form, dlast),
    )
    dcarry = state_structs(carry)
    shares = jax.ShapeDtypeStruct(gates.shape, jnp.float32)
    results = (None if opening is None else dcarry[1:], dcarry, structs((q, k, v)), shares)
    result_specs = (
        state_specs(form, results[0], once=False),
        state_specs(form, dcarry, once=False),
        tuple(tokens_spec(form, x, block) for x in (q, k, v)),
        gates_spec(form, span, form.span),
    )
    tokens, marks = block_structs(form, q, v)
    carried = (opening, dcarry, marks)
    pull = tpu_plan.plan(
        functools.partial(tpu_rules.backward, form), *carried, tokens, dcarry, tokens.v, results[0]
    )
    advance = tpu_plan.plan(
        functools.partial(tpu_rules.again, form), *carried, tokens._replace(q=None)
    )
    here = lambda x, *n: pltpu.VMEM((*n, form.heads, *x.shape[2:]), x.dtype)
    matrix = lambda x: pltpu.VMEM(x.shape, x.dtype)
    scratch = (
        jax.tree.map(lambda x: here(x, form.span), dcarry),
        None if form.aligned else jax.tree.map(lambda x: here(x, 1), dcarry),
        jax.tree.map(matrix, (tokens, tokens.v, tokens)),
        pltpu.VMEM((1, form.block) if form.aligned else (1, 1), jnp.float32),
        tpu_stages.scratch(pull, advance),
    )
    given, tree = jax.tree.flatten(inputs)
    taken_, result_tree = jax.tree.flatten(results)
    places, scratch_tree = jax.tree.flatten(scratch)
    found = kernel_call(
        functools.partial(_body, form, (pull, advance), (tree, result_tree, scratch_tree)),
        name="neural_memory_backward",
        config=form.configs[1],
        grid=(form.b, form.groups, form.spans, form.span),
        in_specs=jax.tree.leaves(specs),
        out_specs=jax.tree.leaves(result_specs),
        out_shape=taken_,
        scratch_shapes=places,
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        cost=estimate(form, inputs, results, backward=True),
    )(*given)
    return jax.tree.unflatten(result_tree, found)


def _body(form: Layout, plans, trees, *refs):
    split = []
    for tree in trees:
        split.append(jax.tree.unflatten(tree, refs[: tree.num_leaves]))
        refs = refs[tree.num_leaves :]
    (q, k, v, gates, cuts, opening, carry, kept, dy, dlast), results, scratch = split
    dopening, dcarry, dtokens, dgates = results
    starts, reached, (work, dfound, found), row, places = scratch
    pull, advance = plans
    i, j = pl.program_id(2), pl.program_id(3)
    first = (form.spans - 1 - i) * form.span
    x = form.span - 1 - j  # the block's number in its span

    def tokens_of(g, x, q=None):
        rows = pl.ds(pl.multiple_of(x * form.block, form.block), form.block)
        return taken(form, work, (q, k[0, rows, :], v[0, rows, :]), gates, g, x)

    @pl.when((i == 0) & (j == 0))
    def _():
        if dlast is None:
            clear(dcarry, ...)
        else:
            put(dcarry, get(dlast[1:] if form.aligned else dlast, ...), ...)
        clear(dopening, ...)

    def ahead(refs, at, x, g, parts):
        """Writes some parts of a block into the carry at a place."""
        now = views(refs, at, g)
        inputs = (views(opening, g), now, marks_of(form, cuts, row, x, None), tokens_of(g, x))

        def part(s, _):
            row[...] = jnp.full((1, 1), s, jnp.float32)
            tpu_stages.run(advance, inputs, places, now)
            return 0

        jax.lax.fori_loop(0, parts, part, 0)

    def again(at, _):
        x, g = at // form.heads, at % form.heads
        if form.aligned:
            marks = marks_of(form, None, row, x, first + x)
            inputs = (None, views(starts, x, g), marks, tokens_of(g, x))
            tpu_stages.run(advance, inputs, places, views(starts, x + 1, g))
        else:
            put(starts, get(starts, x, g), x + 1, g)
            ahead(starts, x + 1, x, g, cuts.parts[0, 0, first + x])
        return 0

    @pl.when(j == 0)
    def _():
        if kept is not None:
            put(starts, get(kept, 0, 0), 0)
            pl.when(i == form.spans - 1)(lambda: put_or_clear(starts, carry, 0))
        else:
            put_or_clear(starts, carry, 0)
        blocks = jnp.minimum(form.span - 1, form.last - first)
        jax.lax.fori_loop(0, blocks * form.heads, again, 0)

    def put_tokens(g, *, add):
        for ref, d in zip(dtokens, found[:3], strict=True):
            put_head(ref, d[...], g, form.heads, add=add)
        for view, d in zip(gate_rows(dgates, g, x), found[3:], strict=True):
            view.store(view.load() + d[...] if add else d[...])

    def head(g, _):
        tokens = tokens_of(g, x, q[0])
        dfound[...] = head_of(dy[0], g, form.heads)
        marks = marks_of(form, cuts, row, x, first + x)
        before = views(starts, x, g) if form.aligned else views(reached, 0, g)
        after, opened = views(dcarry, 0, g), views(dopening, 0, g)
        inputs = (views(opening, g), before, marks, tokens, after, View(dfound), opened)
        outputs = (opened, after, views(found))
        if form.aligned:
            tpu_stages.run(pull, inputs, places, outputs)
            put_tokens(g, add=False)
            return 0

        clear(found, ...)
        put_tokens(g, add=False)
        n = cuts.parts[0, 0, first + x]

        def part(number, _):
            s = n - 1 - number
            put(reached, get(starts, x, g), 0, g)
            ahead(reached, 0, x, g, s)
            row[...] = jnp.full((1, 1), s, jnp.float32)
            tpu_stages.run(pull, inputs, places, outputs)
            put_tokens(g, add=True)
            return 0

        jax.lax.fori_loop(0, n, part, 0)
        return 0

    @pl.when(first + x <= form.last)
    def _():
        jax.lax.fori_loop(0, form.heads, head, 0)

    if form.aligned and dlast is not None:  # the last chunk's start is the weights before it

        @pl.when(first + x == form.last)
        def _():
            put(dcarry[0], jax.tree.map(jnp.add, get(dcarry[0], ...), get(dlast[0], ...)), ...)
