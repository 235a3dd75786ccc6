"""The bench of simple_gla and gla: its rows, and the memory that it promises."""

import json
import os
import subprocess
import sys

import pytest

from pallas_kernels import gla, simple_gla
from pallas_kernels.simple_gla.arg_specs import named
from seqzoo.eval.bench import gla as rows_of


def test_rows():
    title = rows_of.title(simple_gla, named("mamba2_130m"))
    assert title == "simple_gla B1 L2,048 H24 (q, k: 1) k128 v64"
    assert rows_of.title(gla, rows_of.at_length(gla, 4096)) == "gla B1 L4,096 H4 k64 v64"
    row = rows_of.row("a", "ms", 12.345, floor=3.21)
    assert (row["measured"], row["floor"], row["to reach"]) == (12.3, 3.2, "")


@pytest.mark.slow
def test_memory_does_not_grow_with_length_times_state():
    # As users compile: without the flags of the tests.
    script = (
        "import json; from seqzoo.eval.bench import gla as b;"
        "print(json.dumps([b.memory(op, t) for op in b.USES for t in (2048, 16384)]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    for row in json.loads(child.stdout.splitlines()[-1]):
        assert row["measured"] <= float(row["to reach"].removeprefix("<= ")), row
