"""selective_scan against the numbers of its authors' code (golden/mamba/scan_*)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan

CASES = ("full", "noz_noD", "raw_delta", "grouped", "model_like", "big_delta")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
ALONG_TIME = ("u", "delta", "B", "C", "z")  # [b e t] or [b n t] in the files, [b t ...] here


def to_ours(name, x):
    return np.moveaxis(x, -1, 1) if name in ALONG_TIME else x


def scan(softplus, implementation, **arrays):
    """y and the last state; groups of B and C, which the operator does not have, one by one."""
    call = lambda **kw: selective_scan(**kw, delta_softplus=softplus, implementation=implementation)
    groups = arrays["B"].shape[2] if arrays["B"].ndim == 4 else 1
    if groups == 1:
        y, state = call(**arrays)
        return y, state.h
    parts = []
    for g in range(groups):
        one = {}
        for name, x in arrays.items():
            if name in ("B", "C"):  # [b g n t] in the file, [b t g n] here
                one[name] = x[:, :, g]
            else:
                axis = {"A": 0, "D": 0, "delta_bias": 0}.get(name, 2)
                one[name] = jnp.split(x, groups, axis)[g]
        parts.append(call(**one))
    y = jnp.concatenate([y for y, _ in parts], axis=2)
    return y, jnp.concatenate([state.h for _, state in parts], axis=1)


def run(file, dtype, implementation):
    """Outputs, and gradients of the objective without and with the last state."""
    softplus = json.loads(str(file["meta"]))["flags"]["delta_softplus"]
    arrays = {n: to_ours(n, file[f"in.{n}"]) for n in NAMES if f"in.{n}" in file}
    arrays = {n: jnp.asarray(x, dtype) for n, x in arrays.items()}
    dy = jnp.asarray(to_ours("u", file["ct.out"]), dtype)
    dh = jnp.asarray(file["ct.last_state"], dtype)

    @jax.jit
    def everything(arrays):
        (y, h), pull = jax.vjp(lambda a: scan(softplus, implementation, **a), arrays)
        return y, h, pull((dy, jnp.zeros_like(dh)))[0], pull((dy, dh))[0]

    return everything(arrays)


def off(name, got, expected):
    expected = to_ours(name, expected)
    assert got.shape == expected.shape, name
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "implementation, dtype", [("xla", "float32"), ("xla", "float64"), ("reference", "float64")]
)
def test_golden(golden, case, implementation, dtype):
    file = golden(f"mamba/scan_{case}")
    with jax.enable_x64(dtype == "float64"):
        y, h, without, with_state = jax.tree.map(np.asarray, run(file, dtype, implementation))
    # The README's: 1e-5 and 1e-4 for float32. Gradients are stored in float64.
    outputs, gradients = (1e-5, 1e-4) if dtype == "float32" else (1e-9, 1e-9)
    assert off("u", y, file["out64.out"]) < outputs
    assert off("", h, file["out64.last_state"]) < outputs
    for kind, grads in (("grad64", without), ("grad_st64", with_state)):
        assert grads.keys() == {k[len(kind) + 1 :] for k in file if k.startswith(f"{kind}.")}
        for name, got in grads.items():
            assert off(name, got, file[f"{kind}.{name}"]) < gradients, f"{kind}.{name}"
