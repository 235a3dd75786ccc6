"""The bench of neural_memory compares like with like, and memory stays what it promises."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import neural_memory
from pallas_kernels.core import testing
from pallas_kernels.neural_memory.arg_specs import named
from seqzoo.eval.bench import neural_memory as rows_of


@pytest.mark.slow
def test_the_materialised_form_computes_the_same():
    spec = named("whole")
    case = testing.draw_case(neural_memory, spec, 32)
    arrays = {k: v for k, v in case.arrays.items() if not k.startswith("s_")}
    names = ("q", "k", "v", "alpha", "eta", "theta", "w_out", "w_in", "gamma")
    values = [arrays[n] for n in names]
    ours = rows_of.closed(*values, chunk=16)
    theirs = jax.jit(lambda *a: rows_of.materialised(*a, chunk=16))(*values)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_rows():
    spec = named("issue")
    assert rows_of.title(spec) == "neural_memory B1 L1,024 H1 d64 m256 chunk 64"
    row = rows_of.row("a", "ms", 12.345, floor=3.21)
    assert (row["measured"], row["floor"], row["to reach"]) == (12.3, 3.2, "")


@pytest.mark.slow
def test_memory_is_a_state_per_chunk():
    # As users compile: without the flags of the tests.
    script = (
        "import json; from seqzoo.eval.bench import neural_memory as b;"
        "print(json.dumps(b.memory()))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    for row in json.loads(child.stdout.splitlines()[-1]):
        assert row["measured"] <= float(row["to reach"].removeprefix("<= ")), row
