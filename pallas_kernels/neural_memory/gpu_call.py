"""What of a call of neural_memory's GPU kernels is static, and what there is room for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.gpu import SHARED_MEMORY, GpuConfig
from pallas_kernels.neural_memory.gpu_chunk import Form, Tokens
from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.memory import Weights

_PART = SIZE * SIZE * 2  # bytes of a part of a tile
_WIDE = SIZE * SIZE * 4
_weights: Any = Weights  # of shapes
GATES = 4  # alpha, eta, theta, what counts


class Cuts(NamedTuple):
    """What is known of the blocks of tokens of rows that are not one document each; int32.

    Attributes:
        begins: 1 where a document begins, `[b n]`.
        count: blocks of each row, `[b]`.
    """

    begins: Any
    count: Any


class Call(NamedTuple):
    """What of a call is static; sizes are those of the arrays that the kernels get.

    Attributes:
        form: of what is traced.
        config: of the kernels.
        b, h: rows, heads.
        n: blocks of tokens, of 64 each; or windows of a row for which there is room.
        narrow: whether q, k and v are bfloat16.
        mlp, gain: whether there are w_in, gamma.
    """

    form: Form
    config: GpuConfig
    b: int
    h: int
    n: int
    narrow: bool
    mlp: bool
    gain: bool

    @property
    def parts(self) -> int:
        """Of a tile that products read."""
        return 2 if self.narrow else 3

    @property
    def interpret(self) -> bool:
        return bool(self.config.interpret)

    @property
    def weights(self) -> Weights:
        """Of a block, as it is traced."""
        tile = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
        row = jax.ShapeDtypeStruct((1, SIZE), jnp.float32)
        return _weights(tile, tile if self.mlp else None, None, row if self.gain else None)

    @property
    def tokens(self) -> Tokens:
        tile = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
        row = jax.ShapeDtypeStruct((1, SIZE), jnp.float32)
        return Tokens(tile, tile, tile, *[row] * GATES)

    def structs(self, *lead: int) -> Weights:
        """Weights in device memory, of all heads."""
        size = self.form.blocks * SIZE
        new = lambda *shape: jax.ShapeDtypeStruct((*lead, self.h, *shape), jnp.float32)
        return _weights(
            new(SIZE, size),
            new(size, SIZE) if self.mlp else None,
            None,
            new(SIZE) if self.gain else None,
        )

    def room(self, states: int, tokens: int) -> int:
        """Places for tiles of which there can be in shared memory, beside so many tiles of weights
        in three parts, and so many of tokens, which come while those before are at work."""
        taken = (
            states * 3 * _PART
            + self.narrow * 2 * tokens * _PART
            + (18 if self.form.blocks > 1 and states else 24) * 1024
        )
        if self.form.blocks > 1:
            taken += _WIDE * exchanged(states)
        return (SHARED_MEMORY - taken) // (self.parts * _PART)


def exchanged(states: int) -> int:
    """Tiles that the others of a cluster read, in turns: two where there is room beside the
    weights. Who is told of the next one knows that all have read the one before, so that two need
    no word of what was read."""
    return 1 if states else 2
