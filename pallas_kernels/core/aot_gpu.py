"""Compiling for Hopper on a machine without one: jax's compile-only CUDA device, and what it tells.

    prepare(folder)                       before jax starts its first device
    device = gpu_device("h200")
    found = compile_for(device, function, *shapes, dumps=folder)

Needs four wheels and no driver: jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version,
nvidia-cuda-nvcc (ptxas) and nvidia-nvvm (libdevice); `make cuda` puts them into build/. What is
compiled is machine code (an sm_90a cubin) that can be read, not run.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.core import copy_starts, cubin, dispatch, hlo

# What jax needs to know of a device to compile for it: NVIDIA's data sheets. With
# ACCELERATED_FEATURES it is sm_90a, which has the warpgroups' matrix unit.
_TARGET = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
DEVICES = {
    "h100": dict(
        name="NVIDIA H100 80GB HBM3", clock=1.98, bandwidth=3_352_000_000_000, memory=85_045_215_232
    ),
    "h200": dict(
        name="NVIDIA H200", clock=1.98, bandwidth=4_800_000_000_000, memory=151_397_597_184
    ),
}
WHEELS = ("jax_cuda13_plugin", "nvidia.cu13.nvvm")  # importable where all four are installed


class Compiled(NamedTuple):
    """What compiling told.

    Attributes:
        kernels: one per Mosaic GPU call in the program, in its order.
        temp: bytes of memory for temporaries.
        peak: bytes of memory for arguments, results and temporaries.
        around: bytes that XLA's own passes move.
        seconds: that lowering and compiling took.
        text: of the program, without the kernels' bodies.
    """

    kernels: tuple[cubin.Code, ...]
    temp: int
    peak: int
    around: float
    seconds: float
    text: str


def missing() -> str | None:
    """The wheel that is not there, or None."""
    for name in WHEELS:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return name
    return None


def prepare(dumps: pathlib.Path) -> None:
    """Sets what jax and Mosaic read.

    Args:
        dumps: an empty folder that exists, for ptxas's words about each kernel.
    """
    # Or jax looks for a driver and for cuDNN, which are not needed.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(dumps))
    # A CUDA that the machine has comes first otherwise, and figures would not be of the wheel.
    found = _wheel_tools()
    if found is not None:
        os.environ["PATH"] = os.pathsep.join([str(found), os.environ.get("PATH", "")])


def _wheel_tools() -> pathlib.Path | None:
    """Where nvidia-cuda-nvcc has ptxas."""
    for file in importlib.metadata.files("nvidia-cuda-nvcc") or ():
        if file.name == "ptxas":
            return pathlib.Path(str(file.locate())).parent
    return None


def stack() -> str:
    """The versions that figures hang on."""
    return f"jax {jax.__version__}, nvcc {importlib.metadata.version('nvidia-cuda-nvcc')}"


def gpu_device(name: str) -> Any:
    """A compile-only device of DEVICES."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=_TARGET.format(**DEVICES[name]),
    )
    return topology.devices[0]


def compile_for(
    device: Any, function: Callable, *arguments: Any, dumps: pathlib.Path | None = None
) -> Compiled:
    """Compiles a function for one device.

    Args:
        device: a compile-only one.
        function: of the arguments.
        *arguments: ShapeDtypeStructs without shardings.
        dumps: the folder that `prepare` was given; what lies in it is deleted.

    Raises:
        MisplacedCopy: a kernel's copy may begin within a tile (core/copy_starts.py).
    """
    here = SingleDeviceSharding(device)
    jitted = jax.jit(function, in_shardings=here, out_shardings=here)
    cubin.clear(dumps)
    began = time.perf_counter()
    with dispatch.compiling_for(device.device_kind):
        with copy_starts.checked():
            lowered = jitted.lower(*arguments)
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    kernels = cubin.read(dumps, cubin.calls(text))
    cubin.clear(dumps)
    peak = getattr(memory, "peak_memory_in_bytes", 0) or (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    )
    text = cubin.without_bodies(text)
    return Compiled(kernels, memory.temp_size_in_bytes, peak, hlo.passes_bytes(text), seconds, text)
