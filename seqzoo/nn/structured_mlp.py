"""Channel mixers of structured matrices: block-diagonal ones, and Monarch matrices of order 2."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.monarch_matmul import monarch_matmul
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.param import param
from seqzoo.nn.sharded import sharded


class BlockDiagonalLinear(nnx.Module):
    """y = B x + b with B block-diagonal: block i maps the i-th part of x to the i-th part of y.

    Where n_blocks does not divide a width, x is filled up with zeros and y is cut.

    Args:
        d_in, d_out: widths.
        n_blocks: blocks.
        use_bias: whether there is a b.
        implementation: which implementation of the operator; None = the best.
        dtype: what to compute in; parameters are float32.
        rngs: source of the initial values: uniform within +- 1 / sqrt(inputs of a block), the bias
            within +- 1 / sqrt(d_out).

    Raises:
        ValueError: a setting is out of range.

    Source: `BlockdiagLinear` of HazyResearch/m2.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        n_blocks: int = 4,
        use_bias: bool = False,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        _check(d_in, d_out, n_blocks)
        self.d_in, self.d_out, self.n_blocks = d_in, d_out, n_blocks
        self.implementation, self.dtype = implementation, str(jnp.dtype(dtype))
        self._make_factors(rngs)
        self.bias = _bias(d_out, rngs) if use_bias else None

    def _make_factors(self, rngs: nnx.Rngs) -> None:
        shape = (self.n_blocks, _part(self.d_out, self.n_blocks), _part(self.d_in, self.n_blocks))
        self.weight = _factor(shape, rngs)

    def _factors(self) -> tuple[jax.Array, ...]:
        return (self.weight[...],)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d_in]` (or `[b d_in]`) to as many rows of d_out in `dtype`."""
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), self.d_in).astype(self.dtype)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -self.d_in % self.n_blocks)))
        y = sharded(monarch_matmul, rows, *self._factors(), implementation=self.implementation)
        y = y[..., : self.d_out].reshape(*x.shape[:-1], self.d_out)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class MonarchLinear(BlockDiagonalLinear):
    """y = M x + b with a Monarch matrix M: two block-diagonal factors, a transposition between.

    Both factors have n_blocks blocks, and the widths between them are the smaller of d_in and
    d_out, rounded up to whole blocks: every output depends on every input once a block has as many
    rows as there are blocks. Arguments and initial values as BlockDiagonalLinear's, each factor by
    the inputs of its own blocks.

    Source: `MonarchLinear` of HazyResearch/fly; Dao et al., "Monarch" (arXiv 2204.00595).
    """

    def _make_factors(self, rngs: nnx.Rngs) -> None:
        k = self.n_blocks
        into, out = _part(self.d_in, k), _part(self.d_out, k)
        between = min(into, out)
        self.first = _factor((k, between, into), rngs)
        self.second = _factor((k, out, between), rngs)

    def _factors(self) -> tuple[jax.Array, ...]:
        return self.first[...], self.second[...]


class _GatedMLP(nnx.Module):
    """W_down (gelu(g_1) * g_2) + b with matrices of one kind."""

    def _make(self, linear, d_model: int, d_ff: int | None, **settings):
        d_ff = 4 * d_model if d_ff is None else d_ff
        at_least(1, d_model=d_model, d_ff=d_ff, n_blocks=settings["n_blocks"])
        self.up = linear(d_model, 2 * d_ff, **settings)
        self.down = linear(d_ff, d_model, use_bias=True, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b t d]` (or `[b d]`) to the same."""
        gate, value = jnp.split(self.up(x), 2, axis=-1)
        return self.down(jax.nn.gelu(gate, approximate=False) * value)


class BlockDiagonalMLP(_GatedMLP):
    """The channel mixer of M2-BERT: a GELU-gated MLP whose matrices are block-diagonal.

        g = W_up x;   y = W_down (gelu(g_1) * g_2) + b,     g_1, g_2 the halves of g

    The GELU is the exact one. Each block sees a part of x: with four blocks the first half of x
    makes the gate and the second what is gated, so parts meet in that product alone.

    Args:
        d_model: width of the input and output.
        d_ff: inner width; None = 4 d_model.
        n_blocks: blocks of each matrix.
        implementation: which implementation of the operator; None = the best.
        dtype: what to compute in; parameters are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: `BertGatedLinearUnitMLP` of HazyResearch/m2; Fu et al. (arXiv 2310.12109).

    Differs from source: the residual and the norm behind it are the block's (norm_place=post), and
    so is dropout: on what is added, not before W_down.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        n_blocks: int = 4,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        common = dict(n_blocks=n_blocks, implementation=implementation, dtype=dtype, rngs=rngs)
        self._make(BlockDiagonalLinear, d_model, d_ff, **common)


class MonarchMLP(_GatedMLP):
    """A GELU-gated MLP of Monarch matrices of order 2: every output sees every input.

        g = M_up x;   y = M_down (gelu(g_1) * g_2) + b,     g_1, g_2 the halves of g

    Args:
        d_model: width of the input and output.
        d_ff: inner width; None = 4 d_model.
        n_blocks: blocks of both factors of each matrix.
        implementation: which implementation of the operator; None = the best.
        dtype: what to compute in; parameters are float32.
        rngs: source of the initial values.

    Raises:
        ValueError: a setting is out of range.

    Source: Fu et al., "Monarch Mixer" (arXiv 2310.12109); its released models are block-diagonal.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        n_blocks: int = 4,
        implementation: str | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        common = dict(n_blocks=n_blocks, implementation=implementation, dtype=dtype, rngs=rngs)
        self._make(MonarchLinear, d_model, d_ff, **common)


def _check(d_in: int, d_out: int, n_blocks: int) -> None:
    at_least(1, d_in=d_in, d_out=d_out, n_blocks=n_blocks)
    if n_blocks > min(d_in, d_out):
        raise ValueError(
            f"n_blocks is {n_blocks} and the matrix maps {d_in} channels to {d_out}; "
            "there cannot be more blocks than channels"
        )


def _part(width: int, n_blocks: int) -> int:
    """What one block takes or gives, rounded up."""
    return -(-width // n_blocks)


def _factor(shape: tuple[int, int, int], rngs: nnx.Rngs) -> nnx.Param:
    return param(inits.uniform_values(rngs, shape, shape[2]), axes=(None, "mlp", "embed"))


def _bias(width: int, rngs: nnx.Rngs) -> nnx.Param:
    return param(inits.uniform_values(rngs, (width,), width), axes=(None,), decay=False)
