"""short_conv's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from pallas_kernels import short_conv
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.short_conv.arg_specs import draw, named
from pallas_kernels.short_conv.pallas_tpu import PallasTpuConfig

# Two tiles at 130 tokens; the second is nearly empty, and so is the block of channels.
CONFIG = PallasTpuConfig(interpret=True, tile=128)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
BARE, WHOLE, ONE_TAP = map(named, ("bare", "whole", "one_tap"))
# More than one block of channels, the last one not full.
WIDE = ArgSpec(name="wide", sizes=dict(b=2, e=300, w=9), draw=draw)
slow = pytest.mark.slow


@pytest.mark.parametrize("length", (*testing.FAST_LENGTHS, 2))
def test_agrees(length):
    testing.check_agrees(short_conv, WHOLE, length, documents=length != 1, **HOW)


@pytest.mark.parametrize("spec", [ONE_TAP, WIDE], ids=lambda s: s.name)
def test_agrees_with_other_settings(spec):
    testing.check_agrees(short_conv, spec, 300, documents=spec is ONE_TAP, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(short_conv, WHOLE, 130, dtype="bfloat16", documents=True, **HOW)


@slow
@pytest.mark.parametrize("length", (*testing.SLOW_LENGTHS, 1000))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [BARE, WIDE], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(short_conv, spec, length, dtype=dtype, documents=True, **HOW)


@slow
@pytest.mark.parametrize("first", [0, 125, 126, 127, 128, 129])
def test_padding_before_the_first_token(first):
    """The inputs of the state lie in one tile, in two, or in none."""
    case = testing.draw_case(short_conv, WHOLE, 130, documents=True)
    ids = np.where(np.arange(130) < first, 0, 1)[None].repeat(4, axis=0).astype(np.int32)
    case = case._replace(segment_ids=ids)
    got = testing.results(short_conv, WHOLE, **HOW)(case)
    expected = testing.oracle(short_conv, WHOLE)(case)
    testing.assert_close(got, expected, "float32", implementation="pallas_tpu")


def test_state_dtypes():
    testing.check_state_dtypes(short_conv, WHOLE, **HOW)


def test_documents_alone():
    testing.check_documents_alone(short_conv, WHOLE, 130, **HOW)


def test_padding_only():
    testing.check_padding_only(short_conv, WHOLE, **HOW)


@pytest.mark.parametrize("length, cut", [(130, 51), (4, 2)])
def test_hand_off(length, cut):
    testing.check_hand_off(short_conv, WHOLE, length, cut, documents=True, **HOW)


def test_vmap():
    testing.check_vmap(short_conv, WHOLE, 37, **HOW)


def test_deterministic():
    testing.check_deterministic(short_conv, WHOLE, 130, **HOW)


@slow
def test_configs():
    of = functools.partial(PallasTpuConfig, interpret=True)
    configs = (of(tile=256), of(tile=128, channels=256))
    testing.check_configs(short_conv, WHOLE, 300, configs, implementation="pallas_tpu")


@slow
def test_program_size():
    testing.check_program_size(short_conv, WHOLE, 130, 1001, 20_001, **HOW)


def numbers(t, *, b=1, e=3, w=4):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((b, t, e), (w, e), (e,))]


def loss_and_gradients(implementation, config, arrays, ids=None):
    def loss(arrays):
        how = dict(implementation=implementation, config=config, activation="silu")
        y, state = short_conv(*arrays, segment_ids=ids, **how)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.x)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(arrays))


def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
    for t in (128, 384, 256):
        arrays = numbers(t)
        got = loss_and_gradients("pallas_tpu", CONFIG, arrays)
        for a, b in zip(got, loss_and_gradients("xla", None, arrays), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


def test_without_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    config = PallasTpuConfig(interpret="races", tile=128)
    arrays, ids = numbers(150), jnp.asarray([[0] * 2 + [1] * 127 + [0] * 3 + [2] * 18])
    got = loss_and_gradients("pallas_tpu", config, arrays, ids)
    assert not interpreter.races.races_found
    for a, b in zip(got, loss_and_gradients("xla", None, arrays, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_tiles_follow_from_sizes_and_device():
    of = lambda kind, t, e, itemsize=2: PallasTpuConfig.heuristic(
        dict(b=1, t=t, e=e, w=4, itemsize=itemsize), kind
    )
    v5e, v6e = "TPU v5 lite", "TPU v6 lite"
    assert [of(v5e, t, 1536).tile for t in (3, 200, 4096)] == [128, 256, 512]
    assert of(v5e, 4096, 1536).channels < of(v6e, 4096, 1536).channels == 1536


def test_refuses():
    with dispatch.compiling_for("TPU v5 lite"):
        assert dispatch.explain(short_conv, *numbers(9))["pallas_tpu"] is None
        reason = dispatch.explain(short_conv, *numbers(9, w=18))["pallas_tpu"]
        assert reason == "weight has 18 taps; the kernel takes at most 17"
        half = [x.astype(jnp.float16) for x in numbers(9)]
        reason = dispatch.explain(short_conv, *half)["pallas_tpu"]
        assert "float16; TPU kernels take float32 and bfloat16" in reason


@pytest.mark.parametrize("keywords", [dict(tile=100), dict(tile=0), dict(channels=64)])
def test_bad_configs(keywords):
    with pytest.raises(ValueError, match="both must be multiples of 128"):
        PallasTpuConfig(**keywords)
