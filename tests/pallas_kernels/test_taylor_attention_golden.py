"""taylor_attention against the numbers of fla's naive form (golden/based/taylor_op_*)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import taylor_attention
from pallas_kernels.taylor_attention.xla import XlaConfig

CASES = ("norm", "nonorm", "big_scores", "scale1")
CHUNKED = XlaConfig(chunk=16)


def heads_third(x):
    """[b h t k] in the files, [b t h k] here."""
    return np.swapaxes(x, 1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "how, dtype",
    [
        (dict(), "float32"),
        (dict(config=CHUNKED), "float32"),
        (dict(config=CHUNKED), "float64"),
        (dict(implementation="reference"), "float64"),
    ],
    ids=["quadratic", "chunked", "chunked64", "reference64"],
)
def test_golden(golden, case, how, dtype):
    file = golden(f"based/taylor_op_{case}")
    flags = json.loads(str(file["meta"]))["flags"]
    scale = None if flags["scale"] == "f**-0.5" else flags["scale"]
    options = dict(scale=scale, normalize=flags["use_norm"], eps=flags["eps"], **how)

    @jax.jit
    def everything(arrays, dy):
        y, pull = jax.vjp(lambda a: taylor_attention(**a, **options)[0], arrays)
        return y, pull(dy)[0]

    with jax.enable_x64(dtype == "float64"):
        arrays = {n: jnp.asarray(heads_third(file[f"in.{n}"]), dtype) for n in "qkv"}
        dy = jnp.asarray(heads_third(file["ct.o"]), dtype)
        y, gradients = jax.tree.map(np.asarray, everything(arrays, dy))
    # The README's: 1e-5 and 1e-4 for float32.
    tolerances = (1e-5, 1e-4) if dtype == "float32" else (1e-9, 1e-9)
    assert off(y, file["out64.o"]) < tolerances[0]
    for name, got in gradients.items():
        assert off(got, file[f"grad64.{name}"]) < tolerances[1], name


def off(got, expected):
    expected = heads_third(expected)
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))
