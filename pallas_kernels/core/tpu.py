"""What every Mosaic TPU kernel shares: the call itself, generations and their limits, padding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.config import Config

LANES = 128  # numbers side by side in a register
SUBLANES = 8  # float32 rows of a register; bfloat16 packs 16
MIB = 1024 * 1024


class Generation(NamedTuple):
    """What a kernel must know of a TPU generation.

    Attributes:
        name: as topologies are named, "v5e".
        scoped_vmem: bytes that a kernel may take of the vector memory unless it asks for more.
        vmem: bytes of the vector memory.
        mxu: rows and columns of a matrix unit.
    """

    name: str
    scoped_vmem: int
    vmem: int
    mxu: int


# By jax's device kind. The scoped limits are XLA's defaults.
GENERATIONS = {
    "TPU v4": Generation("v4", 16 * MIB, 128 * MIB, 128),
    "TPU v5 lite": Generation("v5e", 16 * MIB, 128 * MIB, 128),
    "TPU v5": Generation("v5p", 16 * MIB, 128 * MIB, 128),
    "TPU v6 lite": Generation("v6e", 32 * MIB, 128 * MIB, 256),
    "TPU7x": Generation("tpu7x", 32 * MIB, 64 * MIB, 256),
}


def generation(device_kind: str | None) -> Generation:
    """The generation of a device kind; of one that is not known, the smallest limits."""
    return GENERATIONS.get(device_kind or "", GENERATIONS["TPU v5 lite"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig(Config):
    """What the configuration of every TPU kernel has.

    Attributes:
        vmem_limit_bytes: raises the limit on vector memory; None = the generation's default.
    """

    vmem_limit_bytes: int | None = None


def kernel_call(
    body: Callable,
    *,
    name: str,
    config: TpuConfig,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    semantics: Sequence[Any],
    scratch_shapes: Sequence[Any] = (),
    cost: pl.CostEstimate | None = None,
    num_scalar_prefetch: int = 0,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable:
    """`pl.pallas_call` for a TPU, or by interpretation as the config says.

    Never read `pl.num_programs` in a body: jax 0.11 caches it across grids and then computes wrong
    numbers silently. Bind step counts with functools.partial, fresh for each call.

    Args:
        body: the kernel, a fresh partial or closure for each call.
        name: in profiles and compiled text, "<op>_forward", "<op>_backward", ...
        config: of the form.
        grid: steps; the last axis runs fastest.
        in_specs: one BlockSpec per array that is not prefetched.
        out_specs: BlockSpecs of the results.
        out_shape: jax.ShapeDtypeStructs of the results.
        semantics: per grid axis, "parallel" or "arbitrary" (steps in order, scratch carried).
        scratch_shapes: pltpu.VMEM((...), dtype), ...
        cost: what XLA's scheduler may assume.
        num_scalar_prefetch: how many leading arguments are int32 arrays that index maps read.
        input_output_aliases: arguments whose memory results take.
    """
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=num_scalar_prefetch,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=out_specs,
        scratch_shapes=list(scratch_shapes),
    )
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=config.vmem_limit_bytes
        ),
        cost_estimate=cost,
        name=name,
        interpret=interpreter(config.interpret),
        input_output_aliases=input_output_aliases or {},
    )


def interpreter(interpret: bool | str) -> Any:
    """What `pl.pallas_call` takes for a config's `interpret`."""
    if interpret == "races":
        return pltpu.InterpretParams(
            detect_races=True,
            uninitialized_memory="nan",
            out_of_bounds_reads="raise",
            random_seed=1,
        )
    return bool(interpret)


def refuses_dtypes(shapes: Any) -> str | None:
    """The reason against arrays that no TPU kernel of ours takes: float64 and float16."""
    for one in jax.tree.leaves(shapes):
        if one.dtype in (jnp.float64, jnp.float16):
            return f"an argument is {one.dtype}; TPU kernels take float32 and bfloat16"
    return None


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller than size."""
    return -(-size // multiple) * multiple


def pad_to(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """x with `value` behind it along an axis, up to size; x itself where it has that size."""
    extra = size - x.shape[axis]
    if extra == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths, constant_values=value)
