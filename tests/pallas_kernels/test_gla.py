"""gla passes the operators' suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gla
from pallas_kernels.core import testing
from pallas_kernels.gla.arg_specs import named
from pallas_kernels.gla.xla import XlaConfig

NARROW, SCALED, EXTREME = map(named, ("narrow", "scaled", "extreme"))


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_on_one_token(documents):
    testing.check_agrees(gla, SCALED, 1, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("length", (*testing.FAST_LENGTHS, *testing.SLOW_LENGTHS))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_more_lengths(documents, dtype, length):
    testing.check_agrees(gla, NARROW, length, dtype=dtype, documents=documents)


def test_agrees_to_the_last_digits_of_float64():
    """The issue asks for 1e-12."""
    testing.check_agrees(gla, NARROW, 130, dtype="float64", documents=True)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_agrees_at_the_edge_of_the_domain(dtype):
    testing.check_agrees(gla, EXTREME, 130, dtype=dtype, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(gla, SCALED)


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_documents_alone(implementation):
    testing.check_documents_alone(gla, SCALED, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(gla, SCALED)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off(documents):
    testing.check_hand_off(gla, SCALED, 130, 51, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(gla, SCALED, 130, cut, documents=True)


@pytest.mark.slow
def test_vmap():
    testing.check_vmap(gla, NARROW, 37)


@pytest.mark.slow
def test_deterministic():
    testing.check_deterministic(gla, SCALED, 130)


def test_program_size():
    testing.check_program_size(gla, NARROW, 130, 1001, 20_001)


@pytest.mark.slow
def test_chunks():
    configs = tuple(XlaConfig(chunk=chunk) for chunk in (1, 16, 64, 256))
    testing.check_configs(gla, NARROW, 130, configs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=(1, 8, 2, 3)), r"k has shape \(1, 8, 2, 3\)"),
        (dict(g=(1, 8, 2)), r"g has shape \(1, 8, 2\)"),
    ],
)
def test_bad_calls(change, message):
    shapes = dict(q=(1, 8, 2, 2), k=(1, 8, 2, 2), v=(1, 8, 2, 3), g=(1, 8, 2, 2))
    arrays = {name: jnp.zeros(shape) for name, shape in {**shapes, **change}.items()}
    with pytest.raises(ValueError, match=message):
        gla(**arrays)


@pytest.mark.parametrize("chunk", [0, 48])
def test_bad_config(chunk):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; gla halves it"):
        XlaConfig(chunk=chunk)


def test_an_empty_sequence():
    y, state = jax.eval_shape(gla, *(jnp.zeros((2, 0, 3, 4)),) * 4)
    assert y.shape == (2, 0, 3, 4) and state.s.shape == (2, 3, 4, 4)


def test_weak_decays_after_strong_ones_keep_their_digits():
    """The last tokens hardly decay; differences of one running sum would be off by 1e-4."""
    t = 32
    g = np.where(np.arange(t) < t - 4, -1000.0, -0.01)[None, :, None, None].astype(np.float32)
    ones = jnp.ones((1, t, 1, 1))
    y, _ = gla(ones, ones, ones, jnp.asarray(g), scale=1.0)
    want = 1 + np.exp(-0.01) * (1 + np.exp(-0.01) * (1 + np.exp(-0.01) * (1 + np.exp(-0.01))))
    assert abs(float(y[0, -1, 0, 0]) / want - 1) < 3e-7
