"""long_conv's GPU kernels, interpreted: the operators' suite, transforms, and what they refuse.

One channel in a block: the interpreter takes 7 s for the smallest call with its gradients.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import long_conv
from pallas_kernels.core import testing
from pallas_kernels.core.dispatch import compiling_for, explain
from pallas_kernels.long_conv import gpu_plan, pallas_gpu
from pallas_kernels.long_conv.arg_specs import GATES, draw, draw_flat
from pallas_kernels.long_conv.pallas_gpu import PallasGpuConfig
from pallas_kernels.long_conv.xla import XlaConfig

CAUSAL = testing.ArgSpec(
    name="causal", sizes=dict(b=1, e=1, l=70), draw=draw, given=("skip", "bias", *GATES)
)
BARE = testing.ArgSpec(name="bare", sizes=dict(b=2, e=1, l=150), draw=draw)
TWO_SIDED = testing.ArgSpec(
    name="two_sided",
    sizes=dict(b=1, e=1, l=140),
    draw=draw_flat,
    given=("skip", "reverse_kernel", *GATES),
)
CONFIG = PallasGpuConfig(interpret=True, tokens=128, channels=1)
HOW = dict(implementation="pallas_gpu", config=CONFIG)
slow = pytest.mark.slow


def op(
    u, kernel, skip=None, reverse_kernel=None, bias=None, pre_gate=None, post_gate=None,
    *, segment_ids=None, **more,
):  # fmt: skip
    """The operator without documents, as its kernels take it."""
    del segment_ids
    return long_conv(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate, **more)


op.axes = long_conv.axes


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Rows that a GPU leaves to xla are what the interpreter has the time for."""
    monkeypatch.setattr(pallas_gpu, "SHORTEST", 1)


def test_agrees():
    testing.check_agrees(op, TWO_SIDED, 130, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", [1, 37, 130, 300])
@pytest.mark.parametrize("spec", [CAUSAL, BARE, TWO_SIDED], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, length):
    """The causal one with a state; two lengths and more in one process."""
    testing.check_agrees(op, spec, length, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("t", [2100, 4100])
def test_longer_transforms_and_several_channels(t):
    """M of 32 and 64; blocks of two channels, the last one half empty."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    u, pre, post, dy = (draw(1, t, 3) for _ in range(4))
    kernel, reverse = (jnp.asarray(rng.normal(size=(3, t)) / t**0.5, jnp.float32) for _ in range(2))

    def both(implementation, config):
        def run(u, kernel, reverse, pre, post):
            gates = dict(pre_gate=pre, post_gate=post)
            more = dict(implementation=implementation, config=config)
            return long_conv(u, kernel, None, reverse, **gates, **more)[0]

        y, pull = jax.vjp(run, u, kernel, reverse, pre, post)
        return y, *pull(dy)

    want = both("xla", XlaConfig(form="fft"))
    got = both("pallas_gpu", PallasGpuConfig(interpret=True, tokens=512, channels=2))
    for one, expected in zip(got, want, strict=True):
        one, expected = (np.asarray(x, np.float32) for x in (one, expected))
        assert np.sqrt(np.mean((one - expected) ** 2) / np.mean(expected**2)) < 1e-2


@slow
def test_hand_off():
    how = dict(HOW, dtype="bfloat16")
    testing.check_hand_off(op, CAUSAL, 40, 17, **how)


@slow
def test_deterministic():
    testing.check_deterministic(op, TWO_SIDED, 30, dtype="bfloat16", **HOW)


@slow
def test_no_races():
    interpreter = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    config = PallasGpuConfig(interpret="races", tokens=128, channels=1)
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(op, TWO_SIDED, 16, dtype="bfloat16", **how)
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize("m", [16, 64])
def test_stages_are_one_transform(m):
    """The stages, put together, are the transform at one of each pair of frequencies."""
    n = 256 * m
    first, _, second, rho = (np.asarray(x, np.float64) for x in gpu_plan._waves(m))
    plane = np.random.default_rng(1).normal(size=(64, 2, m))
    r, j = np.arange(64)[:, None], np.arange(m)
    stage = np.einsum("ira,apj->irpj", first, plane)
    stage = stage[0] + 1j * stage[1]
    found = {}
    for w in (0, 1):
        u = stage[:, 0] + (-1) ** w * (rho[0] + 1j * rho[1])[:, None] * stage[:, 1]
        u = u * np.exp(-1j * np.pi * (2 * r + 1 - 256 * w) * j / n)
        spectrum = u @ (second[0] - 1j * second[1])
        k = 2 * r + 1 - 256 * w + 512 * j
        found.update(zip(k.ravel().tolist(), spectrum.ravel(), strict=True))
    assert len({k % (2 * n) for k in found} | {-k % (2 * n) for k in found}) == n
    x = plane.reshape(-1)
    for k in list(found)[:: len(found) // 50]:
        want = np.sum(x * np.exp(-1j * np.pi * k * np.arange(n // 2) / n))
        assert abs(found[k] - want) < 1e-2 * np.sqrt(n)  # the matrices are bfloat16


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "SHORTEST", gpu_plan.SHORTEST)

    def why_not(t, dtype=jnp.bfloat16, segment_ids=None, device="NVIDIA H200"):
        arrays = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, t, 128), (128, t)))
        with compiling_for(device):
            return explain(long_conv, *arrays, segment_ids=segment_ids)["pallas_gpu"]

    assert why_not(8192) is None
    assert "room for 8192" in why_not(8193)
    assert "mostly be filling" in why_not(128)
    assert "float32" in why_not(64, jnp.float32)
    assert "segment ids" in why_not(64, segment_ids=jax.ShapeDtypeStruct((1, 64), jnp.int32))
    assert "Hopper" in why_not(64, device="NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match="multiple of 128"):
        PallasGpuConfig(tokens=100)
