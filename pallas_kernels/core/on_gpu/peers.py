"""flash-linear-attention by PyTorch and Triton, in a process without jax.

`fla-core` and what it needs (einops) must be importable; a folder or wheels can be handed over by
--peers. Nothing is downloaded. What is missing, or fails, is a row that says so.
"""

import functools
import importlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pallas_kernels.core.on_gpu import shapes
from pallas_kernels.core.on_gpu.result import Result

_ROUNDS = 15


def measure(name: str, seed: int, dry: bool, folder: pathlib.Path) -> Iterator[Result | str]:
    """An operator's y on the agreed numbers (into folder), then times at the published shapes."""
    why, peer = _why_not(dry), shapes.PEERS[name]
    there: dict[str, Callable | str] = {}
    for function in peer.functions:
        row = Result("peers", name, "agreement", "bfloat16", "forward", f"fla {function}")
        yield f"{function}, the agreed numbers"
        try:
            found = None if why else getattr(importlib.import_module(peer.module), function)
            if found:
                y = _call(found, peer, _tensors(shapes.agreed(peer, seed)))
                np.save(folder / f"{function}.npy", y.detach().float().cpu().numpy())
            there[function] = found or why or ""
        except Exception as error:  # whatever stands against a peer is the finding
            there[function] = _said(error)
        if isinstance(there[function], str):
            yield row._replace(status=f"missing: {there[function]}")
    for shape, sizes in shapes.here(dry).items():
        for function, found in there.items():
            if not isinstance(found, str):
                yield from _times(name, function, found, shape, sizes)
                continue
            for part in ("forward", "forward + backward"):
                row = Result("peers", name, shape, "bfloat16", part, f"fla {function}")
                yield row._replace(status=f"missing: {found}")


def _times(
    name: str, function: str, found: Callable, shape: str, sizes: tuple[int, ...]
) -> Iterator[Result | str]:
    import torch

    peer = shapes.PEERS[name]
    extents = peer.sizes(*sizes)
    rows = {
        part: Result("peers", name, shape, "bfloat16", part, f"fla {function}")
        for part in ("forward", "forward + backward")
    }
    try:
        sets = []
        for i in range(3):
            torch.manual_seed(i)
            some = {
                k: _like(k, tuple(extents[x] for x in letters))
                for k, letters in peer.arrays.items()
            }
            sets.append(some)
        dy = torch.randn_like(_call(found, peer, sets[0]))

        def forward(given):
            with torch.no_grad():
                _call(found, peer, given)

        def both(given):
            for x in given.values():
                x.grad = None
            _call(found, peer, given).backward(dy)

        for part, run in (("forward", forward), ("forward + backward", both)):
            yield f"{function} {shape} {part}"
            seconds = _rounds(run, sets)
            yield rows[part]._replace(
                seconds=statistics.median(seconds), fastest=min(seconds), slowest=max(seconds)
            )
            rows.pop(part)
    except Exception as error:
        for row in rows.values():
            yield row._replace(status=f"missing: {_said(error)}")


def _rounds(run: Callable, sets: list) -> list[float]:
    """Seconds of a call, by events around as many calls as last 10 ms."""
    import torch

    for given in (*sets, *sets):  # Triton chooses its tiles
        run(given)
    torch.cuda.synchronize()
    began = time.perf_counter()
    run(sets[0])
    torch.cuda.synchronize()
    count = max(len(sets), int(0.01 / max(time.perf_counter() - began, 1e-5)))
    found = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(count):
            run(sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / count)
    return found


def _call(found: Callable, peer: shapes.Peer, given: dict[str, Any]) -> Any:
    y = functools.partial(found, **peer.theirs)(**given)
    return y[0] if isinstance(y, tuple) else y


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(x).to("cuda", torch.bfloat16) for k, x in arrays.items()}


def _like(name: str, shape: tuple[int, ...]) -> Any:
    """Numbers like those of shapes.draw, made on the device."""
    import torch

    x = torch.randn(shape, device="cuda")
    if name == "g":
        x = torch.nn.functional.logsigmoid(x + 3)
    elif name == "beta":
        x = x.sigmoid()
    elif name in ("q", "k"):
        x = torch.nn.functional.normalize(x, dim=-1)
    return x.to(torch.bfloat16).requires_grad_()


def _why_not(dry: bool) -> str | None:
    """What is missing for any peer."""
    try:
        import torch
    except ImportError as error:
        return _said(error)
    if dry:
        return "a dry run has no GPU"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:250]
