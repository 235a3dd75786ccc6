"""The bench of dilated_conv: its rows, and that the three forms of the average are one function."""

import jax
import numpy as np

from pallas_kernels.core.bench import Measured
from pallas_kernels.core.costs import Device
from seqzoo.eval.bench import dilated_conv as bench


def test_levels():
    assert bench.levels(4096, 16) == (1, 16, 256)
    assert bench.levels(4097, 16) == (1, 16, 256, 4096)
    assert [len(bench.levels(131_072, taps)) for taps in (16, 8)] == [5, 6]


def test_rows():
    took = dict(zip((*bench.STACKS, *bench.AVERAGES), (10, 5, 40, 30, 20), strict=True))
    found = {name: Measured((ms / 1e3,), 2_000_000, 0, 0, 0.0) for name, ms in took.items()}
    rows = bench.table(found, (128, 1024, 128), 4096, True, Device(1e12, 1e12, 1e10))
    assert [row["ms"] for row in rows] == list(took.values())
    assert [row["times faster"] for row in rows] == [2.0, 4.0, "", "", ""]
    assert [row["levels"] for row in rows] == [3, 4, "", "", ""]
    assert rows[0]["than"] == "average, scan" and rows[0]["what"] == "forward + gradients"
    assert rows[0]["floor ms"] == round(1e3 * 5 * 4 * 128**2 * 1024 / 1e10, 1)


def test_forms_of_the_average_agree():
    """Outputs and gradients of the same parameters; and a stack answers to its own."""
    arguments = bench.draw(1, 60, 4, 60)
    run = {
        name: jax.tree.map(np.asarray, jax.jit(program)(*arguments))
        for name, program in bench.programs(60, True).items()
        if name != "stack, 16 taps"
    }
    first, *others = bench.AVERAGES
    for name in others:
        for got, want in zip(jax.tree.leaves(run[name]), jax.tree.leaves(run[first]), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))
    some = lambda tree: [bool(np.any(leaf)) for leaf in jax.tree.leaves(tree)]
    _, (_, stacks, average) = run["stack, 8 taps"]
    assert some(stacks) == [False, False, True, True] and not any(some(average))
    _, (_, stacks, average) = run[first]
    assert all(some(average)) and not any(some(stacks))
