"""What the kernels of neural_memory compute of one head and one block, or a part of one.

Functions of trees of matrices, which tpu_stages.py runs. Beside tokens and weights they take
`marks`: where rows are one document each, which tokens are there (1 or 0, `[1 c]`; None = all);
else a `Part`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.tpu_blocks import Layout
from pallas_kernels.neural_memory.tpu_chunk import Tokens, read_and_write, write


def forward(form: Layout, opening, carry, marks, tokens: Tokens):
    """The carry after the tokens, and y."""
    before, mine = _before(form, opening, carry, marks)
    start, now, momentum = before
    *after, y = read_and_write(form.how, form.narrow, start, now, momentum, tokens, mine)
    return _after(form, before, after), y


def again(form: Layout, opening, carry, marks, tokens: Tokens):
    """The carry after the tokens."""
    before, mine = _before(form, opening, carry, marks)
    start, now, momentum = before
    after = write(form.how, form.narrow, start, now, momentum, tokens, mine)
    return _after(form, before, after)


def backward(form: Layout, opening, carry, marks, tokens: Tokens, dcarry, dy, dopening):
    """Gradients by opening (with what was before: `dopening`), carry and tokens."""
    rule = lambda opening, carry, tokens: forward(form, opening, carry, marks, tokens)
    dopened, dcarry, dtokens = jax.vjp(rule, opening, carry, tokens)[1]((dcarry, dy))
    return jax.tree.map(jnp.add, dopening, dopened), dcarry, dtokens


def _before(form: Layout, opening, carry, marks) -> tuple[tuple, jax.Array | None]:
    """Weights at the chunk's start, now, and momentum, at the first token; which tokens count."""
    if form.aligned:
        return (carry[0], *carry), marks
    start, now, momentum = carry
    mine = jnp.where(marks.part == marks.number, 1.0, 0.0)
    document, chunk = (
        jnp.max(mine * begins, axis=1, keepdims=True) for begins in (marks.documents, marks.chunks)
    )
    now, momentum = _choose(document, opening, (now, momentum))
    return (_choose(chunk, now, start), now, momentum), mine


def _after(form: Layout, before, after) -> Any:
    return tuple(after) if form.aligned else (before[0], *after)


def _choose(flag, a, b):
    """a where the `[1 1]` flag is 1, else b."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(flag, a.shape) > 0, a, b), a, b)
