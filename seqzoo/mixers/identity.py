"""No mixing at all: what a task gives away to a model that sees each token alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.numerics import state_dtype
from seqzoo.nn.checks import check_call


class IdentityState(NamedTuple):
    """Nothing is kept; one empty array per row, so that states are trees of arrays.

    Attributes:
        empty: `[b 0]` float32.
    """

    empty: jax.Array


class Identity(nnx.Module):
    """y = x. The baseline beside which a mixer shows what it contributes.

    Args:
        d_model: width of the input and output.
        dtype: of the output.
        rngs: unused; there are no parameters.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, d_model: int, *, dtype: str = "float32", rngs: nnx.Rngs):
        if d_model < 1:
            raise ValueError(f"d_model is {d_model}; it must be at least 1")
        self.dtype = str(jnp.dtype(dtype))

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: IdentityState | None = None,
    ) -> tuple[jax.Array, IdentityState]:
        """Returns `[b t d]` as it is (0 at padding), in `dtype`."""
        check_call(x, segment_ids, state, IdentityState)
        y = x.astype(self.dtype)
        if segment_ids is not None:
            y = jnp.where((segment_ids > 0)[..., None], y, 0)
        return y, self.init_state(x.shape[0]) if state is None else state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> IdentityState:
        """An empty state."""
        del max_length
        return IdentityState(jnp.zeros((batch_size, 0), state_dtype(self.dtype)))

    def step(self, x_t: jax.Array, state: IdentityState) -> tuple[jax.Array, IdentityState]:
        """One token `[b d]`."""
        y, state = self(x_t[:, None], state=state)
        return y[:, 0], state

    def state_bytes(self, context_length: int) -> dict[str, int]:
        """Nothing is kept."""
        del context_length
        return {"recurrent": 0, "total": 0}
