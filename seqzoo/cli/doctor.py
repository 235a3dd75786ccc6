"""`seqzoo doctor`: what this machine offers, what of it is used, and what to install."""

import argparse
import contextlib
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

from seqzoo.cli.common import bytes_text, print_json, print_table
from seqzoo.config import paths
from seqzoo.errors import ConfigError
from seqzoo.train import environment

EPILOG = """examples:
  seqzoo doctor
  seqzoo doctor --format json
  seqzoo doctor --device v5e         what operators would take there; "NVIDIA H200", "TPU7x", ...

For each operator: the implementation that a call without `implementation=` takes here, and why
not each faster one. A GPU or TPU that the installed jax cannot use is announced, with the command
that changes it. What the kernels were proven to do, and how: docs/kernels.md.
"""

# Sizes of the call that operators are asked about, by axis letter (seqzoo/axes.py).
_SIZES = dict(b=8, t=1024, d=256, e=512, n=16, h=4, g=4, k=64, v=64, w=4, j=3, m=4, o=256, c=64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--device", metavar="KIND", help="of another machine, for the operators")


def run(args: argparse.Namespace) -> int:
    found = examine(args.device)
    if args.format == "json":
        print_json(found)
        return 0
    for name, value in found["machine"].items():
        print(f"{name:<14}{value}")
    print()
    print_table([{"operator": op, **one} for op, one in _spread(found["operators"])])
    print()
    for text in found["advice"] or ["nothing is amiss"]:
        print(text)
    return 0


def examine(device: str | None = None) -> dict[str, Any]:
    """Returns {machine, operators, advice}; operators as on a device of this kind, else as here."""
    gpu, tpu = find_gpu(), find_tpu()
    import jax  # starts it

    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS asks for what is not there
        return {
            "machine": {"devices": f"jax cannot start: {error}"},
            "operators": {},
            "advice": advice("nothing", gpu=gpu, tpu=tpu) or ["unset JAX_PLATFORMS"],
        }
    kinds = {f"{d.device_kind} ({d.platform})" for d in devices}
    memory = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    cache = compile_cache()
    groups = {
        path.name: len(list(path.glob("*.yaml")))
        for path in sorted(paths.shipped().iterdir())
        if path.is_dir()
    }
    threads = environment.threads()
    pinned = "NPROC" if os.environ.get("NPROC") else "as many as CPUs; NPROC=N pins them"
    machine = {
        "devices": f"{len(devices)} x {', '.join(sorted(kinds))}"
        + (f", {bytes_text(memory['bytes_limit'])} each" if memory else ""),
        "GPU": gpu or "none",
        "TPU": tpu or "none",
        "python": environment.describe()["python"],
        "versions": ", ".join(f"{k} {v}" for k, v in environment.versions().items()),
        "CPU threads": f"{threads} ({pinned})",
        "compile cache": cache,
        "configs": f"{paths.shipped()}: " + ", ".join(f"{n} {g}" for g, n in groups.items()),
    }
    return {
        "machine": machine,
        "operators": operators(device),
        "advice": advice(devices[0].platform, gpu=gpu, tpu=tpu),
    }


def operators(device: str | None = None) -> dict[str, dict[str, str | None]]:
    """For each operator: implementation -> None (it would serve) or the reason against it.

    Args:
        device: jax's name of a kind, or a TPU generation ("v5e"); None = this machine's.
    """
    import jax.numpy as jnp

    from pallas_kernels import OPERATORS
    from pallas_kernels.core import dispatch
    from pallas_kernels.core.tpu import GENERATIONS

    generations = {one.name: kind for kind, one in GENERATIONS.items()}
    kind = generations.get((device or "").lower(), device) or dispatch.device_kind()
    if dispatch.platform_of(kind) not in ("cpu", *dispatch.KERNELS.values()):
        raise ConfigError(
            f"--device {device}: it must be one of {', '.join(generations)}, or a name as jax has "
            "it, 'TPU v5 lite' or 'NVIDIA H200'"
        )
    dtype = jnp.float32 if dispatch.platform_of(kind) == "cpu" else jnp.bfloat16
    within = contextlib.nullcontext() if device is None else dispatch.compiling_for(kind)
    with within:
        return {name: _reasons(op, dtype) for name, op in OPERATORS.items()}


def _reasons(op: Any, dtype: Any) -> dict[str, str | None]:
    """As `dispatch.explain` has it, for a typical call of an operator."""
    import jax

    from pallas_kernels.core.dispatch import explain

    sizes, left_out = _SIZES | getattr(op, "sizes", {}), getattr(op, "left_out", ())
    names = inspect.signature(op).parameters
    arrays = [
        None
        if name in left_out
        else jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), dtype)
        for name, letters in zip(names, op.axes.arguments, strict=False)
    ]
    return explain(op, *arrays, **getattr(op, "options", {}))


