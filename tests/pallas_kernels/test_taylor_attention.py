"""taylor_attention passes the operators' suite in all its forms; its memory; bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import TaylorAttentionState, taylor_attention
from pallas_kernels.core import bench, dispatch, testing
from pallas_kernels.core.costs import count_flops
from pallas_kernels.taylor_attention.arg_specs import named
from pallas_kernels.taylor_attention.features import (
    feature_count,
    features,
    features_by_definition,
)
from pallas_kernels.taylor_attention.xla import XlaConfig

WHOLE, UNDIVIDED, ONE_WIDE, EXTREME = map(named, ("whole", "undivided", "one_wide", "extreme"))
# Lengths up to 150 + 2 f are the quadratic form's, so chunks must be asked for.
CHUNKED = XlaConfig(chunk=37, rows=2)
WRONG_STATE = TaylorAttentionState(
    jnp.zeros((3, 1, 7, 2)), jnp.zeros((3, 1, 6)), jnp.zeros(3, jnp.int32)
)
# One of the two is enough in the quick set for what does not touch where they differ.
FORMS = pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, id="quadratic", marks=pytest.mark.slow),
        pytest.param(CHUNKED, id="chunked"),
    ],
)


def agree(spec, length, *, dtype="float32", documents=True):
    """Its own choice, and chunks, against one run of the oracle (compiling it takes longest)."""
    case = testing.draw_case(taylor_attention, spec, length, dtype=dtype, documents=documents)
    expected = testing.oracle(taylor_attention, spec)(case)
    for config in (None, CHUNKED):
        with jax.enable_x64(dtype == "float64"):
            got = testing.results(taylor_attention, spec, config=config)(case)
        for name, array in case.arrays.items():
            assert got[f"grad.{name}"].dtype == array.dtype, name
        testing.assert_close(got, expected, dtype)


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees(documents, length):
    agree(WHOLE, length, documents=documents)


@pytest.mark.parametrize("spec", [UNDIVIDED, ONE_WIDE, EXTREME], ids=lambda s: s.name)
def test_agrees_with_other_settings(spec):
    agree(spec, 130)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    """In float64 chunked = recurrent to 1e-12 (the suite's own tolerance)."""
    agree(WHOLE, 130, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_more_lengths(documents, dtype, length):
    agree(WHOLE, length, dtype=dtype, documents=documents)


def test_state_dtypes():
    testing.check_state_dtypes(taylor_attention, WHOLE)


@pytest.mark.parametrize(
    "how",
    [dict(implementation="reference"), dict(), dict(config=CHUNKED)],
    ids=["reference", "quadratic", "chunked"],
)
def test_documents_alone(how):
    testing.check_documents_alone(taylor_attention, WHOLE, 130, **how)


@FORMS
def test_padding_only(config):
    testing.check_padding_only(taylor_attention, WHOLE, config=config)


@FORMS
def test_hand_off(config):
    testing.check_hand_off(taylor_attention, WHOLE, 130, 51, documents=True, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 37, 74, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(taylor_attention, WHOLE, 130, cut, documents=True, config=CHUNKED)


@FORMS
def test_vmap(config):
    testing.check_vmap(taylor_attention, WHOLE, 37, config=config)


@FORMS
def test_deterministic(config):
    testing.check_deterministic(taylor_attention, WHOLE, 130, config=config)


def test_program_size():
    testing.check_program_size(taylor_attention, WHOLE, 1030, 20_001)


@pytest.mark.slow
def test_configs():
    configs = [XlaConfig(form="quadratic", rows=1), XlaConfig(chunk=1), XlaConfig(chunk=500)]
    testing.check_configs(taylor_attention, WHOLE, 130, tuple(configs))


def test_the_form_follows_from_length_and_features():
    sizes = dict(b=4, h=4, k=16, v=64)
    of = lambda t: XlaConfig.heuristic({**sizes, "t": t}, "cpu")
    assert [of(t).form for t in (1, 2, 456, 457)] == ["step", "quadratic", "quadratic", "chunked"]
    assert (of(64).rows, of(256).rows) == (4, 2)
    assert XlaConfig.heuristic({**sizes, "t": 256}, "NVIDIA H100 80GB HBM3").rows is None


def test_features_are_packed():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(7, 16)), jnp.float32) for _ in range(2))
    s = jnp.sum(q * k, axis=-1)
    assert features(q).shape == (7, 153) == (7, feature_count(16))
    np.testing.assert_allclose(features(q), features_by_definition(q), rtol=1e-6)
    np.testing.assert_allclose(
        jnp.sum(features(q) * features(k), axis=-1), 1 + s + s * s / 2, rtol=2e-6, atol=1e-5
    )


def test_temporaries_are_small():
    """Under 1/8 of what 273-wide features of q and k take; measured: a hundredth of it."""
    t, h = 32_768, 4
    of = lambda width: jax.ShapeDtypeStruct((1, t, h, width), jnp.float32)
    program = bench.forward_and_gradients(taylor_attention)
    _, memory = bench.compile_(program, of(64), of(16), of(16), of(64))
    assert memory.temp_bytes < 2 * 4 * t * h * 273 / 8


def test_cost_is_about_what_the_reference_does():
    of = lambda width: jax.ShapeDtypeStruct((2, 32, 4, width), jnp.float32)
    with dispatch.forced("reference"):
        counted = count_flops(lambda *a: taylor_attention(*a)[0], of(16), of(16), of(32))
    stated = taylor_attention.cost(b=2, t=32, h=4, k=16, v=32)
    assert 1 < counted.flops / stated.flops < 2  # the reference also chooses and copies


@pytest.mark.parametrize("k", [0, 65])
def test_widths_that_the_map_cannot_serve(k):
    x = jnp.zeros((1, 3, 1, k))
    with pytest.raises(
        ValueError, match=f"width of queries and keys is {k}, .* allowed are 1 to 64"
    ):
        taylor_attention(x, x, jnp.zeros((1, 3, 1, 2)))


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(eps=-1.0), "eps is -1.0; it must be at least 0"),
        (dict(config=XlaConfig(chunk=1, rows=2)), "rows is 2, no divisor of a batch of 3"),
        (dict(config=XlaConfig(form="step")), "takes one token; there are 4"),
        (dict(initial_state=WRONG_STATE), "initial_state_kv has shape"),
    ],
)
def test_bad_calls(keywords, message):
    x = jnp.zeros((3, 4, 1, 2))
    with pytest.raises(ValueError, match=message):
        taylor_attention(x, x, x, **keywords)


@pytest.mark.parametrize("keywords", [dict(form="linear"), dict(chunk=0)])
def test_bad_configs(keywords):
    with pytest.raises(ValueError, match="form must be one of chunked, quadratic, step"):
        XlaConfig(**keywords)
