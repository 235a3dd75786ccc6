"""What several Mosaic GPU kernels use: functions of vectors, references by name."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import WARPGROUP, GpuConfig


def named(body: Callable[..., None], *names: Iterable[str]) -> Callable[..., None]:
    """A kernel whose body takes dicts of references: arguments, results, scratch, as named."""

    def call(*refs):
        of = iter(refs)
        body(*({name: next(of) for name in some} for some in names))

    return call


def layout_cast(x: jax.Array, layout: Any, config: GpuConfig) -> jax.Array:
    """`plgpu.layout_cast`, which the interpreter does not know and does not need."""
    return x if config.interpret else plgpu.layout_cast(x, layout)


def read(ref: Any, layout: Any, config: GpuConfig) -> jax.Array:
    """What stands there, in a layout, however slowly it comes: `ref[...]` asks for a fast way.

    The way to numbers in memory in a layout of the matrix unit. The interpreter does not know it.
    """
    if config.interpret:
        return ref[...]
    load: Any = plgpu.load  # jax 0.10 wants an index, 0.11 wants none
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return load(ref, *index, layout=layout, optimized=False)


def vectors(*shape: int, dtype: Any = jnp.float32) -> Any:
    """A buffer of shared memory, one number per thread of a warpgroup in its last axis."""
    return plgpu.SMEM((*shape, WARPGROUP), dtype)


def row(ref: Any, *at: Any, config: GpuConfig) -> jax.Array:
    """Numbers of the threads, one each: `ref[at]`, in that layout.

    Named wherever it is known, it need not be searched for, which takes exponential time.
    """
    return layout_cast(ref[at], plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1), config)


def spread(x: jax.Array) -> jax.Array:
    """A scalar for every thread."""
    return lax.broadcast(x, (WARPGROUP,))


def only(there: jax.Array | None, x: jax.Array) -> jax.Array:
    """0 where `there` is false, whatever stands there; None = everything stays."""
    return x if there is None else lax.select(there, x, jnp.zeros_like(x))


def each(count: Any, do: Callable[[Any], None]) -> None:
    """Does something for 0 ... count - 1, in a loop; count may be known only when it runs."""

    def one(i, carry):
        do(i)
        return carry

    lax.fori_loop(0, count, one, None)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x for x > 0, to the last digit but one: Newton's step after the unit's rough guess."""
    r = lax.rsqrt(x)
    r = r * r
    return r * (2 - x * r)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), to the last digits wherever x lies."""
    q = jnp.exp(-jnp.abs(x))
    r = reciprocal(1 + q)
    return lax.select(x > 0, r, q * r)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) by the series of numerics.softplus: log1p is not there."""
    q = jnp.exp(-jnp.abs(x))
    s = q * reciprocal(2 + q)
    w = s * s
    series = 1 / 13 + w * (1 / 15)
    for k in range(5, -1, -1):
        series = series * w + 1 / (2 * k + 1)
    return lax.max(x, jnp.zeros_like(x)) + 2 * s * series


# --- Products on the matrix unit ------------------------------------------------------------------


def tiles(swizzle: int = 128, itemsize: int = 2) -> tuple[Any, ...]:
    """Transforms of an operand of wgmma in shared memory: tiles of 8 rows and `swizzle` bytes.

    Both operands of a product have the same swizzle, 32, 64 or 128. With one in registers, the sum
    takes swizzle / itemsize numbers at a time.
    """
    tile = (8, swizzle // itemsize)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)


def multiply(
    acc: Any, a: Any, b: Any, config: GpuConfig, *, turn_a: bool = False, turn_b: bool = False
) -> None:
    """Begins acc += a b on the matrix unit; each of them may lie turned round.

    Args:
        acc: an accumulator `[m n]`, see plgpu.ACC.
        a: `[m k]` (`[k m]` with turn_a), a reference in shared memory, or a value.
        b: `[k n]` (`[n k]` with turn_b), a reference in shared memory.
        config: of the form. The interpreter knows neither turned references nor operands in
            registers: there both are copied first.
        turn_a: a is a reference that lies turned round.
        turn_b: b lies turned round.
    """
    if not config.interpret:
        a = plgpu.transpose_ref(a, (1, 0)) if turn_a else a
        plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if turn_b else b)
        return
    left = a[...].T if turn_a else a[...]
    right = b[...].T if turn_b else b[...]

    def product(a_s, b_s):
        a_s[...], b_s[...] = left, right
        plgpu.wgmma(acc, a_s, b_s)

    pl.run_scoped(product, *(plgpu.SMEM(x.shape, x.dtype) for x in (left, right)))
