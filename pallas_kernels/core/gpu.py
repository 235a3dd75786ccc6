"""What every Mosaic GPU kernel shares: the call itself, devices and their limits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.config import Config

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # type: ignore[attr-defined]
except ImportError:  # jax 0.10 has it, under a private name
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

WARPGROUP = 128  # threads that work as one
SHARED_MEMORY = 232_448  # bytes that a block may have on Hopper
REGISTERS = 255  # per thread, at most
HIDDEN_ZERO = "hidden_zero"  # name of a scope
MOST_BLOCKS = 65_535  # along every axis of CUDA's grid but x, which ends at 2**31 - 1
# Those with wgmma, by jax's device kind. Blackwell has another matrix unit.
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig(Config):
    """What the configuration of every GPU kernel has: nothing yet of its own."""


def kernel_call(
    body: Callable,
    *,
    name: str,
    config: GpuConfig,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Sequence[Any] | dict[str, Any] = (),
    num_threads: int | None = None,
    thread_name: str | None = None,
    cluster: tuple[int, ...] = (),
    cluster_names: tuple[str, ...] = (),
    semantics: plgpu.LoweringSemantics = plgpu.LoweringSemantics.Warpgroup,
    **compiler_params: Any,
) -> Callable:
    """`plgpu.kernel` with semantics that are named (jax's default changed in 0.11), or by
    interpretation as the config says.

    In the body: `jax.lax.axis_index(grid name)`. Read references by `ref[...]`, never by
    plgpu.load; write results from shared memory by hand, for the interpreter knows no other way.

    Args:
        body: the kernel, a fresh partial or closure for each call; its references are the
            arguments, the results, the scratch.
        name: in profiles and dumps, "<op>_forward", "<op>_backward", ...
        config: of the form.
        out_type: jax.ShapeDtypeStructs of the results.
        grid: blocks of threads. The last axis goes by first, unless another one is too long for
            any place but that.
        grid_names: names of its axes.
        scratch_types: plgpu.SMEM(...), plgpu.Barrier(...), ...
        num_threads: warpgroups of a block; None = 1.
        thread_name: name of their axis.
        cluster: blocks that share what lies in their shared memory.
        cluster_names: names of its axes.
        semantics: Warpgroup, where the compiler searches for layouts, or, for bodies too large for
            that search, Lane, where every layout follows from those named in the body.
        **compiler_params: more of plgpu.CompilerParams.
    """
    body = _named(body, name)
    grid, grid_names = startable(grid, grid_names)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name=thread_name,
        cluster=cluster,
        cluster_names=cluster_names,
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, **compiler_params),
        interpret=_interpreter(config.interpret),
    )


def startable(
    grid: tuple[int, ...], names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """A grid and its names in an order in which CUDA starts it: theirs, if it does.

    jax puts the last axis to x, the one before to y, and all others together to z. More blocks than
    a place has are found when the kernel is started, not when it is compiled.

    Raises:
        ValueError: there is no such order.
    """
    if _starts(grid):
        return grid, names
    order = sorted(range(len(grid)), key=grid.__getitem__)
    sizes, ordered = tuple(grid[i] for i in order), tuple(names[i] for i in order)
    if not _starts(sizes):
        sizes_of = ", ".join(f"{name} {size:,}" for name, size in zip(names, grid, strict=True))
        raise ValueError(
            f"the grid has {sizes_of}; beside its longest axis a GPU counts to {MOST_BLOCKS:,}. "
            "Fewer rows of the batch at a time help, or implementation='xla'"
        )
    return sizes, ordered


def _starts(grid: tuple[int, ...]) -> bool:
    return all(math.prod(part) <= MOST_BLOCKS for part in (grid[-2:-1], grid[:-2]))


def hidden_zero(x: jax.Array) -> jax.Array:
    """A floating 0 that was read, as a whole number: the compiler does not know that it is 0.

    What hangs on it is found where it is wanted, rather than before a loop, and then spilled. Who
    follows copies in a traced body (core/touches.py) knows it by the name of the scope.
    """
    with jax.named_scope(HIDDEN_ZERO):
        return x.astype(jnp.int32)


def _named(body: Callable, name: str) -> Callable:
    """Profiles and dumps take the name from the function."""

    def call(*refs, **named):
        return body(*refs, **named)

    call.__name__ = call.__qualname__ = name
    return call


def _interpreter(interpret: bool | str) -> Any:
    if not interpret:
        return None
    return InterpretGPUParams(detect_races=interpret == "races")


def refuses_device(device_kind: str) -> str | None:
    """The reason against a device: these kernels are for Hopper."""
    if device_kind.startswith(HOPPER):
        return None
    return f"it is written for Hopper (H100, H200) and the device is a {device_kind}"


def refuses_dtypes(shapes: Any) -> str | None:
    """The reason against arrays that no GPU kernel of ours takes: float64 and float16."""
    for one in jax.tree.leaves(shapes):
        if one.dtype in (jnp.float64, jnp.float16):
            return f"an argument is {one.dtype}; GPU kernels take float32 and bfloat16"
    return None
