"""What gla's GPU kernels share: sums of log decays as products with matrices of zeros and ones.

Pairs of tokens are taken by halves of halves (README.md): on level n, blocks of 2^(n+1) tokens, of
a pair across the halves of one. The key decays from its token to the middle, the query from the
middle to its own: each token has one sum per level, of tokens of its half alone. So all sums of a
level are one product, and a gradient by them comes back through the same matrix turned round.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import gpu
from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import BLOCK, CHUNK, How, bfloat16

LEVELS = 6  # of 64 tokens
# Rows of a chunk's marks: its documents by number; whether tokens see the state before, and are
# seen by the state after; zeros.
DOCUMENT, SEES, SEEN, _ZEROS = range(4)
MARKS = 4


def zero_of(marks: Any) -> jax.Array:
    """A zero that has to be read: what hangs on it is not moved out of a loop, and then spilled."""
    return gpu.hidden_zero(marks[_ZEROS, 0])


def one_document(marks: Any) -> jax.Array:
    """`[64 64]`: whether tokens i and j are of one document.

    Read twice, and so that it shows: jax 0.11 makes one value of two equal reads, and one value
    has one layout; it lies along rows or down columns, and a search for one that does both does
    not end.
    """
    return parts.down(marks[DOCUMENT]) == parts.across(marks[zero_of(marks) + DOCUMENT])


def second(n: Any, zero: Any = 0) -> jax.Array:
    """`[64 64]`, by rows: whether token i stands in the second half of its block, as a query."""
    return ((parts.iota(0) + zero) >> n) & 1 == 1


def within(n: Any, zero: Any = 0, *, turned: bool = False) -> jax.Array:
    """`[64 64]`: whether the log decay of token l lies between token i and the middle of its block.

    Args:
        n: level.
        zero: from `zero_of`.
        turned: `[l i]` instead of `[i l]`.
    """
    i, l = parts.iota(int(turned)) + zero, parts.iota(int(not turned)) + zero
    beside = jnp.where((i >> n) & 1 == 1, i - l, l - i - 1) >= 0
    return ((i ^ l) >> n == 0) & beside


def across(n: Any, zero: Any = 0) -> jax.Array:
    """`[64 64]`: whether token i sees token j on level n."""
    i, j = parts.iota(0) + zero, parts.iota(1) + zero
    return ((i ^ j) >> n == 1) & (i > j)


def upto(*, turned: bool = False) -> jax.Array:
    """`[64 64]`: whether the log decay of token l lies between the chunk's start and token i."""
    return parts.iota(int(not turned)) <= parts.iota(int(turned))


def beyond(*, turned: bool = False) -> jax.Array:
    """`[64 64]`: whether the log decay of token l lies between token i and the chunk's end."""
    return parts.iota(int(not turned)) > parts.iota(int(turned))


def summed(how: How, which: jax.Array, refs: Sequence[Any]) -> jax.Array:
    """Sums over tokens of `[64 64]`, float32.

    Args:
        how: what is fixed.
        which: the tokens of each sum, `[64 64]` true or false.
        refs: parts in bfloat16 `[tokens columns]` whose sum is what is summed.
    """
    ones = bfloat16(jnp.where(which, 1.0, 0.0))

    def body(add):
        for ref in refs:
            add(0, ones, ref)

    return parts.accumulate(how, [(CHUNK, BLOCK)], body)[0]
