"""S4D: the contract of a mixer, its kernel by definition, three forms in float64, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import S4D
from seqzoo.mixers.s4d import INITS
from seqzoo.nn import diagonal
from seqzoo.nn.param import own_rates
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=functools.partial(S4D, d_state=8), d_model=8)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


def discretised(A, dt, how):
    """By the formulas, in complex numbers."""
    z = dt[:, None] * A
    if how == "zoh":
        return np.exp(z), (np.exp(z) - 1) / A
    return (1 + z / 2) / (1 - z / 2), dt[:, None] / (1 - z / 2)


@pytest.mark.parametrize("how, length", [("zoh", 1), ("zoh", 130), ("bilinear", 130)])
def test_kernel_by_definition(how, length):
    rng = np.random.default_rng(0)
    A = -np.exp(rng.normal(size=(3, 4))) + 20j * rng.normal(size=(3, 4))
    C = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))
    dt = np.array([1e-3, 1e-2, 1e-1])
    a, b = discretised(A, dt, how)
    powers = a[..., None] ** np.arange(length)
    want = 2 * np.einsum("en,en,enl->el", C, b, powers).real

    @jax.jit
    def run(A, dt, C):
        step = diagonal.DISCRETIZATIONS[how](A, dt)
        return jnp.exp(step.log_A), step.B, diagonal.kernel(step, C, length)

    with jax.enable_x64(True):
        got_a, got_b, got = run(A, dt, C)
    np.testing.assert_allclose(got_a, a, atol=1e-14)
    np.testing.assert_allclose(got_b, b, rtol=1e-11)
    np.testing.assert_allclose(got, want, atol=1e-12 * np.abs(want).max())
    got = run(A.astype("complex64"), dt.astype("float32"), C.astype("complex64"))[2]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_bilinear_mode_that_forgets_at_once():
    """A real mode with dt A near -2, where Abar goes through 0."""
    dt = jnp.asarray([3.99, 3.9995, 4.0, 4.0005, 4.01])

    def kernel(dt):
        step = diagonal.bilinear(jnp.full((5, 1), -0.5 + 0j), dt)
        return diagonal.kernel(step, jnp.ones((5, 1), complex), 3)

    x = np.asarray(dt, np.float64) / 4
    by_hand = 2 * 4 * x / (1 + x) * ((1 - x) / (1 + x)) ** np.arange(3)[:, None]
    np.testing.assert_allclose(kernel(dt), by_hand.T, atol=2e-6)
    assert np.all(np.isfinite(jax.grad(lambda dt: jnp.sum(kernel(dt)))(dt)))


@pytest.mark.parametrize("how", ["zoh", pytest.param("bilinear", marks=pytest.mark.slow)])
def test_three_forms_in_float64(how):
    """Steps = kernel and convolution = chunks, with documents and padding, to 1e-10."""
    with jax.enable_x64(True):
        mixer = S4D(4, d_state=16, discretization=how, dtype="float64", rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(1), (2, 60, 4), jnp.float64)
        ids = np.where(np.arange(60) < 47, 1, 2)[None].repeat(2, 0).astype(np.int32)
        ids[1, :3] = ids[1, 58:] = 0
        call = jax.jit(mixer.__call__)
        whole, end = call(x)
        packed, packed_end = call(x, segment_ids=ids)
        state = packed_state = mixer.init_state(2)
        chunks, packed_chunks = [], []
        for i in range(0, 60, 20):
            y, state = call(x[:, i : i + 20], state=state)
            chunks.append(y)
            y, packed_state = call(
                x[:, i : i + 20], segment_ids=ids[:, i : i + 20], state=packed_state
            )
            packed_chunks.append(y)
        one = lambda state, x_t: mixer.step(x_t, state)[::-1]
        last, steps = jax.jit(lambda s, x: jax.lax.scan(one, s, x))(
            mixer.init_state(2), jnp.swapaxes(x, 0, 1)
        )
    assert whole.dtype == jnp.float64 and state.h.dtype == jnp.float64
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max())
    close(jnp.swapaxes(steps, 0, 1), whole)
    close(jnp.concatenate(chunks, 1), whole)
    close(jnp.concatenate(packed_chunks, 1), packed)
    for other in (last.h, state.h):
        close(other, end.h)
    close(packed_state.h, packed_end.h)
    close(packed[0, :47], whole[0, :47])


def test_initial_values():
    n = np.arange(4)
    laws = {name: law(8) for name, law in INITS.items()}
    for A in laws.values():
        np.testing.assert_allclose(A.real, -0.5)
        assert A.shape == (4,)
    np.testing.assert_allclose(laws["lin"].imag, np.pi * n, rtol=1e-6)
    np.testing.assert_allclose(laws["inv"].imag, 8 / np.pi * (8 / (2 * n + 1) - 1), rtol=1e-6)
    # The highest mode of LegS grows as n^2 / pi (section 4.2).
    assert abs(INITS["legs"](256).imag[-1] / (256**2 / np.pi) - 1) < 0.05
    mixer = S4D(256, d_state=8, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(mixer.log_A_real[...]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(mixer.A_imag[...][1], np.pi * n, rtol=1e-6)
    dt = np.exp(mixer.log_dt[...])
    assert 1e-3 <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1
    C = mixer.C_real[...] + 1j * mixer.C_imag[...]
    assert abs(np.mean(np.abs(C) ** 2) - 1) < 0.1


def test_parameters_and_their_rates():
    e, n = 6, 8
    for glu in (True, False):
        mixer = S4D(e, d_state=n, glu=glu, rngs=nnx.Rngs(0))
        leaves = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
        projection = (2 if glu else 1) * (e * e + e)
        assert sum(v[...].size for _, v in leaves) == 4 * e * n // 2 + 2 * e + projection
        own = {path[-1]: own_rates(v).lr for path, v in leaves if own_rates(v)}
        assert own == dict.fromkeys(("log_dt", "log_A_real", "A_imag"), 1e-3)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=3), "d_state is 3; it must be even"),
        (dict(init="random"), "init is 'random'; allowed: lin, inv, legs"),
        (dict(discretization="euler"), "discretization is 'euler'; allowed: zoh, bilinear"),
        (dict(dt_min=0.2), "dt_min is 0.2 and dt_max 0.1"),
        (dict(activation="tanh"), "activation is 'tanh'; allowed: gelu"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        S4D(4, **keywords, rngs=nnx.Rngs(0))
