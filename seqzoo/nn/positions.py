"""Learned absolute positions, added to embeddings: a table with a row per place in a document."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core.segments import boundaries
from seqzoo.nn import inits
from seqzoo.nn.checks import at_least
from seqzoo.nn.param import param
from seqzoo.nn.rotary import count_positions


class PositionState(NamedTuple):
    """Where a stream stands.

    Attributes:
        count: int32 `[b]`, tokens read of the current document.
        last_id: int32 `[b]`, its segment id; 0 = none yet, or not tracked.
    """

    count: jax.Array
    last_id: jax.Array


class LearnedPositions(nnx.Module):
    """p_t = table[tokens since the start of the document].

    Args:
        d_model: width of a row.
        max_positions: rows: the longest document.
        rngs: source of the initial values: normal, standard deviation 0.02.

    Raises:
        ValueError: a setting is out of range.

    Source: Devlin et al., "BERT" (arXiv 1810.04805).
    """

    def __init__(self, d_model: int, *, max_positions: int, rngs: nnx.Rngs):
        at_least(1, max_positions=max_positions)
        self.max_positions = max_positions
        values = inits.normal(std=0.02)(rngs.params(), (max_positions, d_model), jnp.float32)
        self.embedding = param(values, axes=(None, "embed"))

    def __call__(
        self, t: int, *, segment_ids: jax.Array | None, state: PositionState | None, batch: int
    ) -> tuple[jax.Array, PositionState]:
        """Rows for t new tokens.

        Args:
            t: tokens.
            segment_ids: int32 `[b t]`, 0 = padding (it gets the first row); None = one document.
            state: where the stream stopped; None = at its start.
            batch: sequences (b).

        Returns:
            `[b t d]` float32, and the state after the last token. A place behind the last row gives
            NaN; streams and documents among others in a row can reach one.

        Raises:
            ValueError: a row of one document is longer than the table.
        """
        if t > self.max_positions and segment_ids is None:
            raise ValueError(
                f"a row of {t} tokens has more places than model.max_positions="
                f"{self.max_positions}; raise it (the table is trained) or shorten data.seq_len"
            )
        state = self.init_state(batch) if state is None else state
        place, count = count_positions(segment_ids, state.count, state.last_id, t)
        last_id = state.last_id
        if segment_ids is not None:
            _, valid, last_id = boundaries(segment_ids, last_id)
            place = jnp.where(valid, place, 0)
        return self._rows(place), PositionState(count, last_id)

    def step(self, state: PositionState) -> tuple[jax.Array, PositionState]:
        """The row `[b d]` of one more token."""
        return self._rows(state.count), state._replace(count=state.count + 1)

    def init_state(self, batch_size: int) -> PositionState:
        """Before the first token."""
        count, last_id = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return PositionState(count, last_id)

    def _rows(self, place):
        return self.embedding[...].at[place].get(mode="fill", fill_value=jnp.nan)
