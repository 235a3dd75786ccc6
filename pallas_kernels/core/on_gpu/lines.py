"""Lines that users know: jax's attention (cuDNN), and our kernels at others' published shapes."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import OPERATORS
from pallas_kernels.core import bench, kernel_check
from pallas_kernels.core.on_gpu import shapes, times
from pallas_kernels.core.on_gpu.numerics import FORM, How, config_of
from pallas_kernels.core.on_gpu.result import Result
from pallas_kernels.core.testing import ArgSpec


def attention(how: How) -> Iterator[Result | str]:
    """Causal softmax attention by cuDNN at the published shapes."""
    for name, (b, t, h, d) in shapes.here(how.dry).items():
        key = jax.random.key(how.seed % 2**31)
        q, k, v, dy = (
            jax.random.normal(one, (b, t, h, d), jnp.bfloat16) for one in jax.random.split(key, 4)
        )
        run = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        run = functools.partial(run, implementation=None if how.dry else "cudnn")
        sets = [tuple(jnp.roll(x, i, axis=1) for x in (q, k, v)) for i in range(2)]
        work = 2.0 * b * h * t * t * d  # two products, half of each
        for backward in (False, True):
            part = "forward + backward" if backward else "forward"
            yield f"{name} {part}"
            program = bench.forward_and_gradients(run, has_state=False) if backward else run
            given = [(dy, *one) for one in sets] if backward else sets
            (took,) = bench.take_turns_over_sets({"": program}, given, **times.rounds(how)).values()
            row = Result("attention", "attention", name, "bfloat16", part, "cuDNN")
            row = row._replace(flops=work * (3.5 if backward else 1), matrix=1, tokens=t)
            if isinstance(took, Exception):
                yield row._replace(status=f"missing: {times._said(took)}")
            else:
                yield times.timed(row, took)


def ours(name: str, how: How, folder: pathlib.Path) -> Iterator[Result | str]:
    """Our kernel at the peer's shapes; first that both compute the same.

    Args:
        name: of the operator.
        how: as everywhere.
        folder: where the peer's process left its results.
    """
    op: Any = OPERATORS[name]
    peer = shapes.PEERS[name]
    yield "the agreed numbers"
    yield from _agree(name, how, folder)
    written = kernel_check.has_kernel(op, FORM)
    for shape, sizes in shapes.here(how.dry).items():
        spec = ArgSpec(name=shape, sizes=peer.sizes(*sizes), draw=_draw)
        candidates = {"xla": times._y(op, spec, "xla", None)}
        if written:
            candidates = {FORM: times._y(op, spec, FORM, config_of(op, how)), **candidates}
        else:
            text = "NOT WRITTEN: there is no GPU kernel; dispatch takes xla"
            yield Result("ours", name, shape, "bfloat16", "forward", FORM, text)
        for told in times.both_passes(op, spec, "bfloat16", candidates, how):
            yield told if isinstance(told, str) else told._replace(phase="ours")


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return shapes.draw(name, shape, rng)


def _agree(name: str, how: How, folder: pathlib.Path) -> Iterator[Result]:
    """y of both at one shape, on the same numbers, in bfloat16."""
    op: Any = OPERATORS[name]
    peer = shapes.PEERS[name]
    arrays = shapes.agreed(peer, how.seed)
    for function in peer.functions:
        row = Result("peers", name, "agreement", "bfloat16", "forward", f"fla {function}")
        path = folder / f"{function}.npy"
        if not path.exists():  # its own row says why
            continue
        given = {k: jnp.asarray(x, jnp.bfloat16) for k, x in arrays.items()}
        want = np.load(path).astype(np.float64)
        for form in (FORM, "xla"):
            try:
                config = config_of(op, how) if form == FORM else None
                y = op(**given, **peer.options, implementation=form, config=config)[0]
            except NotImplementedError:
                continue
            have = np.asarray(y).astype(np.float64)
            error = float(np.sqrt(np.mean((have - want) ** 2)) / np.sqrt(np.mean(want**2)))
            good = "ok" if error < shapes.AGREES else f"WRONG: {form} and the peer do not agree"
            yield row._replace(
                status=good, error=error, allowed=shapes.AGREES, detail=f"against {form}"
            )
