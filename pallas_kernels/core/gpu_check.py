"""How the rows of GPU kernels are filled (core/kernel_check.py compiles and counts)."""

import math
from collections.abc import Callable, Iterable

from pallas_kernels.core import aot_gpu, cubin, kernel_check, second_cache
from pallas_kernels.core.blocks import Kernel
from pallas_kernels.core.gpu_table import GpuRow
from pallas_kernels.core.kernel_check import Target
from pallas_kernels.core.kernel_table import COMPILED, compiles

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
        rows.append(_code(bare, mine)._replace(kernel=name, calls=len(mine)))
    return with_bytes(_code(row, kernels)._replace(calls=len(kernels)), rows, counted)


def with_bytes(row: GpuRow, kernels: Iterable[GpuRow], counted: tuple[Kernel, ...]) -> list[GpuRow]:
    """The row of a pass and those of its kernels, with what the kernels move.

    Args:
        row: with the bytes that XLA moves around them.
        kernels: with registers and shared memory, which tell how many blocks run at once.
        counted: the calls of the pass.
    """
    rows = []
    for one in kernels:
        moved = [k for k in counted if k.name == one.kernel]
        if moved:
            one = one._replace(
                bytes=int(sum(k.bytes for k in moved)),
                hbm=_sum(_through(k, one) for k in moved),
                blocks=max(math.prod(k.grid) for k in moved),
            )
        rows.append(one)
    if counted and row.around is not None:
        known = {one.kernel for one in rows} >= {k.name for k in counted}
        through = _sum(one.hbm for one in rows) if known else None
        row = row._replace(
            bytes=int(sum(k.bytes for k in counted)) + row.around,
            hbm=None if through is None else through + row.around,
        )
    return [row, *rows]


def _through(kernel: Kernel, row: GpuRow) -> int | None:
    """Bytes through device memory of a kernel as often as it runs."""
    found = second_cache.of_call(kernel.body, registers=row.registers, shared=row.shared)
    return None if found is None else kernel.times * found.bytes


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one is not known."""
    total = 0
    for one in counts:
        if one is None:
            return None
        total += one
    return total


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


def recounted(op: Callable, rows: Iterable[GpuRow]) -> list[GpuRow]:
    """Rows of an operator with what its kernels move counted anew; nothing is compiled.

    Args:
        op: the operator.
        rows: of this stack; those of calls that are no more, or not counted, stay as they are.
    """
    rows = list(rows)
    found = {row.key: row for row in rows}
    for spec in kernel_check.specs_of(op, tags=GPU.tags):
        ours = [r for r in rows if r.call == spec.name and compiles(r)]
        for device in sorted({r.device for r in ours}):
            kind = str(aot_gpu.DEVICES[device]["name"])
            for part, one in kernel_check.counted(op, spec, GPU, kind).items():
                mine = [r for r in ours if (r.device, r.part) == (device, part)]
                for whole in (r for r in mine if not r.kernel):
                    whole = whole._replace(minimum=int(one.least), saved=int(one.saved))
                    kernels = [r for r in mine if r.kernel]
                    found |= {r.key: r for r in with_bytes(whole, kernels, one.kernels)}
    return list(found.values())
