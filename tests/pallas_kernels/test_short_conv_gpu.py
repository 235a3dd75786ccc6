"""short_conv's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import short_conv
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.short_conv.arg_specs import draw
from pallas_kernels.short_conv.pallas_gpu import PallasGpuConfig

# Five stretches of two tiles at 130 tokens; every access to memory is a call of Python: few rows.
CONFIG = PallasGpuConfig(interpret=True, tile=16, stretch=32)
HOW = dict(implementation="pallas_gpu", config=CONFIG)
SILU = dict(given=("bias",), options=dict(activation="silu"))
WHOLE = ArgSpec(name="whole", sizes=dict(b=1, e=3, w=4), draw=draw, **SILU)
ROWS = ArgSpec(name="rows", sizes=dict(b=4, e=130, w=4), draw=draw, **SILU)
ONE_TAP = ArgSpec(name="one_tap", sizes=dict(b=4, e=1, w=1), draw=draw, given=("bias",))
LONG = ArgSpec(name="long", sizes=dict(b=4, e=3, w=9), draw=draw)
slow = pytest.mark.slow


def test_agrees():
    testing.check_agrees(short_conv, WHOLE, 130, documents=True, **HOW)


def test_agrees_in_bfloat16():
    config = PallasGpuConfig(interpret=True, tile=16, stretch=16)
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(short_conv, WHOLE, 13, dtype="bfloat16", **how)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("spec", [ROWS, ONE_TAP, LONG], ids=lambda s: s.name)
def test_agrees_on_more(spec, documents):
    testing.check_agrees(short_conv, spec, 70, documents=documents, **HOW)


@slow
@pytest.mark.parametrize("length", [1, 2, 32, 37])
def test_agrees_at_more_lengths(length):
    testing.check_agrees(short_conv, LONG, length, documents=True, **HOW)


@slow
@pytest.mark.parametrize("first", [0, 15, 30, 31, 32, 33, 65])
def test_padding_before_the_first_token(first):
    """The inputs of the state lie in one stretch, before one, or come after whole ones."""
    case = testing.draw_case(short_conv, WHOLE, 70, documents=True)
    ids = np.where(np.arange(70) < first, 0, 1)[None].astype(np.int32)
    case = case._replace(segment_ids=ids)
    got = testing.results(short_conv, WHOLE, **HOW)(case)
    expected = testing.oracle(short_conv, WHOLE)(case)
    testing.assert_close(got, expected, "float32", implementation="pallas_gpu")


@slow
def test_documents_alone():
    testing.check_documents_alone(short_conv, LONG, 40, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(short_conv, WHOLE, **HOW)


@slow
@pytest.mark.parametrize("cut", [31, 49])
def test_hand_off(cut):
    testing.check_hand_off(short_conv, ROWS, 50, cut, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(short_conv, WHOLE, 20, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(short_conv, WHOLE, 20, **HOW)


@slow
def test_configs():
    configs = (
        PallasGpuConfig(interpret=True, stretch=48),
        PallasGpuConfig(interpret=True, tile=32),
    )
    testing.check_configs(short_conv, WHOLE, 70, configs, implementation="pallas_gpu")


def numbers(t, *, w=4):
    rng = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return of(1, t, 3), of(w, 3)


def loss_and_gradients(implementation, config, arrays):
    def loss(arrays):
        how = dict(implementation=implementation, config=config)
        y, state = short_conv(*arrays, activation="silu", **how)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.x)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(arrays))


@slow
def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    for t in (32, 96):
        arrays = numbers(t)
        got = loss_and_gradients("pallas_gpu", CONFIG, arrays)
        for a, b in zip(got, loss_and_gradients("xla", None, arrays), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


@slow
def test_without_races():
    """No buffer is read before what is fetched into it is there."""
    config = PallasGpuConfig(interpret="races", tile=16, stretch=32)
    arrays = numbers(70)
    got = loss_and_gradients("pallas_gpu", config, arrays)
    assert not interpreter.get_races().races_found
    for a, b in zip(got, loss_and_gradients("xla", None, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_stretches_follow_from_sizes():
    of = lambda b, t, e: PallasGpuConfig.heuristic(dict(b=b, t=t, e=e, w=4))
    cut = [(of(*x).tile, of(*x).stretch) for x in ((1, 2048, 1536), (8, 2048, 2048), (1, 320, 64))]
    assert cut == [(16, 128), (16, 256), (16, 64)]
    assert [of(1, t, 64).stretch for t in (1, 150)] == [16, 16]


def test_refuses():
    reason = lambda arrays: dispatch.explain(short_conv, *arrays)["pallas_gpu"]
    with dispatch.compiling_for("NVIDIA H200"):
        assert reason(numbers(9)) is None
        assert "weight has 18 taps; the kernel takes at most 17" in reason(numbers(9, w=18))
        half = [x.astype(jnp.float16) for x in numbers(9)]
        assert "float16; GPU kernels take float32 and bfloat16" in reason(half)
    with dispatch.compiling_for("NVIDIA A100-SXM4-80GB"):
        assert "it is written for Hopper" in reason(numbers(9))


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(tile=64), "tile is 64; it must be 16 or 32"),
        (dict(stretch=40), "stretch is 40; it must be a multiple of tile=16"),
    ],
)
def test_bad_configs(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasGpuConfig(**keywords)
