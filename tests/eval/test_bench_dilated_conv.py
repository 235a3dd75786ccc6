"""The bench of dilated_conv: its rows, and that the three forms of the average are one function."""

import jax
import numpy as np

from pallas_kernels.core.bench import Measured
from seqzoo.eval.bench import dilated_conv as bench


def test_levels():
    assert bench.levels(4096) == (1, 16, 256)
    assert bench.levels(4097) == (1, 16, 256, 4096)
    assert len(bench.levels(131_072)) == 5


def test_rows():
    sizes = dict(b=128, t=1024, e=128, j=3)
    row = bench.row("scan", Measured((0.01234,), 2_000_000, 0, 0, 0.0), sizes, None, True)
    assert (row["form"], row["ms"], row["field"]) == ("average, scan", 12.34, 1024)
    assert (row["what"], row["levels"]) == ("forward + gradients", "")


def test_forms_of_the_average_agree():
    """Outputs and gradients of the same parameters; and the stack answers to its own."""
    arguments = bench.draw(1, 60, 4, 1)
    run = {
        name: jax.tree.map(np.asarray, jax.jit(program)(*arguments))
        for name, program in bench.programs((1,), None, True).items()
    }
    for name in ("monarch", "scan"):
        for got, want in zip(jax.tree.leaves(run[name]), jax.tree.leaves(run["fft"]), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))
    _, (_, of_taps, of_average) = run["dilated_conv"]
    assert all(np.any(g) for g in of_taps) and not any(np.any(g) for g in of_average)
    _, (_, of_taps, of_average) = run["fft"]
    assert all(np.any(g) for g in of_average) and not any(np.any(g) for g in of_taps)
