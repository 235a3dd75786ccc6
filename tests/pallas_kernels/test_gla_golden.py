"""simple_gla and gla against the numbers of other people's code (golden/mom, golden/mamba)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gla, simple_gla

# Names in the files, for (q, k, v, g) and the state before, the output and the state after.
FLA = (("q", "k", "v", "g"), "initial_state", "o", "final_state")
CASES = {
    "mom/simple_gla": (simple_gla, FLA),
    "mom/gla": (gla, (("q", "k", "v", "gk"), *FLA[1:])),
    "mom/gla_strong_gate": (gla, (("q", "k", "v", "gk"), *FLA[1:])),
    "mamba/mamba2_ssd": (simple_gla, (("C", "B", "X", "A"), "initial_states", "Y", "final_state")),
    "mom/retention": (simple_gla, (("q", "k", "v", None), None, "o", None)),
}
CASES["mamba/mamba2_ssd_strong_decay"] = CASES["mamba/mamba2_ssd"]


def to_ours(case, name, x):
    """From the file's layout: retention has heads before time, Mamba-2 states `[b 1 h v k]`."""
    if case == "mom/retention":
        return np.swapaxes(x, 1, 2)
    if case.startswith("mamba/") and "state" in name:
        x = x[:, 0] if name == "initial_states" else x
        return np.swapaxes(x, -1, -2)
    return x


def run(case, file, dtype, implementation):
    """Outputs by the file's names, and gradients of both objectives by the file's names."""
    op, (names, before, output, after) = CASES[case]
    scale = 1.0 if case.startswith("mamba/") else None
    read = lambda name: jnp.asarray(to_ours(case, name, file[f"in.{name}"]), dtype)
    arrays = {name: read(name) for name in (*names, before) if name and f"in.{name}" in file}
    b, t, h, k = arrays[names[0]].shape
    v = arrays[names[2]].shape[3]

    def call(arrays):
        q, k_, v_ = (arrays[name] for name in names[:3])
        if case == "mom/retention":
            g = jnp.broadcast_to(jnp.log1p(-(2.0 ** (-5 - jnp.arange(h, dtype=dtype)))), (b, t, h))
        else:
            g = arrays[names[3]]
        s = arrays.get(before, jnp.zeros((b, h, k, v), dtype))
        state = (s, jnp.zeros((b,), jnp.int32))
        y, state = op(q, k_, v_, g, scale=scale, initial_state=state, implementation=implementation)
        return y, state.s

    dy = jnp.asarray(to_ours(case, output, file[f"ct.{output}"]), dtype)
    ds = jnp.zeros((b, h, k, v), dtype)
    if after:
        ds = jnp.asarray(to_ours(case, after, file[f"ct.{after}"]), dtype)

    @jax.jit
    def everything(arrays):
        (y, s), pull = jax.vjp(call, arrays)
        outputs = {output: y, after: s} if after else {output: y}
        return outputs, pull((dy, jnp.zeros_like(ds)))[0], pull((dy, ds))[0]

    return everything(arrays)


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "implementation, dtype",
    [
        ("xla", "float32"),
        ("reference", "float64"),
        pytest.param("xla", "float64", marks=pytest.mark.slow),
    ],
)
def test_golden(golden, case, implementation, dtype):
    file = golden(case)
    with jax.enable_x64(dtype == "float64"):
        outputs, without, with_state = jax.tree.map(
            np.asarray, run(case, file, dtype, implementation)
        )
    # The README's: float32 1e-5 and 1e-4; float64 1e-9, gradients stored in float32 1e-6.
    tolerance, of_gradients = (1e-5, 1e-4) if dtype == "float32" else (1e-9, 1e-6)
    for name, got in outputs.items():
        want = to_ours(case, name, file[f"out64.{name}"])
        assert off(got, want) < tolerance, name
    for kind, gradients in (("grad64", without), ("grad_st64", with_state)):
        stored = {key[len(kind) + 1 :] for key in file if key.startswith(f"{kind}.")}
        assert kind == "grad_st64" or stored == gradients.keys()
        for name in stored:
            want = to_ours(case, name, file[f"{kind}.{name}"])
            assert off(gradients[name], want) < of_gradients, f"{kind}.{name}"
