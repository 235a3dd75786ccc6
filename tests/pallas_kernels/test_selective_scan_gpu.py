"""selective_scan's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import selective_scan
from pallas_kernels.core import dispatch, gpu, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.selective_scan import gpu_backward, gpu_forward, gpu_summary
from pallas_kernels.selective_scan.arg_specs import ALL, draw, draw_extreme, draw_sizes
from pallas_kernels.selective_scan.pallas_gpu import PallasGpuConfig

# Every access to memory is a call of Python, every operation is compiled: few and small.
TINY = dict(group=4, states=1, group_backward=4, states_backward=1)
SMALL = dict(interpret=True, chunk=16, **TINY)
# Nine chunks at 130 tokens; the last is not full, nor is the block of channels.
HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(**SMALL))
WHOLE, EXTREME, BARE, WIDE = (
    ArgSpec(
        name=name,
        sizes=dict(b=b, e=e, n=n),
        draw=drawn,
        given=given,
        options=dict(delta_softplus=bool(given)),
    )
    for name, b, e, n, drawn, given in (
        ("whole", 1, 3, 2, draw, ALL),
        ("extreme", 2, 3, 2, draw_extreme, ALL),
        ("bare", 2, 5, 3, draw_sizes, ()),
        ("wide", 4, 200, 6, draw, ALL),
    )
)
BACK = dict(group_backward=8, states_backward=4)
slow = pytest.mark.slow


def test_agrees():
    testing.check_agrees(selective_scan, WHOLE, 130, documents=True, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(selective_scan, WHOLE, 13, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [EXTREME, BARE, WIDE], ids=lambda s: s.name)
def test_agrees_on_more(spec, dtype):
    documents = spec is not BARE
    testing.check_agrees(selective_scan, spec, 70, dtype=dtype, documents=documents, **HOW)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_in_stretches(documents):
    """Time is cut into stretches that run side by side; one of them is padding."""
    config = PallasGpuConfig(**SMALL, splits=2, splits_backward=4)
    how = dict(implementation="pallas_gpu", config=config)
    spec = dataclasses.replace(WHOLE, sizes=dict(b=2, e=3, n=2))
    testing.check_agrees(selective_scan, spec, 45, documents=documents, **how)


@slow
@pytest.mark.parametrize("length", [1, 16, 37])
def test_agrees_at_more_lengths(length):
    testing.check_agrees(selective_scan, BARE, length, documents=True, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(selective_scan, BARE, 20, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(selective_scan, EXTREME, **HOW)


@slow
def test_hand_off():
    testing.check_hand_off(selective_scan, EXTREME, 50, 33, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(selective_scan, WHOLE, 20, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(selective_scan, WHOLE, 20, **HOW)


@slow
def test_configs():
    configs = (
        PallasGpuConfig(interpret=True, chunk=32, tile=32, group=16, **BACK),
        PallasGpuConfig(interpret=True),
    )
    testing.check_configs(selective_scan, WHOLE, 70, configs, implementation="pallas_gpu")


def numbers(t, *, b=1, e=3, n=2):
    """Arguments without the optional ones; delta is positive."""
    rng = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return of(b, t, e), jnp.exp(of(b, t, e) - 2), -jnp.exp(of(e, n)), of(b, t, n), of(b, t, n)


def loss_and_gradients(implementation, config, arrays):
    def loss(arrays):
        y, state = selective_scan(*arrays, implementation=implementation, config=config)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.h)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(arrays))


@slow
def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    config = PallasGpuConfig(**SMALL)
    for t in (16, 48):
        arrays = numbers(t)
        got = loss_and_gradients("pallas_gpu", config, arrays)
        for a, b in zip(got, loss_and_gradients("xla", None, arrays), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


@slow
def test_without_races():
    """No buffer is read before what is fetched into it is there."""
    config = PallasGpuConfig(**SMALL | dict(interpret="races"))
    arrays = numbers(33)
    got = loss_and_gradients("pallas_gpu", config, (*arrays, arrays[2][:, 0], arrays[0]))
    assert not interpreter.get_races().races_found
    wanted = loss_and_gradients("xla", None, (*arrays, arrays[2][:, 0], arrays[0]))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_tiles_follow_from_sizes():
    of = lambda b, t, e, n, itemsize: PallasGpuConfig.heuristic(
        dict(b=b, t=t, e=e, n=n, itemsize=itemsize)
    )
    assert [of(8, 2048, 2048, *x).chunk for x in ((16, 2), (16, 4), (64, 2))] == [64, 32, 16]
    # Stretches of time where blocks are few, and where padding up to them is little.
    of_splits = lambda *sizes: (of(*sizes, 16, 2).splits, of(*sizes, 16, 2).splits_backward)
    assert of_splits(1, 2048, 1536) == (16, 8)
    assert of_splits(1, 2000, 1536) == (8, 8)
    assert of_splits(1, 300, 1536) == of_splits(1, 128, 1536) == (1, 1)
    assert of_splits(8, 2048, 2048) == (1, 1)


@pytest.mark.parametrize("n", [16, 48])
@pytest.mark.parametrize("wide", [(), ("delta",), ("z",), ("u",), ("u", "delta", "z")], ids=str)
def test_shared_memory_suffices(wide, n, monkeypatch):
    """Whichever argument is float32: what the kernels ask for, where nobody chose tiles."""
    asked = {}

    def kernel_call(body, *, name, out_type, scratch_types, **_):
        buffers = [x for x in scratch_types if hasattr(x, "dtype")]  # the others are barriers
        asked[name] = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
        return lambda *_: [jnp.zeros(one.shape, one.dtype) for one in out_type]

    for module in (gpu_forward, gpu_backward, gpu_summary):
        monkeypatch.setattr(module, "kernel_call", kernel_call)

    def call(u, delta, A, B, C, z):
        run = lambda *x: selective_scan(*x[:5], z=x[5], implementation="pallas_gpu")[0]
        y, pull = jax.vjp(run, u, delta, A, B, C, z)
        return pull(y)

    shape = lambda name, *s: jax.ShapeDtypeStruct(s, "float32" if name in wide else "bfloat16")
    along = lambda name: shape(name, 1, 512, 128)
    with dispatch.compiling_for("NVIDIA H200"):
        jax.eval_shape(
            call,
            along("u"),
            along("delta"),
            shape("u", 128, n),
            shape("B", 1, 512, n),
            shape("C", 1, 512, n),
            along("z"),
        )
    assert set(asked) >= {"selective_scan_forward", "selective_scan_backward"}
    assert max(asked.values()) <= gpu.SHARED_MEMORY - 1024, asked


def test_refuses():
    arrays = numbers(9)
    reason = lambda arrays: dispatch.explain(selective_scan, *arrays)["pallas_gpu"]
    with dispatch.compiling_for("NVIDIA H200"):
        assert reason(arrays) is None
        assert "200 states per channel do not fit" in reason(numbers(9, n=200))
        half = [x.astype(jnp.float16) for x in arrays]
        assert "float16; GPU kernels take float32 and bfloat16" in reason(half)
    with dispatch.compiling_for("NVIDIA A100-SXM4-80GB"):
        assert "it is written for Hopper" in reason(arrays)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=48), "chunk is 48; it must be one of 64, 32, 16"),
        (dict(states=3), "states is 3; it must be one of 1, 2, 4, 8"),
        (dict(states_backward=4), "states_backward x group_backward is 64; it must be 32"),
        (dict(tile=24), "tile is 24; it must be a multiple of group=8 and divide chunk=64"),
        (dict(tile=8), "tile is 8; it must be a multiple of 16"),
    ],
)
def test_bad_configs(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasGpuConfig(**keywords)
