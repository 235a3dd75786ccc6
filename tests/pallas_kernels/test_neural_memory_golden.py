"""neural_memory against an independent oracle in float64 (golden/titans)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import neural_memory
from pallas_kernels.neural_memory import NeuralMemoryState, Weights, recall

CASES = (
    "linear_chunk1",
    "linear_chunk4_momentum0",
    "linear_chunk4_edge_values",
    "linear_chunk8_ln",
    "mlp_gelu_chunk1",
    "mlp_gelu_chunk8",
    "mlp_gelu_chunk8_ln",
    "mlp_silu_chunk4",
)
TOKENS = ("q", "k", "v", "alpha", "eta", "theta")
# The file's names of weights to ours, with one layer and with two.
LINEAR = {"W": "w_out", "gamma": "gamma"}
TWO = {"W1": "w_in", "W2": "w_out", "gamma": "gamma"}


def swapped(x):
    """`(B, H, L, ...)` as `[b t h ...]`, and back."""
    return jnp.swapaxes(x, 1, 2)


def opened(file, dtype):
    """Keywords of a call, its inputs, and which of them are weights."""
    flags = json.loads(str(file["meta"]))["flags"]
    names = LINEAR if flags["memory"] == "linear" else TWO
    names = {theirs: ours for theirs, ours in names.items() if f"in.init_{theirs}" in file}
    inputs = {k[3:]: jnp.asarray(x, dtype) for k, x in file.items() if k.startswith("in.")}
    options = dict(chunk=int(flags["chunk"]), activation=flags.get("activation") or "gelu")
    return options, inputs, names


def call(inputs, names, options, **how):
    """y `(B, H, L, d)` and the last weights and momenta, by the file's names."""
    tokens = [swapped(inputs[n]) for n in TOKENS]
    weights = {ours: inputs[f"init_{theirs}"] for theirs, ours in names.items()}
    state = None
    if any(n.startswith("init_S_") for n in inputs):
        rows = tokens[0].shape[0]
        now = Weights(**{n: jnp.broadcast_to(w, (rows, *w.shape)) for n, w in weights.items()})
        momentum = Weights(**{ours: inputs[f"init_S_{theirs}"] for theirs, ours in names.items()})
        count = jnp.full((rows,), options["chunk"], jnp.int32)  # a full chunk behind it
        state = NeuralMemoryState(now, now, momentum, count, 0 * count)
    y, state = neural_memory(*tokens, **weights, **options, initial_state=state, **how)
    finals = {f"final_{theirs}": getattr(state.now, ours) for theirs, ours in names.items()}
    momenta = {f"final_S_{theirs}": getattr(state.momentum, n) for theirs, n in names.items()}
    return {"y": swapped(y), **finals, **momenta}


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-5)


@pytest.mark.parametrize(
    "case", ["linear_chunk1", "linear_chunk4_edge_values", "mlp_gelu_chunk8_ln"]
)
def test_golden(golden, case):
    check(golden(f"titans/{case}"), "xla", "float64")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "implementation, dtype", [("xla", "float64"), ("xla", "float32"), ("reference", "float64")]
)
def test_every_golden_file(golden, case, implementation, dtype):
    check(golden(f"titans/{case}"), implementation, dtype)


def check(file, implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        options, inputs, names = opened(file, dtype)
        run = functools.partial(call, names=names, options=options, implementation=implementation)
        outputs = jax.eval_shape(run, inputs)
        ct = {k: jnp.asarray(file[f"ct.{k}"], dtype) for k in outputs}

        @jax.jit
        def everything(inputs):
            found, pull = jax.vjp(run, inputs)
            zeros = {k: ct[k] if k == "y" else jnp.zeros_like(v) for k, v in ct.items()}
            return found, pull(zeros)[0], pull(ct)[0]

        found, without, with_state = jax.tree.map(np.asarray, everything(inputs))
    # float32: the README's. Gradients are stored in float32: half of its last digit, 6e-8.
    rough = json.loads(str(file["meta"]))["flags"].get("ln_residual") and "init_W1" in inputs
    tolerances = (3e-5 if rough else 1e-5, 1e-4) if dtype == "float32" else (1e-10, 7e-8)
    for name, got in found.items():
        assert off(got, file[f"out64.{name}"]) < tolerances[0], name
    for kind, grads in (("grad64", without), ("grad_st64", with_state)):
        assert grads.keys() == {k[len(kind) + 1 :] for k in file if k.startswith(f"{kind}.")}
        for name, got in grads.items():
            assert off(got, file[f"{kind}.{name}"]) < tolerances[1], f"{kind}.{name}"


@pytest.mark.slow
def test_read_at_the_start_of_chunks(golden):
    """`recall` with the weights between calls: the order in which MAC reads."""
    file = golden("titans/mlp_gelu_chunk8_ln")
    with jax.enable_x64(True):
        options, inputs, names = opened(file, "float64")
        tokens = [swapped(inputs[n]) for n in TOKENS]
        weights = {ours: inputs[f"init_{theirs}"] for theirs, ours in names.items()}

        @jax.jit
        def chunk(state, *tokens):
            _, after = neural_memory(*tokens, **weights, **options, initial_state=state)
            return after, recall(state.now, jnp.swapaxes(tokens[0], 1, 2))

        _, state = neural_memory(*(x[:, :0] for x in tokens), **weights, **options)
        found = []
        for i in range(0, 37, 8):
            state, y = chunk(state, *(x[:, i : i + 8] for x in tokens))
            found.append(y)
        assert off(np.concatenate(found, axis=2), file["out64.y_chunk_start"]) < 1e-10
