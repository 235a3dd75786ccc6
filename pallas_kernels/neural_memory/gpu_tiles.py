"""Tiles and vectors as the GPU kernels of neural_memory trace them.

Every matrix is 64 x 64 and every vector a column `[64 1]` or a row `[1 64]`, filled up with zeros.
A number is a row that repeats it. Two operations are not JAX's: `turned` and `across`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from pallas_kernels.neural_memory.tpu_products import product

SIZE = 64
dot = functools.partial(product, narrow=False)


def indices():
    t = jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 0)
    return t, jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 1)


def wide(x):
    """A vector along the other axis."""
    return jnp.broadcast_to(x, (SIZE, SIZE))


def total(x):
    """The sums of rows, a column."""
    return jnp.sum(x, axis=1, keepdims=True)


def over_tokens(x):
    """The sums of columns, a row."""
    return jnp.sum(x, axis=0, keepdims=True)


def last_row(x):
    return over_tokens(jnp.where(indices()[0] == SIZE - 1, x, 0))


def last(x):
    """The last of a column, as a number."""
    return last_row(wide(x))


_turn_p = Primitive("turn")
_turn_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[::-1], x.dtype))
_turn_p.def_impl(jnp.transpose)


@jax.custom_vjp
def turned(x):
    """A row as a column, or a column as a row: the same numbers in memory."""
    return _turn_p.bind(x)


turned.defvjp(lambda x: (turned(x), None), lambda _, d: (turned(d),))


# --- Sums over the blocks of a cluster -----------------------------------------------------------

_across_p = Primitive("across")
_across_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
_across_p.def_impl(lambda x: x)  # of one block


@jax.custom_vjp
def _across(x):
    return _across_p.bind(x)


# Each block has a share of what depends on the sum, so its gradient is a sum as well.
_across.defvjp(lambda x: (_across(x), None), lambda _, d: (_across(d),))


def across(blocks: int, x):
    """The sum over the blocks that share the hidden units."""
    return x if blocks == 1 else _across(x)
