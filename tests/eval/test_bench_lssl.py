"""The bench of LSSL: its rows, and the memory that it promises."""

import functools
import json
import os
import subprocess
import sys

import jax
import pytest

from seqzoo.eval.bench import lssl


def test_rows():
    assert lssl.title(256, 256, 16_384) == "kernel H256 N256 L16,384"
    row = lssl.row("a", "ms", 12.345)
    assert (row["measured"], row["unit"], row["to reach"]) == (12.3, "ms", "")
    shapes = jax.eval_shape(lambda: lssl.arguments(3, 4, 2))
    k = jax.eval_shape(functools.partial(lssl.kernels, length=5), *shapes)
    assert k.shape == (3, 2, 5)


@pytest.mark.slow
def test_memory_of_a_large_kernel():
    # As users compile: without the flags of the tests.
    script = (
        "import json; from seqzoo.eval.bench import lssl as b;"
        "print(json.dumps([b.memory(256, 256, 1, 16384, g) for g in (False, True)]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    for row in json.loads(child.stdout.splitlines()[-1]):
        assert row["measured"] < 1, row
