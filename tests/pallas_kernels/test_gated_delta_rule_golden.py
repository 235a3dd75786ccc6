"""gated_delta_rule against the numbers of its authors' code (golden/mom/gdr_*)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule
from pallas_kernels.gated_delta_rule.xla import XlaConfig

CASES = ("random", "repeated_key", "no_init_nogate", "strong_decay", "unnormalised_scale03")
NAMES = ("q", "k", "v", "g", "beta")


def run(file, dtype, implementation):
    """Outputs, and gradients of the objective without and with the last state."""
    scale = json.loads(str(file["meta"]))["flags"]["scale"]
    scale = None if scale == "K**-0.5" else float(scale)
    inputs = {n: jnp.asarray(file[f"in.{n}"], dtype) for n in NAMES}
    if "in.initial_state" in file:
        inputs["initial_state"] = jnp.asarray(file["in.initial_state"], dtype)
    dy, ds = (jnp.asarray(file[f"ct.{n}"], dtype) for n in ("o", "final_state"))

    def call(inputs):
        arrays = dict(inputs)
        s = arrays.pop("initial_state", None)
        b = dy.shape[0]
        y, state = gated_delta_rule(
            **arrays,
            scale=scale,
            initial_state=None if s is None else (s, jnp.zeros((b,), jnp.int32)),
            implementation=implementation,
            config=XlaConfig(chunk=64) if implementation == "xla" else None,
        )
        return y, state.s

    @jax.jit
    def everything(inputs):
        (y, s), pull = jax.vjp(call, inputs)
        return y, s, pull((dy, jnp.zeros_like(ds)))[0], pull((dy, ds))[0]

    return everything(inputs)


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "implementation, dtype",
    [
        ("xla", "float32"),
        pytest.param("xla", "float64", marks=pytest.mark.slow),
        ("reference", "float64"),
    ],
)
def test_golden(golden, case, implementation, dtype):
    file = golden(f"mom/gdr_{case}")
    with jax.enable_x64(dtype == "float64"):
        y, s, without, with_state = jax.tree.map(np.asarray, run(file, dtype, implementation))
    # The README's: 1e-5 and 1e-4 for float32. Gradients are stored in float64.
    outputs, gradients = (1e-5, 1e-4) if dtype == "float32" else (1e-9, 1e-9)
    assert off(y, file["out64.o"]) < outputs
    assert off(s, file["out64.final_state"]) < outputs
    for kind, grads in (("grad64", without), ("grad_st64", with_state)):
        assert grads.keys() == {k[len(kind) + 1 :] for k in file if k.startswith(f"{kind}.")}
        for name, got in grads.items():
            assert off(got, file[f"{kind}.{name}"]) < gradients, f"{kind}.{name}"
