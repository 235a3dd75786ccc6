"""`python -m pallas_kernels.check_gpu`: compiles every kernel for GPUs that need not be there.

Exit codes: 0 all is well, 1 something does not compile, spills registers, copies within a tile, is
not written, or got worse than the committed table, 2 a bad argument, 3 no CUDA wheels installed.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from pallas_kernels.core import gpu_table, kernel_command, kernel_table
from pallas_kernels.core.gpu_table import GpuRow

EPILOG = """examples:
  python -m pallas_kernels.check_gpu                         one call per operator, H200
  python -m pallas_kernels.check_gpu --full                  every call
  python -m pallas_kernels.check_gpu selective_scan --full   every call of one operator
  python -m pallas_kernels.check_gpu --check                 breaks where a figure got worse
  python -m pallas_kernels.check_gpu --full --write          writes docs/kernels_gpu.csv, kernels.md
  python -m pallas_kernels.check_gpu gla --count             counts the table's bytes anew, no more

No GPU and no driver is needed, but four wheels (jax's CUDA plugin, ptxas, libdevice), which need
not be in the environment: `make check-gpu` keeps them in build/ and puts them on PYTHONPATH for
this command alone. Nothing is run on a device, so nothing here is a speed: docs/kernels.md says
what each column is, `python -m pallas_kernels.gpu_report` measures.
"""

COMMAND = kernel_command.Command(
    module="pallas_kernels.check_gpu",
    form="pallas_gpu",
    description="Compiles the GPU kernels at the shapes of real models, without a GPU.",
    epilog=EPILOG,
    devices=("h100", "h200"),
    # The same machine code as for an H100.
    quick=("h200",),
    whole=("h200",),
    documents=("h100", "h200"),
    row=GpuRow,
    table=pathlib.Path(gpu_table.PATH),
    page=gpu_table.write,
    line=gpu_table.line,
    goals=gpu_table.beside_the_goals,
    wrong=gpu_table.wrong,
)


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, reports; gives the exit code."""
    one = kernel_command.parser(COMMAND)
    one.add_argument("--count", action="store_true", help="the table's bytes anew, uncompiled")
    args = one.parse_args(arguments)
    from pallas_kernels.core import aot_gpu

    missing = aot_gpu.missing()
    if missing:
        print(
            f"check-gpu: {missing} is not installed, so NO KERNEL WAS COMPILED FOR A GPU. "
            "`make check-gpu` installs what is needed into build/.",
            file=sys.stderr,
        )
        return 3
    if args.worker:
        return kernel_command.work(args, lambda op, dumps: check(op, args, dumps))
    return count(args) if args.count else kernel_command.run(COMMAND, args)


def count(args: argparse.Namespace) -> int:
    """Counts what the kernels of the table move anew, and writes it."""
    import jax

    from pallas_kernels import OPERATORS
    from pallas_kernels.core import aot_gpu, gpu_check

    jax.config.update("jax_platforms", "cpu")
    rows, stack = kernel_table.read(args.table, GpuRow), aot_gpu.stack()
    for name in args.names or operators():
        op: Any = OPERATORS[name]
        mine = [r for r in rows if (r.stack, r.operator) == (stack, name)]
        rows = kernel_table.merged(rows, gpu_check.recounted(op, mine), whole=False)
    kernel_table.write(args.table, rows, GpuRow)
    page = args.table.with_name("kernels.md")
    gpu_table.write(page, rows)
    print(f"wrote {args.table} and {page}")
    return 0


def operators() -> list[str]:
    """The names of the operators, without importing jax."""
    return kernel_command.operators(COMMAND)


def check(op: Any, args: argparse.Namespace, dumps: pathlib.Path) -> Iterator[GpuRow | str]:
    """The rows of an operator, and what is done next."""
    from pallas_kernels.core import aot_gpu, gpu_check, kernel_check

    aot_gpu.prepare(dumps)
    stack, name = aot_gpu.stack(), op.__name__
    bare = GpuRow(stack, name, "-", "", "-", "-")
    if not kernel_check.has_kernel(op, gpu_check.KERNEL):
        text = "NOT WRITTEN" if name in gpu_table.SEVEN else "refused"
        yield bare._replace(status=f"{text}: no GPU kernel is written; dispatch takes xla")
        return
    library = getattr(op.forms[gpu_check.KERNEL], "library", None)
    if library:
        yield bare._replace(status=f"refused: it calls {library}, which compiles on the GPU only")
        return
    specs = kernel_check.specs_of(op, primary=not args.full, tags=gpu_check.GPU.tags)
    if not specs:
        text = "it has a kernel, and arg_specs.py has no call tagged 'gpu' or 'tpu', and 'primary'"
        yield bare._replace(status=text)
    for spec in specs:
        for device in COMMAND.chosen(args):
            yield f"{spec.name} on {device}"
            yield from kernel_check.check(
                op,
                spec,
                aot_gpu.gpu_device(device),
                stack=stack,
                target=gpu_check.GPU,
                xla=args.full and "primary" in spec.tags,
                documents="primary" in spec.tags,
                dumps=dumps,
            )


if __name__ == "__main__":
    sys.exit(main())
