"""selective_scan's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from pallas_kernels import selective_scan
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.selective_scan.arg_specs import ALL, draw, named
from pallas_kernels.selective_scan.pallas_tpu import PallasTpuConfig

# Five chunks at 130 tokens; the last one is not full, nor is the block of channels.
CONFIG = PallasTpuConfig(interpret=True, chunk=32, tokens=8)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
BARE, WHOLE, EXTREME = map(named, ("bare", "whole", "extreme"))
# More than one block of channels, forward and backward; states beyond one register.
WIDE = ArgSpec(
    name="wide",
    sizes=dict(b=2, e=300, n=10),
    draw=draw,
    given=ALL,
    options=dict(delta_softplus=True),
)
slow = pytest.mark.slow


def test_agrees():
    testing.check_agrees(selective_scan, WHOLE, 130, documents=True, **HOW)


def test_agrees_on_one_token():
    testing.check_agrees(selective_scan, BARE, 1, **HOW)


@pytest.mark.parametrize("spec", [EXTREME, pytest.param(BARE, marks=slow)], ids=lambda s: s.name)
def test_agrees_with_other_settings(spec):
    testing.check_agrees(selective_scan, spec, 130, documents=spec is EXTREME, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(selective_scan, WHOLE, 130, dtype="bfloat16", documents=True, **HOW)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_on_more_channels(documents):
    config = PallasTpuConfig(interpret=True, lanes=256, channels=256, channels_backward=256)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(selective_scan, WIDE, 130, documents=documents, **how)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_more_lengths(dtype, length):
    testing.check_agrees(selective_scan, WHOLE, length, dtype=dtype, documents=True, **HOW)


def test_state_dtypes():
    testing.check_state_dtypes(selective_scan, WHOLE, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(selective_scan, WHOLE, 130, **HOW)


def test_padding_only():
    testing.check_padding_only(selective_scan, WHOLE, **HOW)


@slow
@pytest.mark.parametrize("cut", [51, 64, 129])
def test_hand_off(cut):
    testing.check_hand_off(selective_scan, WHOLE, 130, cut, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(selective_scan, WHOLE, 37, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(selective_scan, WHOLE, 130, **HOW)


@slow
def test_configs():
    of = functools.partial(PallasTpuConfig, interpret=True)
    configs = (of(chunk=16), of(chunk=128), of(chunk=64, channels=256, channels_backward=256))
    testing.check_configs(selective_scan, WHOLE, 130, configs, implementation="pallas_tpu")


@slow
def test_program_size():
    testing.check_program_size(selective_scan, WHOLE, 130, 1001, 20_001, **HOW)


def numbers(t, *, b=1, e=3, n=2):
    """Arguments without the optional ones; delta is positive."""
    rng = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return of(b, t, e), jnp.exp(of(b, t, e) - 2), -jnp.exp(of(e, n)), of(b, t, n), of(b, t, n)


def loss_and_gradients(implementation, config, arrays, ids=None):
    def loss(arrays):
        how = dict(implementation=implementation, config=config)
        y, state = selective_scan(*arrays, segment_ids=ids, **how)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.h)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(arrays))


def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    for t in (32, 96):
        arrays = numbers(t)
        got = loss_and_gradients("pallas_tpu", CONFIG, arrays)
        for a, b in zip(got, loss_and_gradients("xla", None, arrays), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


def test_without_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    config = PallasTpuConfig(interpret="races", chunk=16, tokens=8)
    arrays, ids = numbers(20), jnp.asarray([[1] * 9 + [0] * 3 + [2] * 8])
    arrays = (*arrays, arrays[2][:, 0], arrays[0])  # D, z
    got = loss_and_gradients("pallas_tpu", config, arrays, ids)
    assert not interpreter.races.races_found
    for a, b in zip(got, loss_and_gradients("xla", None, arrays, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_tiles_follow_from_sizes_and_device():
    of = lambda kind, e, n=16, itemsize=2: PallasTpuConfig.heuristic(
        dict(b=1, t=2048, e=e, n=n, itemsize=itemsize), kind
    )
    v5e, v6e = "TPU v5 lite", "TPU v6 lite"
    assert [of(v5e, e).channels for e in (1536, 5120, 1600)] == [1536, 1280, 1664]
    assert of(v5e, 1536, itemsize=4).channels_backward < of(v6e, 1536, itemsize=4).channels_backward
    assert [of(v5e, 256, n).chunk for n in (16, 64, 256)] == [128, 32, 16]


def test_refuses():
    arrays = numbers(9)
    with dispatch.compiling_for("TPU v5 lite"):
        assert dispatch.explain(selective_scan, *arrays)["pallas_tpu"] is None
        reason = dispatch.explain(selective_scan, *numbers(9, n=2000))["pallas_tpu"]
        assert "2000 states per channel take" in reason
        half = [x.astype(jnp.float16) for x in arrays]
        reason = dispatch.explain(selective_scan, *half)["pallas_tpu"]
        assert "float16; TPU kernels take float32 and bfloat16" in reason


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=48), "chunk is 48; it must be 16, 32, 64 or 128"),
        (dict(tokens=4), "tokens is 4; it must be 8 or 16"),
        (dict(lanes=256), "256 lanes of 128 channels"),
        (dict(channels_backward=100), "128 lanes of 100 channels"),
    ],
)
def test_bad_configs(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasTpuConfig(**keywords)


def test_blocks_must_end_at_one_place():
    config = PallasTpuConfig(interpret=True, channels_backward=256)
    with pytest.raises(ValueError, match="3 channels end elsewhere in blocks of channels=128"):
        selective_scan(*numbers(9), implementation="pallas_tpu", config=config)
