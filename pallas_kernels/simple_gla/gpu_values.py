"""The loop over values of the gradients' kernels: dy v^T, dy S^T and v dS^T, of a chunk.

A block of threads has 64 columns of the keys to each warpgroup; all go over the values together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import BLOCK, CHUNK, How, Turned


def halves_of(width: int) -> int:
    """Warpgroups of a block of threads, for so many columns of the keys."""
    return 2 if width % (2 * BLOCK) == 0 else 1


def scratch(halves: int) -> dict[str, Any]:
    """What the loop needs of shared memory."""
    return dict(
        values=parts.tile(2, 2, CHUNK, BLOCK),
        states=parts.tile(2, 2, halves, BLOCK, BLOCK),
        loaded=plgpu.Barrier(num_arrivals=2 + 2 * halves, num_barriers=2),
        both=plgpu.Barrier(num_arrivals=halves),
    )


class Values:
    """The loop, for heads one after the other.

    Attributes:
        shared: heads.
    """

    def __init__(self, how: How, arrays: tuple, scratch: dict, at: tuple, half: Any, halves: int):
        """A loop over the values of some heads.

        Args:
            how: what is fixed.
            arrays: dy, v `[b t h v]`, starts, dends `[b h n k v]`.
            scratch: from `scratch`.
            at: row, chunk, first head, number of heads, the first block of columns of the keys.
            half: which warpgroup this is.
            halves: of so many.
        """
        self._how, self._arrays, self._scratch = how, arrays, scratch
        self._row, self._chunk, self._head, self.shared, self._block = at
        self._half, self._halves = half, halves
        self._steps = arrays[0].shape[-1] // BLOCK  # to a head

    def begin(self) -> None:
        """Fetches the first values, by one warpgroup."""
        self._fetch(0)
        if self.shared * self._steps > 1:
            self._fetch(1)

    def sums(self, turn: Any, meanwhile: Callable[[Any], None]) -> tuple[jax.Array, ...]:
        """Of head `turn`: dy v^T, dy S^T, v dS^T `[64 64]`, and of S o dS for each key.

        Args:
            turn: which head.
            meanwhile: called with the number of the step once all are done with the head before.
        """
        slots, half = self._scratch, self._half

        def over_values(add):
            def one(step, by_state):
                at = turn * self._steps + step
                slot = at % 2
                plgpu.barrier_wait(slots["loaded"].at[slot])
                dy, v = (slots["values"].at[slot, i] for i in range(2))
                before, after = (slots["states"].at[slot, i, half] for i in range(2))
                add(0, dy, Turned(v))
                add(1, dy, Turned(before))
                add(2, v, Turned(after))
                products = before[...].astype(jnp.float32) * after[...].astype(jnp.float32)
                parts.products_done(self._how)
                self.together()
                more = at + 2 < self.shared * self._steps
                pl.when((half == 0) & more)(lambda: self._fetch(at + 2))
                meanwhile(step)
                return by_state + jnp.sum(products, axis=1)

            return (parts.loop(self._how, self._steps, one, jnp.zeros((BLOCK,), jnp.float32)),)

        return parts.accumulate(self._how, [(CHUNK, BLOCK)] * 3, over_values)

    def together(self) -> None:
        """Waits for the other half."""
        plgpu.commit_smem()
        if self._halves > 1:
            plgpu.barrier_arrive(self._scratch["both"])
            plgpu.barrier_wait(self._scratch["both"])

    def columns(self, half: Any) -> Any:
        """The first column of the keys of a half."""
        return (self._block + half) * BLOCK

    def _fetch(self, turn: Any) -> None:
        dy, v, starts, dends = self._arrays
        slot, head = turn % 2, self._head + turn // self._steps
        lanes, to = turn % self._steps * BLOCK, self._scratch
        load = lambda source, to: plgpu.copy_gmem_to_smem(
            source, to, self._scratch["loaded"].at[slot]
        )
        for i, ref in enumerate((dy, v)):
            source = parts.tokens_at(ref, self._row, self._chunk, head, lanes, BLOCK)
            load(source, to["values"].at[slot, i])
        for i, ref in enumerate((starts, dends)):
            for n in range(self._halves):
                where = (pl.ds(self.columns(n), BLOCK), pl.ds(lanes, BLOCK))
                load(ref.at[self._row, head, self._chunk, *where], to["states"].at[slot, i, n])
