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
from pallas_kernels.neural_memory.tpu_blocks import (
    Cuts,
    Layout,
    begun,
    cuts_spec,
    estimate,
    gates_spec,
    get,
    head_of,
    kept_specs,
    mine_of,
    put,
    put_head,
    state_specs,
    structs,
    tokens_at,
    tokens_spec,
)
from pallas_kernels.neural_memory.tpu_chunk import read_and_write, write


def backward(form: Layout, opening, carry, kept, q, k, v, gates, cuts: Cuts | None, dy, dlast):
    """Gradients of `forward`.

    Args:
        form: what is static.
        opening, carry, q, k, v, gates, cuts: as there.
        kept: the carry before each span but the first, or None.
        dy: of y.
        dlast: of the last (start, now, momentum), `[b h x y]`.

    Returns:
        Gradients by what documents begin with (`[b h x y]`, of each row; None if it is), by the
        carry, and by q, k, v and gates.
    """
    span = lambda i, j: form.spans - 1 - i
    block = lambda i, j: (form.spans - 1 - i) * form.span + form.span - 1 - j
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
    dcarry = structs(carry)
    results = (None if opening is None else dcarry[1:], dcarry, structs((q, k, v)), structs(gates))
    result_specs = (
        state_specs(form, results[0], once=False),
        state_specs(form, dcarry, once=False),
        tuple(tokens_spec(form, x, block) for x in (q, k, v)),
        gates_spec(form, span, form.span),
    )
    here = lambda x, *n: pltpu.VMEM((*n, form.heads, *x.shape[2:]), x.dtype)
    scratch = [jax.tree.map(lambda x: here(x, form.span), carry)]
    if not form.aligned:
        scratch.append(jax.tree.map(lambda x: here(x, 1), carry))
    given, tree = jax.tree.flatten(inputs)
    taken, result_tree = jax.tree.flatten(results)
    places, scratch_tree = jax.tree.flatten(tuple(scratch))
    body = functools.partial(_body, form, (tree, result_tree, scratch_tree))
    found = kernel_call(
        body,
        name="neural_memory_backward",
        config=form.config,
        grid=(form.b, form.groups, form.spans, form.span),
        in_specs=jax.tree.leaves(specs),
        out_specs=jax.tree.leaves(result_specs),
        out_shape=taken,
        scratch_shapes=places,
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        cost=estimate(form, inputs, results, backward=True),
    )(*given)
    return jax.tree.unflatten(result_tree, found)


def _body(form: Layout, trees, *refs):
    split = []
    for tree in trees:
        split.append(jax.tree.unflatten(tree, refs[: tree.num_leaves]))
        refs = refs[tree.num_leaves :]
    (q, k, v, gates, cuts, opening, carry, kept, dy, dlast), results, (starts, *work) = split
    dopening, dcarry, dtokens, dgates = results
    i, j = pl.program_id(2), pl.program_id(3)
    first = (form.spans - 1 - i) * form.span
    x = form.span - 1 - j  # the block's number in its span

    def tokens_of(g, x, q=None):
        rows = pl.ds(pl.multiple_of(x * form.block, form.block), form.block)
        return tokens_at(form, q, k[0, rows, :], v[0, rows, :], gates, g, x)

    @pl.when((i == 0) & (j == 0))
    def _():
        put(dcarry, get(dlast[1:] if form.aligned else dlast, ...), ...)
        put(dopening, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), dopening), ...)

    def ahead(refs, at, x, g, parts):
        """Writes some parts of a block into the carry at a place."""

        def part(s, _):
            before, mine = begun(cuts.tokens[0, x], s, get(opening, g), get(refs, at, g))
            after = write(form.how, form.narrow, *before, tokens_of(g, x), mine)
            put(refs, (before[0], *after), at, g)
            return 0

        jax.lax.fori_loop(0, parts, part, 0)

    def again(at, _):
        x, g = at // form.heads, at % form.heads
        before = get(starts, x, g)
        if form.aligned:
            now, momentum = before
            mine = mine_of(form, first + x)
            after = write(form.how, form.narrow, now, now, momentum, tokens_of(g, x), mine)
            put(starts, after, x + 1, g)
        else:
            put(starts, before, x + 1, g)
            ahead(starts, x + 1, x, g, cuts.parts[0, 0, first + x])
        return 0

    @pl.when(j == 0)
    def _():
        if kept is not None:
            put(starts, get(kept, 0, 0), 0)
            pl.when(i == form.spans - 1)(lambda: put(starts, get(carry, 0), 0))
        else:
            put(starts, get(carry, 0), 0)
        jax.lax.fori_loop(0, (form.span - 1) * form.heads, again, 0)

    def put_tokens(g, found, *, add):
        for ref, d in zip(dtokens, found[:3], strict=True):
            put_head(ref, d, g, form.heads, add=add)
        for row, d in enumerate(found[3:]):
            at = (0, g, x, pl.ds(row, 1), slice(None))
            dgates[at] = dgates[at] + d if add else d

    def pull(rule, before, cotangents):
        """Gradients by what a block or part begins with, and by its tokens."""
        return jax.vjp(rule, *before)[1](cotangents)

    def head(g, _):
        tokens = tokens_of(g, x, q[0])
        dfound = head_of(dy[0], g, form.heads)
        if form.aligned:
            mine = mine_of(form, first + x)
            rule = lambda now, momentum, tokens: read_and_write(
                form.how, form.narrow, now, now, momentum, tokens, mine
            )
            cotangents = (*get(dcarry, 0, g), dfound)
            *dbefore, found = pull(rule, (*get(starts, x, g), tokens), cotangents)
            put(dcarry, tuple(dbefore), 0, g)
            put_tokens(g, found, add=False)
            return 0

        put_tokens(g, jax.tree.map(jnp.zeros_like, tokens), add=False)
        n = cuts.parts[0, 0, first + x]
        (now_,) = work

        def part(number, _):
            s = n - 1 - number
            put(now_, get(starts, x, g), 0, g)
            ahead(now_, 0, x, g, s)

            def rule(opening, carry, tokens):
                before, mine = begun(cuts.tokens[0, x], s, opening, carry)
                *after, found = read_and_write(form.how, form.narrow, *before, tokens, mine)
                return (before[0], *after), found

            dopened, dbefore, found = pull(
                rule, (get(opening, g), get(now_, 0, g), tokens), (get(dcarry, 0, g), dfound)
            )
            put(dopening, jax.tree.map(jnp.add, get(dopening, 0, g), dopened), 0, g)
            put(dcarry, dbefore, 0, g)
            put_tokens(g, found, add=True)
            return 0

        jax.lax.fori_loop(0, n, part, 0)
        return 0

    jax.lax.fori_loop(0, form.heads, head, 0)
    if form.aligned:  # the start of the last chunk is the weights before it

        @pl.when(first + x == form.last)
        def _():
            put(dcarry[0], jax.tree.map(jnp.add, get(dcarry[0], ...), get(dlast[0], ...)), ...)
