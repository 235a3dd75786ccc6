"""chunk_attention by cuDNN, as far as it can be seen without a GPU: what it is asked for, and when.

Numbers are those of XLA in cuDNN's place: the same function of jax, with the same keywords.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels import chunk_attention
from pallas_kernels.chunk_attention import pallas_gpu
from pallas_kernels.chunk_attention.forms import form_of
from pallas_kernels.core.dispatch import compiling_for, explain

HOW = dict(implementation="pallas_gpu", config=pallas_gpu.PallasGpuConfig(interpret=True))


@pytest.fixture
def cudnn(monkeypatch):
    """A machine that has it."""
    monkeypatch.setattr(pallas_gpu, "_no_cudnn", lambda: None)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)


def draw(t: int, width: int = 8) -> list:
    rng = np.random.default_rng(t)
    return [jnp.asarray(rng.normal(size=(2, t, heads, width)), jnp.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("t", [20, pytest.param(3, marks=pytest.mark.slow)])
def test_the_window_is_ours(t, cudnn, monkeypatch):
    """Outputs, gradients, and a state with which the xla form goes on."""
    monkeypatch.setattr(pallas_gpu, "_IMPLEMENTATION", "xla")
    arrays = draw(t)

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, *arrays):
        how = HOW if implementation == "pallas_gpu" else dict(implementation=implementation)
        run = functools.partial(chunk_attention, window=6, **how)
        y, pull, state = jax.vjp(run, *arrays, has_aux=True)
        return *pull(jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)), y, *state

    for got, want in zip(both("pallas_gpu", *arrays), both("xla", *arrays), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03, rtol=0.02
        )


def test_cudnn_is_called_forward_and_backward(cudnn):
    def loss(*arrays):
        return jnp.sum(chunk_attention(*arrays, window=6, **HOW)[0].astype(jnp.float32))

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = step.trace(*draw(64, 64)).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    window = text.split("sliding_window_length")[1][:8]
    assert "6" in window and "CAUSAL" in text


def test_what_is_refused(cudnn):
    def why_not(width=64, dtype=jnp.bfloat16, device="NVIDIA H200", values=None, ids=None, **more):
        make = lambda heads, k: jax.ShapeDtypeStruct((1, 32, heads, k), dtype)
        shapes = make(4, width), make(2, width), make(2, values or width), *[None] * 5, ids
        options = dict(window=16, chunk=None, fresh=True) | more
        form = form_of(**options, score="softmax", causal=True, scale=None, width=64, bias=False)
        return pallas_gpu.refuses(shapes, device) or pallas_gpu.refuses_options(
            shapes, device, form=form
        )

    assert why_not() is None
    assert "float32" in why_not(dtype=jnp.float32)
    assert "multiples of 8" in why_not(width=20)
    assert "one width" in why_not(values=32)
    assert "xla's" in why_not(window=None, chunk=16)
    assert "segment ids" in why_not(ids=jax.ShapeDtypeStruct((1, 32), jnp.int32))
    assert "state comes in" in why_not(fresh=False)
    assert "Hopper" in why_not(device="NVIDIA A100-SXM4-80GB")


def test_without_a_gpu_the_reason_is_given():
    with compiling_for("NVIDIA H200"):
        reasons = explain(chunk_attention, *draw(32, 64), window=16)
    assert "no GPU" in reasons["pallas_gpu"]
