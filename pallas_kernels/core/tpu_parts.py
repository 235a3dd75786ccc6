"""Pieces that the bodies of several TPU kernels are made of, and how much memory they may take."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core.tpu import LANES, MIB, generation, round_up

# Of the scoped limit: what blocks and scratch take; the rest is the compiler's.
_SHARE = 0.6
# Of the whole vector memory: what a kernel may raise its limit to.
_MOST = 0.8


def room(device_kind: str | None) -> int:
    """Bytes of blocks and scratch for which no limit has to be raised."""
    return int(_SHARE * generation(device_kind).scoped_vmem)


def most_room(device_kind: str | None, share: float = _SHARE) -> int:
    """Bytes of blocks and scratch that fit under a raised limit.

    Args:
        device_kind: jax's name of the device.
        share: of the limit that they take.
    """
    return int(share * _MOST * generation(device_kind).vmem)


def limit_for(need: int, device_kind: str | None, share: float = _SHARE) -> int | None:
    """The limit that a kernel with so many bytes of blocks and scratch asks for; None = default.

    Args:
        need: bytes.
        device_kind: jax's name of the device.
        share: of the limit that they take.
    """
    if need <= share * generation(device_kind).scoped_vmem:
        return None
    most = int(_MOST * generation(device_kind).vmem)
    return min(round_up(int(need / share), 4 * MIB), most)


def dot(x: jax.Array, y: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
    """A matrix product in float32: of bfloat16 as it is, of float32 in full precision."""
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    (a, b) = contracted
    return jax.lax.dot_general(
        x, y, (((a,), (b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def rows_below(x: jax.Array, count: jax.Array | int, fill: float = 0) -> jax.Array:
    """x with `fill` in the rows from `count` on."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, x, fill)


def part_of(size: int, most: int) -> int:
    """The largest part of whole registers, at most so long, that a size is cut into; else all."""
    fit = [n for n in range(LANES, most + 1, LANES) if size % n == 0]
    return max(fit, default=size)


def each(size: int, part: int, body: Callable) -> None:
    """Runs body(first) for every part of an axis; a loop, so that the program stays short."""
    if size == part:
        body(0)
        return

    def step(i, carry):
        body(pl.multiple_of(i * part, part))
        return carry

    jax.lax.fori_loop(0, size // part, step, 0)


class Refs:
    """The references that a body is given, taken in their order."""

    def __init__(self, refs: Sequence[Any]):
        self._refs = list(refs)

    def take(self, there: bool = True) -> Any:
        """The next one; None if it is not there."""
        return self._refs.pop(0) if there else None

    def several(self, count: int) -> list[Any]:
        """The next ones."""
        return [self._refs.pop(0) for _ in range(count)]
