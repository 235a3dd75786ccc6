"""What a kernel leaves to xla where a stream goes on."""

import jax.numpy as jnp

from pallas_kernels.long_conv.convolution import convolve
from pallas_kernels.long_conv.xla import XlaConfig


def from_state(before, kernel, t: int):
    """What the inputs before this call give to its tokens, `[b t e]`.

    Args:
        before: those inputs, `[b l-1 e]`.
        kernel: `[l e]`.
        t: tokens of this call.
    """
    reach = before.shape[1]
    reached = min(t, reach)
    way = XlaConfig().way(reach, reach, reached)
    z = convolve(way, before, kernel[1:], 1 - reach, reached)
    return jnp.pad(z, ((0, 0), (0, t - reached), (0, 0)))
