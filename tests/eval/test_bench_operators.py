"""The operator bench compares like with like, and the memory figures hold."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.core import testing
from pallas_kernels.selective_scan.arg_specs import named
from seqzoo.eval.bench import operators


def test_the_plain_form_computes_the_same():
    case = testing.draw_case(selective_scan, named("whole"), 37)
    ours, state = operators.scan(*case.arrays.values())
    plain, h = operators.associative_scan(*case.arrays.values())
    assert np.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert np.allclose(state.h, h, rtol=1e-4, atol=1e-5)


def test_rows():
    spec = named("issue")
    shapes = operators.abstract(selective_scan, spec, 1024)
    assert [x.shape for x in shapes[:4]] == [(4, 1024, 256)] * 3 + [(256, 16)]
    assert operators.title("selective_scan", spec).startswith("selective_scan B4 L1024 D256 N16")
    assert operators.row("a", "ms", 12.34567, floor=3.21) == {
        "bench": "operators",
        "case": "a",
        "measured": 12.3,
        "unit": "ms",
        "floor": 3.2,
        "to reach": "",
    }


@pytest.mark.slow
def test_memory_does_not_grow_with_length_times_state():
    # As users compile: without the flags of the tests.
    script = (
        "import json; from seqzoo.eval.bench import operators as o;"
        "print(json.dumps([*o.scan_memory((1024, 4096, 16384)), o.long_scan()]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    rows = json.loads(child.stdout.splitlines()[-1])
    assert len(rows) == 4
    for row in rows:
        assert row["measured"] <= float(row["to reach"].removeprefix("<= ")), row
