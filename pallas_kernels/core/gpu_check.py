"""How the rows of GPU kernels are filled (core/kernel_check.py compiles and counts)."""

import math

from pallas_kernels.core import aot_gpu, cubin
from pallas_kernels.core.blocks import Kernel
from pallas_kernels.core.gpu_table import GpuRow
from pallas_kernels.core.kernel_check import Target
from pallas_kernels.core.kernel_table import COMPILED

KERNEL = "pallas_gpu"
_NAMES = {str(one["name"]): name for name, one in aot_gpu.DEVICES.items()}


def _blank(stack: str, operator: str, call: str, dtype: str, kind: str) -> GpuRow:
    return GpuRow(stack, operator, call, dtype, _NAMES[kind], "")


def _filled(
    row: GpuRow, kernels: tuple[cubin.Code, ...], counted: tuple[Kernel, ...], kind: str
) -> list[GpuRow]:
    """The pass, and a row for each kernel by name."""
    del kind
    names = {k.name for k in counted}
    kernels = tuple(k for k in kernels if not names or k.name in names)
    bare = GpuRow(*row[:6], status=COMPILED)
    rows = []
    for name in dict.fromkeys(k.name for k in kernels):
        mine = [k for k in kernels if k.name == name]
        moved = [k for k in counted if k.name == name]
        rows.append(
            _code(bare, mine)._replace(
                kernel=name,
                calls=len(mine),
                bytes=int(sum(k.bytes for k in moved)) if moved else None,
                blocks=max(math.prod(k.grid) for k in moved) if moved else None,
            )
        )
    return [_code(row, kernels)._replace(calls=len(kernels)), *rows]


def _code(row: GpuRow, kernels: tuple[cubin.Code, ...] | list[cubin.Code]) -> GpuRow:
    told = [k for k in kernels if k.registers is not None]
    if len(told) < len(kernels):
        return row
    return row._replace(
        registers=max(k.registers for k in told),  # type: ignore[type-var]
        spilled=sum(k.spills or 0 for k in told),
        shared=max(k.shared or 0 for k in told),
        serial=sum(k.serial or 0 for k in told),
    )


GPU = Target(KERNEL, "cuda", frozenset({"tpu", "gpu"}), aot_gpu.compile_for, _blank, _filled)
