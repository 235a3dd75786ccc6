"""Chunks of arrays along time, brought to shared memory while others are worked on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.taylor_attention.gpu_warpgroup import ROWS


def stream_buffers(arrays: Mapping[str, Any], slots: int) -> dict[str, Any]:
    """Scratch for arrays `[b t h n]`, `[b h t]` float32 and `[b t]` int32, by name.

    Args:
        arrays: or their shapes.
        slots: chunks in shared memory at a time.
    """
    shape = lambda x: (slots, ROWS, *x.shape[3:])
    buffers: dict[str, Any] = {
        f"{name}_in": plgpu.SMEM(shape(x), x.dtype) for name, x in arrays.items()
    }
    return buffers | dict(arrived=plgpu.Barrier(num_arrivals=len(arrays), num_barriers=slots))


@dataclasses.dataclass(frozen=True)
class Streams:
    """Those of one head of one row.

    Attributes:
        arrays: in global memory, by name.
        scratch: with what stream_buffers gave.
        row, head: the block's.
        steps: chunks.
        slots: chunks in shared memory at a time.
        backward: whether they come from the last to the first.
    """

    arrays: Mapping[str, Any]
    scratch: Mapping[str, Any]
    row: jax.Array
    head: jax.Array
    steps: int
    slots: int
    backward: bool = False

    def place(self, ref: Any, i: Any) -> Any:
        """The part of an array that chunk number i is."""
        chunk = self.steps - 1 - i if self.backward else i
        here = pl.ds(chunk * ROWS, ROWS)
        if len(ref.shape) == 4:
            return ref.at[self.row, here, self.head]
        if len(ref.shape) == 3:
            return ref.at[self.row, self.head, here]
        return ref.at[self.row, here]

    def fetch(self, i: Any) -> None:
        """Starts to load chunk i; what is in its place must have been read."""
        slot = self._slot(i)
        for name, ref in self.arrays.items():
            plgpu.copy_gmem_to_smem(
                self.place(ref, i),
                self.scratch[f"{name}_in"].at[slot],
                self.scratch["arrived"].at[slot],
            )

    def begin(self) -> None:
        """Starts to load the first chunks."""
        for i in range(min(self.slots, self.steps)):
            self.fetch(i)

    def wait(self, i: jax.Array) -> dict[str, Any]:
        """The buffers of chunk i, loaded."""
        slot = self._slot(i)
        plgpu.barrier_wait(self.scratch["arrived"].at[slot])
        return {name: self.scratch[f"{name}_in"].at[slot] for name in self.arrays}

    def refill(self, i: jax.Array) -> None:
        """Starts to load what comes after chunk i into its place."""

        @pl.when(i + self.slots < self.steps)
        def _():
            self.fetch(i + self.slots)

    def _slot(self, i: Any) -> Any:
        return i % self.slots if isinstance(i, int) else jax.lax.rem(i, jnp.int32(self.slots))
