"""simple_gla passes the operators' suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import simple_gla
from pallas_kernels.core import testing
from pallas_kernels.simple_gla.arg_specs import named
from pallas_kernels.simple_gla.xla import XlaConfig

OWN, SHARED, EXTREME = map(named, ("own_heads", "shared_heads", "extreme"))


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_on_one_token(documents):
    testing.check_agrees(simple_gla, SHARED, 1, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("length", (*testing.FAST_LENGTHS, *testing.SLOW_LENGTHS))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_more_lengths(documents, dtype, length):
    testing.check_agrees(simple_gla, OWN, length, dtype=dtype, documents=documents)


def test_agrees_to_the_last_digits_of_float64():
    """The issue asks for 1e-12."""
    testing.check_agrees(simple_gla, OWN, 130, dtype="float64", documents=True)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_agrees_at_the_edge_of_the_domain(dtype):
    testing.check_agrees(simple_gla, EXTREME, 130, dtype=dtype, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(simple_gla, SHARED)


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_documents_alone(implementation):
    testing.check_documents_alone(simple_gla, SHARED, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(simple_gla, SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off(documents):
    testing.check_hand_off(simple_gla, SHARED, 130, 51, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(simple_gla, SHARED, 130, cut, documents=True)


@pytest.mark.slow
def test_vmap():
    testing.check_vmap(simple_gla, OWN, 37)


def test_deterministic():
    testing.check_deterministic(simple_gla, SHARED, 130)


def test_program_size():
    testing.check_program_size(simple_gla, OWN, 130, 1001, 20_001)


@pytest.mark.slow
def test_chunks():
    configs = tuple(XlaConfig(chunk=chunk) for chunk in (1, 7, 64, 200))
    testing.check_configs(simple_gla, OWN, 130, configs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(1, 8, 3, 2), k=(1, 8, 3, 2)), "q and k have 3 heads and v 4"),
        (dict(k=(1, 8, 2, 3)), r"k has shape \(1, 8, 2, 3\)"),
        (dict(g=(1, 8, 2)), r"g has shape \(1, 8, 2\)"),
    ],
)
def test_bad_calls(change, message):
    shapes = dict(q=(1, 8, 2, 2), k=(1, 8, 2, 2), v=(1, 8, 4, 3), g=(1, 8, 4))
    arrays = {name: jnp.zeros(shape) for name, shape in {**shapes, **change}.items()}
    with pytest.raises(ValueError, match=message):
        simple_gla(**arrays)


def test_bad_config():
    with pytest.raises(ValueError, match="chunk is 0"):
        XlaConfig(chunk=0)


def test_an_empty_sequence():
    y, state = jax.eval_shape(simple_gla, *(jnp.zeros((2, 0, 3, 4)),) * 3, jnp.zeros((2, 0, 3)))
    assert y.shape == (2, 0, 3, 4) and state.s.shape == (2, 3, 4, 4)


def test_weak_decays_after_strong_ones_keep_their_digits():
    """The last tokens hardly decay; differences of one running sum would be off by 1e-4."""
    t = 32
    g = np.where(np.arange(t) < t - 4, -1000.0, -0.01)[None, :, None].astype(np.float32)
    ones = jnp.ones((1, t, 1, 1))
    y, _ = simple_gla(ones, ones, ones, jnp.asarray(g), scale=1.0)
    want = 1 + np.exp(-0.01) * (1 + np.exp(-0.01) * (1 + np.exp(-0.01) * (1 + np.exp(-0.01))))
    assert abs(float(y[0, -1, 0, 0]) / want - 1) < 3e-7
