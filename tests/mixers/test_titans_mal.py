"""Titans with memory as a layer: the contract of a mixer, its parts, its settings."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import TitansMAL
from seqzoo.testing import PROMISES, Subject, check_promise

MAKE = functools.partial(TitansMAL, n_heads=2, head_dim=8, chunk=16, window=10)
SUBJECT = Subject(build=MAKE, d_model=16)
FAST = ("constructor", "one_graphdef", "state_bytes")


@pytest.mark.parametrize(
    "promise", [pytest.param(p, marks=() if p in FAST else pytest.mark.slow) for p in PROMISES]
)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_promise_without_persistent_tokens(promise):
    build = functools.partial(MAKE, n_persistent=0, window=3, d_conv=0)  # below the chunk
    result = check_promise(promise, Subject(build=build, d_model=16))
    assert result.outcome == "kept", result.detail


def test_parts():
    """Attention reads what the memory says; of the persistent tokens as well."""
    mixer = MAKE(16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))

    @jax.jit
    def run(x):
        opening, said = mixer.memory.opening(None)
        m, _ = mixer.memory(x, opening=opening)
        y, _ = mixer.attention(mixer.norm(m), persistent=mixer.norm(said))
        return mixer(x)[0], mixer.out_proj(y), said

    got, want, said = run(x)
    assert said.shape == (4, 16)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(window=0), "window is 0; it must be at least 1"),
        (dict(head_dim=3), "head_dim is 3; it must be at least 1, and even with rope"),
        (dict(limit="norm"), "limit is 'norm'"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MAKE(16, **keywords, rngs=nnx.Rngs(0))
