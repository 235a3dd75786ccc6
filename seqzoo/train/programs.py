"""Compiled programs: announced, kept on disk between runs, and refused before they run out of memory."""

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from seqzoo.errors import SeqzooError

CACHE_VARIABLE = "SEQZOO_CACHE"

# Executables of this process by (program, shapes): runs of a sweep share them.
_COMPILED: dict[Any, Any] = {}


class OutOfMemory(SeqzooError):
    """The step needs more memory than there is."""


def cache_folder() -> pathlib.Path:
    """Where executables are kept between processes: under SEQZOO_CACHE, else the user's cache."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return pathlib.Path(os.environ.get(CACHE_VARIABLE, default / "seqzoo")) / "xla"


def use_disk_cache() -> None:
    """Keeps XLA's executables between processes, under SEQZOO_CACHE or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: every start compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compiled(
    function: Callable,
    *arguments: Any,
    name: str = "",
    say: Callable[[str], None] = lambda text: None,
    what: str = "",
) -> Any:
    """The executable of a jitted function for the shapes of these arguments.

    Args:
        function: what jax.jit gave; the same object means the same program.
        *arguments: arrays or ShapeDtypeStructs with shardings.
        name: of the program, for the announcement.
        say: gets "compiling NAME ..." and how long it took.
        what: batch and length, for the message when memory does not suffice.

    Raises:
        OutOfMemory: the program needs more than the device has; the text has the estimate.
    """
    leaves, tree = jax.tree.flatten(arguments)
    place = (function, tree, tuple((a.shape, a.dtype, _sharding(a)) for a in leaves))
    if place not in _COMPILED:
        say(f"compiling {name} ...")
        started = time.perf_counter()
        try:
            program = function.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemory(_too_large(name, what, None)) from error
            raise
        say(f"compiled {name} in {time.perf_counter() - started:.1f} s")
        _check_memory(program, name, what)
        _COMPILED[place] = program
    return _COMPILED[place]


def needed_bytes(program: Any) -> int:
    """What a program needs on each device while it runs, by XLA's own account."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def device_bytes() -> int | None:
    """What a device has; on a CPU what the machine has free."""
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


def out_of_memory(error: Exception, name: str, what: str, program: Any) -> Exception:
    """What the user must read when a program that was thought to fit did not."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    return OutOfMemory(_too_large(name, what, needed_bytes(program)))


def _check_memory(program: Any, name: str, what: str) -> None:
    needed, there = needed_bytes(program), device_bytes()
    if there is not None and needed > there:
        raise OutOfMemory(_too_large(name, what, needed, there))


def _too_large(name: str, what: str, needed: int | None, there: int | None = None) -> str:
    estimate = "" if needed is None else f": it needs about {needed / 2**30:.1f} GiB per device"
    limit = "" if there is None else f", there are {there / 2**30:.1f} GiB"
    return (
        f"{name} with {what} does not fit into memory{estimate}{limit}. Make "
        "trainer.grad_accum_steps larger (the result stays the same), set model.remat=full, or "
        "take a smaller trainer.global_batch_size or data.seq_len"
    )


def _sharding(a: Any) -> Any:
    return getattr(a, "sharding", None)