def taken(reasons: dict[str, str | None]) -> str:
    """What `implementation=None` takes: the last one without a reason."""
    return [name for name, reason in reasons.items() if reason is None][-1]


def _spread(found: dict[str, dict[str, str | None]]) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for op, reasons in found.items():
        rows.append((op, {"implementation": taken(reasons), "here": "is taken"}))
        faster = list(reasons)[list(reasons).index(taken(reasons)) + 1 :]
        # How to run a kernel elsewhere is not what is asked here.
        why = {name: str(reasons[name]).split("; config.interpret")[0] for name in faster}
        rows += [("", {"implementation": name, "here": f"not: {why[name]}"}) for name in faster]
    return rows


def find_gpu() -> str | None:
    """Names the NVIDIA GPUs of this machine, whether or not jax can use them."""
    if shutil.which("nvidia-smi"):
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if names:
            return ", ".join(names.splitlines())
    if pathlib.Path("/dev/nvidia0").exists():
        return "an NVIDIA device (/dev/nvidia0)"
    return None


def find_tpu() -> str | None:
    """Names the TPU of this machine: its device files, or what libtpu's hosts set."""
    for path in (*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")):
        return f"a TPU ({path})"
    return "a TPU (TPU_NAME is set)" if os.environ.get("TPU_NAME") else None


def advice(platform: str, *, gpu: str | None, tpu: str | None) -> list[str]:
    """What to do about hardware that is not used."""
    found = []
    asked = os.environ.get("JAX_PLATFORMS", "")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if gpu and platform != "gpu":
        if not any(importlib.util.find_spec(name) for name in plugins):
            extra = cuda_extra()
            found.append(
                f"there is a GPU ({gpu}), but this jax is for CPUs: make install EXTRA={extra} "
                f"(or pip install 'seqzoo[{extra}]')"
            )
        elif asked and not {"cuda", "gpu"} & set(asked.split(",")):
            found.append(f"there is a GPU ({gpu}), but JAX_PLATFORMS={asked} keeps jax off it")
        else:
            found.append(
                f"there is a GPU ({gpu}), but jax runs on {platform}: see its warning above"
            )
    if tpu and platform != "tpu":
        if importlib.util.find_spec("libtpu") is None:
            found.append(
                f"there is {tpu}, but no libtpu: make install EXTRA=tpu "
                "(or pip install 'seqzoo[tpu]')"
            )
        else:
            found.append(f"there is {tpu}, but jax runs on {platform}; JAX_PLATFORMS={asked!r}")
    return found


def cuda_extra() -> str:
    """The extra for the driver's version of CUDA."""
    version = re.search(r"CUDA Version:\s*(\d+)", _output("nvidia-smi") or "")
    return "cuda12" if version and int(version.group(1)) < 13 else "cuda13"


def compile_cache() -> str:
    """Where compiled programs are kept, and how many there are."""
    from seqzoo.train.programs import cache_folder

    folder = cache_folder()
    files = [path for path in folder.glob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return f"{folder}: {len(files)} files, {bytes_text(size)}"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
