"""What selective_scan's two GPU kernels share.

One channel per thread: 128 channels are the 128 threads of a block, a vector of 128 numbers is one
register of each. States lie in shared memory as `[n 128]` and are in registers while a group of
tokens passes over them; B and C are scalars that all threads read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu_parts
from pallas_kernels.core.gpu import WARPGROUP
from pallas_kernels.core.gpu_parts import only, sigmoid, softplus, spread

F32 = jnp.float32
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x LOG2_E): the unit for exponentials knows exp2
SLOTS = 2  # buffers in turn: one is worked on while the next arrives
FORGET = -1e30  # added to the exponent where a document begins: the decay is then 0
Refs = dict[str, Any]


class How(NamedTuple):
    """Static settings.

    Attributes:
        softplus: whether delta goes through softplus.
        n: states per channel, padded.
        documents: whether rows of `valid` and `reset` follow B and C.
        chunk: tokens between two states that are kept; those of a step, backward.
        tile: tokens of a step, forward.
        config: PallasGpuConfig.
    """

    softplus: bool
    n: int
    documents: bool
    chunk: int
    tile: int
    config: Any

    @property
    def reduced(self) -> int:
        """Rows that are summed over channels at a time, backward: those of B and C."""
        return 2 * self.config.states_backward * self.config.group_backward

    @property
    def along(self) -> int:
        """Rows of the array that B, C and flags share."""
        return 2 * self.n + 2 * self.documents

    @property
    def valid(self) -> int:
        """The row of 1 where there is a token, 0 at padding."""
        return 2 * self.n

    @property
    def reset(self) -> int:
        """The row of `FORGET` where a document begins, else 0."""
        return 2 * self.n + 1

    @property
    def skip(self) -> int:
        """The row of D, after A log2 e."""
        return self.n

    @property
    def bias(self) -> int:
        """The row of delta_bias."""
        return self.n + 1


def row(how: How, ref: Any, *at: Any) -> jax.Array:
    """Numbers of the threads."""
    return gpu_parts.row(ref, *at, config=how.config)


class Token(NamedTuple):
    """A token's numbers for the channel of each thread.

    Attributes:
        d: step size.
        u: input.
        there: where there is a token; None = everywhere.
    """

    d: jax.Array
    u: jax.Array
    there: jax.Array | None


def before_softplus(own: Refs, slot: Any, t: Any, how: How) -> jax.Array:
    """delta + delta_bias."""
    return row(how, own["delta"], slot, t).astype(F32) + row(how, own["channels"], how.bias)


def there(own: Refs, slot: Any, t: Any, how: How) -> jax.Array | None:
    """Where token t of a step is one, not padding; None = everywhere."""
    return spread(own["along"][slot, how.valid, t]) > 0 if how.documents else None


def step_size(own: Refs, slot: Any, t: Any, there: jax.Array | None, how: How) -> jax.Array:
    """The step size of token t; 0 at padding, which leaves the state as it is."""
    x = before_softplus(own, slot, t, how)
    return only(there, softplus(x) if how.softplus else x)


def token(own: Refs, slot: Any, t: Any, how: How) -> Token:
    """What every kernel needs of token t of a step."""
    valid = there(own, slot, t, how)
    d = step_size(own, slot, t, valid, how)
    return Token(d, only(valid, row(how, own["u"], slot, t).astype(F32)), valid)


def forgets(own: Refs, slot: Any, first: Any, group: int, how: How) -> list:
    """What is added to the exponents of decays: `FORGET` where a document begins, else 0.

    None where there are no documents.
    """
    if not how.documents:
        return [None] * group
    return scalars(own, slot, how.reset, first, group)


def scalars(own: Refs, slot: Any, line: Any, first: Any, group: int) -> list:
    """A group of tokens of a row of B, C: read together, so that four come at a time."""
    return [own["along"][slot, line, first + g] for g in range(group)]


def decay(d: jax.Array, rates: jax.Array, forget: jax.Array | None) -> jax.Array:
    """exp(d A); rates: A log2 e."""
    x = d * rates
    return jnp.exp2(x if forget is None else x + forget)


class Gradient(NamedTuple):
    """A token's gradient.

    Attributes:
        before_gate: by y before the gate.
        by_gate: of the gate, by y before it: z's gradient is y times that; None = no gate.
    """

    before_gate: jax.Array
    by_gate: jax.Array | None


def gradient(of: Refs, there: jax.Array | None, t: Any, how: How) -> Gradient:
    """The gradient of token t, from its dy and z in `of`."""
    dy = only(there, row(how, of["dy"], t).astype(F32))
    if "z" not in of:
        return Gradient(dy, None)
    z = only(there, row(how, of["z"], t).astype(F32))
    gate = sigmoid(z)
    return Gradient(dy * z * gate, dy * gate * (1 + z * (1 - gate)))


def loads(ins: Refs, own: Refs, names: tuple[str, ...], at: tuple, slot: Any, arrived: Any) -> None:
    """Begins to fetch tokens of some arrays, and of B and C, into a slot.

    Args:
        ins: arrays in global memory.
        own: buffers in shared memory.
        names: which have channels.
        at: row, tokens, channels.
        slot: of the buffers.
        arrived: barrier, `len(names) + 1` arrivals.
    """
    row, time, here = at
    for name in names:
        plgpu.copy_gmem_to_smem(ins[name].at[row, time, here], own[name].at[slot], arrived)
    plgpu.copy_gmem_to_smem(ins["along"].at[row, :, time], own["along"].at[slot], arrived)


def place() -> tuple[Any, Any]:
    """The row of this block, and its channels."""
    channels = pl.ds(lax.axis_index("blocks") * WARPGROUP, WARPGROUP)
    return lax.axis_index("rows"), channels
