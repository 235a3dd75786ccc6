"""gated_delta_rule passes the operators' suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule
from pallas_kernels.core import testing
from pallas_kernels.gated_delta_rule.arg_specs import named
from pallas_kernels.gated_delta_rule.xla import XlaConfig

BARE, WHOLE, REPEATED, EXTREME = map(named, ("bare", "whole", "repeated", "extreme"))


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees(documents, length):
    testing.check_agrees(gated_delta_rule, WHOLE, length, documents=documents)


def test_agrees_with_one_head():
    testing.check_agrees(gated_delta_rule, BARE, 130)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_more_lengths(documents, dtype, length):
    testing.check_agrees(gated_delta_rule, WHOLE, length, dtype=dtype, documents=documents)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(gated_delta_rule, WHOLE, 130, dtype=dtype, documents=True)


def test_agrees_at_the_edge_of_the_domain():
    testing.check_agrees(gated_delta_rule, EXTREME, 130, documents=True)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_repeated_keys(documents):
    """Chunks of 64 in float32: 1e-5 of the largest value, where a product of powers loses all."""
    case = testing.draw_case(gated_delta_rule, REPEATED, 130, documents=documents)
    expected = testing.oracle(gated_delta_rule, REPEATED)(case)
    got = testing.results(gated_delta_rule, REPEATED, config=XlaConfig(chunk=64))(case)
    for name, want in expected.items():
        if name != "state.last_id":
            assert np.max(np.abs(got[name] - want)) <= 1e-5 * np.max(np.abs(want)), name


@pytest.mark.slow
@pytest.mark.parametrize("spec", [REPEATED, EXTREME], ids=lambda s: s.name)
def test_hard_keys_in_float64(spec):
    testing.check_agrees(gated_delta_rule, spec, 200, dtype="float64", documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(gated_delta_rule, WHOLE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_alone(implementation):
    testing.check_documents_alone(gated_delta_rule, WHOLE, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(gated_delta_rule, WHOLE)


def test_hand_off():
    testing.check_hand_off(gated_delta_rule, WHOLE, 130, 51, documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(gated_delta_rule, WHOLE, 130, cut, documents=True)


def test_vmap():
    testing.check_vmap(gated_delta_rule, WHOLE, 37)


def test_deterministic():
    testing.check_deterministic(gated_delta_rule, WHOLE, 130)


def test_program_size():
    testing.check_program_size(gated_delta_rule, WHOLE, 130, 1001, 20_001)


def test_configs():
    """Chunks below the blocks of the inverse, and a last span that is filled up."""
    testing.check_configs(gated_delta_rule, WHOLE, 130, (XlaConfig(chunk=8, span=5),))


def test_spans_of_memories():
    """Spans that are filled up by empty chunks leave the memories as they are."""
    rng = np.random.default_rng(0)
    arrays = testing.draw_case(gated_delta_rule, WHOLE, 256).arrays
    s = rng.normal(size=(4, 3, 2, 6, 4)).astype(np.float32)
    block_memory = np.sort(rng.integers(0, 3, (4, 4)), axis=1).astype(np.int32)

    def run(config, implementation="xla"):
        call = lambda s: gated_delta_rule(
            **arrays,
            block_memory=block_memory,
            initial_state=(s, np.zeros((4, 3), np.int32)),
            implementation=implementation,
            config=config,
        )
        (y, state), pull = jax.vjp(jax.jit(call), s)
        float0 = np.zeros((4, 3), jax.dtypes.float0)
        (ds,) = pull((jnp.ones_like(y), type(state)(jnp.ones_like(state.s), float0)))
        return {"y": np.asarray(y), "s": np.asarray(state.s), "ds": np.asarray(ds)}

    testing.assert_close(run(XlaConfig(chunk=32, span=3)), run(None, "reference"), "float32")


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=48), "chunk is 48; it must be 1 to 16, or 16 times a power of two"),
        (dict(chunk=0), "chunk is 0"),
        (dict(span=0), "span is 0"),
    ],
)
def test_bad_config(keywords, message):
    with pytest.raises(ValueError, match=message):
        XlaConfig(**keywords)


def test_bad_shapes():
    arrays = testing.draw_case(gated_delta_rule, BARE, 5).arrays
    with pytest.raises(ValueError, match=r"beta has shape \(4, 4, 1\)"):
        gated_delta_rule(**{**arrays, "beta": arrays["beta"][:, 1:]})
