"""Compiling for TPUs on a machine without one: libtpu's compile-only devices, and what they tell.

    prepare(folder)                       before jax loads libtpu
    device = tpu_device("v5e")
    found = compile_for(device, function, *shapes, dumps=folder)

What is compiled can be read, not run. XLA's habit of keeping whole arrays in vector memory is
switched off: then every operand of a kernel comes from HBM through its own windows, as arrays of a
real model do, and the figures do not hang on what happens to fit beside it.
"""

import importlib.metadata
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from pallas_kernels.core import dispatch, hlo, schedule

# By generation, the smallest topology of which libtpu lists devices.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

_OPTIONS = {  # v5e and v5p; v6e and TPU7x
    "xla_vf_vmem_memory_space_assignment": "false",
    "xla_gf_vmem_memory_space_assignment": "false",
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # never ask the cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or two processes fight for a lock file
    "TPU_LOG_DIR": "disabled",
}


class Compiled(NamedTuple):
    """What compiling told.

    Attributes:
        kernels: one per Pallas call in the program.
        vmem: bytes of vector memory that the largest of them takes.
        temp: bytes of HBM for temporaries.
        peak: bytes of HBM at most, arguments and results among them.
        around: bytes that XLA's own passes move.
        seconds: that lowering and compiling took.
        text: of the program.
    """

    kernels: tuple[schedule.Code, ...]
    vmem: int
    temp: int
    peak: int
    around: float
    seconds: float
    text: str


def prepare(dumps: pathlib.Path | None = None) -> None:
    """Sets what libtpu reads when it is loaded.

    Args:
        dumps: an empty folder for the schedules of kernels; None = do not write them.
    """
    os.environ.update(_ENVIRONMENT)
    if dumps is not None:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_.*"
        )


def stack() -> str:
    """The versions that figures hang on."""
    return f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"


def tpu_devices(topology: str) -> list:
    """The compile-only devices of a topology, "v5e:2x4"; libtpu must be installed."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def tpu_device(generation: str) -> Any:
    """A compile-only device of a generation of TOPOLOGIES."""
    return tpu_devices(TOPOLOGIES[generation])[0]


def compile_for(
    device: Any, function: Callable, *arguments: Any, dumps: pathlib.Path | None = None
) -> Compiled:
    """Compiles a function for one device; arguments and results lie as the compiler likes best.

    So do those of an operator in a model: the matrix products around it read and write any layout.

    Args:
        device: a compile-only one.
        function: of the arguments.
        *arguments: ShapeDtypeStructs without shardings.
        dumps: the folder that `prepare` was given; what lies in it is deleted.
    """
    anyhow = Format(Layout.AUTO, SingleDeviceSharding(device))
    jitted = jax.jit(function, in_shardings=anyhow, out_shardings=anyhow)
    with dispatch.compiling_for(device.device_kind):
        return compile_lowered(lambda: jitted.lower(*arguments), dumps=dumps)


def compile_lowered(lower: Callable[[], Any], *, dumps: pathlib.Path | None = None) -> Compiled:
    """Compiles what `lower()` gives: the `lower` of a jitted function, say."""
    schedule.clear(dumps)
    began = time.perf_counter()
    compiled = lower().compile(compiler_options=_OPTIONS)
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kernels = tuple(
        schedule.read(dumps, name, hlo.vmem_bytes(line), hlo.vmem_limit(line))
        for name, line in hlo.custom_calls(text)
    )
    schedule.clear(dumps)
    return Compiled(
        kernels,
        max((one.vmem for one in kernels), default=0),
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        hlo.passes_bytes(text),
        seconds,
        text,
    )
