"""`python -m pallas_kernels.check_tpu`: compiles every kernel for TPUs that need not be there.

Exit codes: 0 all is well, 1 something does not compile or got worse than the committed table, 2 a
bad argument, 3 libtpu is not installed.
"""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from pallas_kernels.core import kernel_command, kernel_report, kernel_table
from pallas_kernels.core.kernel_table import Row

EPILOG = """examples:
  python -m pallas_kernels.check_tpu                         one call per operator, v5e and TPU7x
  python -m pallas_kernels.check_tpu --full                  every call, v5e, v5p, v6e and TPU7x
  python -m pallas_kernels.check_tpu selective_scan gla --full --devices v5e
  python -m pallas_kernels.check_tpu --check                 breaks where a figure got worse
  python -m pallas_kernels.check_tpu --full --write          writes docs/kernels.csv and kernels.md

libtpu must be importable, and need not be in the environment: `make check-tpu` keeps it in build/
and puts it on PYTHONPATH for this command alone. Nothing is run on a device, so nothing here is a
speed: docs/kernels.md says what each column is.
"""

COMMAND = kernel_command.Command(
    module="pallas_kernels.check_tpu",
    form="pallas_tpu",
    description="Compiles the TPU kernels at the shapes of real models, without a TPU.",
    epilog=EPILOG,
    devices=("v5e", "v5p", "v6e", "tpu7x"),
    quick=("v5e", "tpu7x"),
    whole=("v5e", "v5p", "v6e", "tpu7x"),
    documents=("v5e",),
    row=Row,
    table=pathlib.Path(kernel_table.PATH),
    page=kernel_report.write,
    line=kernel_report.line,
    goals=kernel_report.beside_the_goals,
)


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, reports; gives the exit code."""
    args = kernel_command.parser(COMMAND).parse_args(arguments)
    if importlib.util.find_spec("libtpu") is None:
        print(
            "check-tpu: libtpu is not installed, so NO KERNEL WAS COMPILED FOR A TPU. "
            "`make check-tpu` installs it into build/.",
            file=sys.stderr,
        )
        return 3
    if args.worker:
        return kernel_command.work(args, lambda op, dumps: check(op, args, dumps))
    return kernel_command.run(COMMAND, args)


def operators() -> list[str]:
    """The names of the operators, without importing jax."""
    return kernel_command.operators(COMMAND)


def check(op: Any, args: argparse.Namespace, dumps: pathlib.Path) -> Iterator[Row | str]:
    """The rows of an operator, and what is done next."""
    from pallas_kernels.core import aot  # what libtpu reads must be set before it is loaded

    aot.prepare(dumps)
    from pallas_kernels.core import kernel_check

    if not kernel_check.has_kernel(op):
        return
    stack = aot.stack()
    specs = kernel_check.specs_of(op, primary=not args.full)
    if not specs:
        text = "it has a kernel, and arg_specs.py has no call tagged 'tpu' and 'primary'"
        yield Row(stack, op.__name__, "-", "", "-", "-", text)
    for spec in specs:
        for name in COMMAND.chosen(args):
            yield f"{spec.name} on {name}"
            yield from kernel_check.check(
                op,
                spec,
                aot.tpu_device(name),
                stack=stack,
                target=kernel_check.TPU,
                # The quick check asks only what can get worse; the portable form is slow to
                # compile.
                xla=name == "v5e" and args.full,
                documents="primary" in spec.tags and (name in COMMAND.documents or args.full),
                dumps=dumps,
            )


if __name__ == "__main__":
    sys.exit(main())
