"""Compiled programs: announced, kept on disk between runs, refused before memory runs out."""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from seqzoo.errors import SeqzooError
from seqzoo.train import environment

CACHE_VARIABLE = "SEQZOO_CACHE"

# Programs of this process by (function, shapes): runs of a sweep share them.
_COMPILED: dict[Any, "Program"] = {}
_MOST_PROGRAMS = 64


class OutOfMemory(SeqzooError):
    """A program needs more memory than there is."""


class Program(NamedTuple):
    """An executable, and what it works on for the message if its memory does not suffice.

    Attributes:
        executable: what XLA made.
        name: "train step", ...
        what: batch and length.
        seconds: that compiling took.
    """

    executable: Any
    name: str
    what: str
    seconds: float

    def __call__(self, *arguments: Any) -> Any:
        return self.executable(*arguments)


def cache_folder() -> pathlib.Path:
    """Where executables are kept between processes: under SEQZOO_CACHE, else the user's cache.

    Those of another kind of CPU or another number of threads lie apart: XLA compiles for both, and
    neither is in the key of jax's cache. A home may be shared by unlike machines.
    """
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    above = pathlib.Path(os.environ.get(CACHE_VARIABLE, default / "seqzoo"))
    return above / "xla" / f"{_cpu()}-{environment.threads()}"


@functools.cache
def _cpu() -> str:
    """A short name of this machine's kind of CPU."""
    told = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        lines = text.split("\n\n")[0].splitlines()
        told += "".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def use_disk_cache() -> None:
    """Keeps XLA's executables in the cache folder."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: every start compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compiled(
    function: Any,
    *arguments: Any,
    name: str,
    what: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Program:
    """The program of a jitted function for the shapes of these arguments.

    Args:
        function: what jax.jit gave; the same object means the same program.
        *arguments: arrays or ShapeDtypeStructs with shardings.
        name: of the program, for the announcement.
        what: batch and length, for the message when memory does not suffice.
        say: gets "compiling NAME ..." and how long it took.

    Raises:
        OutOfMemory: the program needs more than the device has; the text has the estimate.
    """
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((a.shape, a.dtype, getattr(a, "sharding", None)) for a in leaves)
    place = (function, tree, shapes)
    if place in _COMPILED:
        return _COMPILED[place]
    say(f"compiling {name} ...")
    began = time.perf_counter()
    try:
        executable = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if _is_about_memory(error):
            raise OutOfMemory(_too_large(name, what)) from error
        raise
    program = Program(executable, name, what, time.perf_counter() - began)
    say(f"compiled {name} in {program.seconds:.1f} s")
    more, there = _more_bytes(program), device_bytes()
    if there is not None and more > there:
        raise OutOfMemory(_too_large(name, what, more, there))
    while len(_COMPILED) >= _MOST_PROGRAMS:
        del _COMPILED[next(iter(_COMPILED))]
    _COMPILED[place] = program
    return program


def needed_bytes(program: Program) -> int:
    """What a program needs on each device while it runs, by XLA's own account."""
    memory = program.executable.memory_analysis()
    if memory is None:
        return 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _more_bytes(program: Program) -> int:
    """What of that must fit into `device_bytes`: on a CPU, which says what is free, the arguments
    lie in memory already."""
    memory = program.executable.memory_analysis()
    if memory is None or jax.local_devices()[0].platform != "cpu":
        return needed_bytes(program)
    return needed_bytes(program) - memory.argument_size_in_bytes


def device_bytes() -> int | None:
    """What a device has; on a CPU what the machine has free. None where nobody says."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            text = pathlib.Path("/proc/meminfo").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines())
            return int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return None
    stats: Mapping[str, int] = device.memory_stats() or {}
    return stats.get("bytes_limit")


def out_of_memory(error: Exception, program: Program | None) -> OutOfMemory | None:
    """What the user must read when a program that was thought to fit did not."""
    if not _is_about_memory(error):
        return None
    if program is None:
        return OutOfMemory(f"the model does not fit into memory: {error}")
    return OutOfMemory(_too_large(program.name, program.what, needed_bytes(program)))


def _is_about_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _too_large(name: str, what: str, needed: int | None = None, there: int | None = None) -> str:
    estimate = "" if needed is None else f": it needs about {_gib(needed)} on each device"
    limit = "" if there is None else f", there are {_gib(there)}"
    return (
        f"{name} with {what} does not fit into memory{estimate}{limit}. Make "
        "trainer.grad_accum_steps larger (the same but for rounding and dropout), set "
        "model.remat=full, or take a smaller trainer.global_batch_size or data.seq_len"
    )


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"
