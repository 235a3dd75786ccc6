"""Freed memory is kept for the next step instead of being given back to the system.

XLA on a CPU asks for the temporaries of a program at each call and frees them after it. By default
the C library returns large pieces to the kernel, which then clears every page again at the next
step: programs whose temporaries exceed some 32 MiB spend most of their time there (measured: a
short convolution of 13 MB arrays, forward and backward, 5 times slower).
"""

import ctypes
import os
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT = 2**31 - 1  # bytes at the top of the heap that stay with the process
_LARGE = 2**30  # bytes from which on a piece still comes from the system, and goes back there


def keep_freed_memory() -> bool:
    """Tells the C library so, once jax is about to run; returns whether it did.

    Does nothing where the library is not glibc, or where the user has set it up by a MALLOC_...
    variable or GLIBC_TUNABLES.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if not sys.platform.startswith("linux") or chosen or "GLIBC_TUNABLES" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    # One arena: those of threads cannot hold large pieces.
    settings = ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1))
    return all([mallopt(key, value) for key, value in settings])
