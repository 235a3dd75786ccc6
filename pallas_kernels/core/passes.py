"""Bytes of the passes that XLA makes around kernels: pads, transposes, sums, conversions.

A model of its fusion, not its own account:

- equations that hand values to each other are one pass, which reads what comes from outside once
  and writes what is used outside;
- a value that a kernel, a library call or the caller takes is written, and read by each pass that
  takes it too; a sum ends its pass;
- matrix products, sorts, prefix sums, Fourier transforms, gathers and scatters are passes alone;
- reshapes and broadcasts of nothing are free (those that change the last axis cost a copy on a TPU
  unless XLA cancels them against the model's own, as it does for heads cut from a projection).
"""

import collections
import math
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.core.blocks import Kernel


class Value:
    """An array of the program; equations that are free hand on the same one."""

    def __init__(self, aval: Any, known: np.ndarray | None = None):
        itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
        self.bytes = float(math.prod(getattr(aval, "shape", ()))) * itemsize
        self.known = known


class Node(NamedTuple):
    """An equation that does something: kind "fused", "sum", "alone" or "inner" (counted within)."""

    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    part: bool = False
    kernels: tuple[Kernel, ...] = ()
    around: float = 0.0


def used(nodes: list[Node], results: list[Value]) -> list[Node]:
    """The nodes whose outputs somebody uses."""
    live, kept = {id(v) for v in results}, []
    for node in reversed(nodes):
        if any(id(v) in live for v in node.outputs):
            kept.append(node)
            live |= {id(v) for v in node.inputs}
    return kept[::-1]


def passes_bytes(nodes: list[Node], results: list[Value]) -> float:
    """Bytes of XLA's own passes, fused as far as the module's docstring says."""
    maker = {id(v): i for i, node in enumerate(nodes) for v in node.outputs}
    # What lies in memory whoever else takes it.
    stored = {id(v) for v in results}
    for node in nodes:
        if node.kind in ("alone", "inner"):
            stored |= {id(v) for v in node.inputs}
        if node.kind != "fused":
            stored |= {id(v) for v in node.outputs}
    group = list(range(len(nodes)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, node in enumerate(nodes):
        if node.kind in ("fused", "sum"):
            for v in node.inputs:
                if id(v) in maker and id(v) not in stored:
                    group[root(maker[id(v)])] = root(i)
    read: dict[tuple[int, int], float] = collections.defaultdict(float)
    written = 0.0
    for i, node in enumerate(nodes):
        if node.kind == "inner":
            continue
        written += sum(v.bytes for v in node.outputs if id(v) in stored)
        for place, v in enumerate(node.inputs):
            if id(v) in maker and id(v) not in stored:
                continue  # it never leaves the pass
            key, taken = (root(i), id(v)), v.bytes
            if node.part and place == 0:
                taken = sum(x.bytes for x in node.outputs)
            read[key] = min(v.bytes, read[key] + taken)
    return written + sum(read.values())
