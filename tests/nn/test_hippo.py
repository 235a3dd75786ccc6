"""HiPPO matrices, the trainable family and what they become, against stored values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.nn import hippo, krylov


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize(
    "measure, name", [("legs", "legs"), ("legt", "legt_unhalved"), ("lagt",) * 2]
)
def test_matrices_are_those_of_the_source(golden, measure, name, n):
    stored = golden("lssl/hippo_N8_N64")
    for got, what in zip(hippo.MEASURES[measure](n), "AB", strict=True):
        np.testing.assert_allclose(got, stored[f"out64.{name}_N{n}_{what}"], rtol=1e-12, atol=1e-12)
    A, _ = hippo.MEASURES[measure](8)
    assert np.linalg.eigvals(A).real.max() < 0


@pytest.mark.parametrize("measure", list(hippo.MEASURES))
def test_the_family_holds_every_measure(measure):
    with jax.enable_x64(True):
        A, B = hippo.matrices(hippo.transition(measure, 64))
    want = hippo.MEASURES[measure](64)
    scale = np.abs(want[0]).max()
    np.testing.assert_allclose(A, want[0], atol=1e-13 * scale)
    np.testing.assert_allclose(B, want[1], rtol=1e-14)


def test_noise_stands_on_the_diagonal_of_legt_alone():
    noise = np.arange(8.0)
    plain, noisy = (hippo.transition("legt", 8, x) for x in (None, noise))
    np.testing.assert_allclose(noisy.d - plain.d, 1e-2 * noise, atol=1e-6)
    for name, one in hippo.transition("legs", 8, noise)._asdict().items():
        np.testing.assert_array_equal(one, getattr(hippo.transition("legs", 8), name))


def _stored(stored, measure):
    get = lambda name: stored[f"in64.{measure}_{name}"]
    padded = {name: np.pad(get(name), 1) for name in ("dl", "du")}
    return hippo.Transition(**padded, **{name: get(name) for name in ("d", "pl", "pr", "c", "b")})


@pytest.mark.parametrize("measure", [*hippo.MEASURES, "perturbed"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_the_family_against_stored_values(golden, measure, dtype, tolerance):
    stored = golden("lssl/tridiagonal_family_N16")
    with jax.enable_x64(dtype == "float64"):
        vectors = jax.tree.map(lambda x: jnp.asarray(x, dtype), _stored(stored, measure))
        A, B = hippo.matrices(vectors)
    wanted = {"A": (A, stored[f"out64.{measure}_A"])}
    if measure != "perturbed":
        wanted["B"] = (B, stored[f"out64.{measure}_B"])
    for got, want in wanted.values():
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_a_member_off_the_measures_discretised_with_its_gradients(golden, dtype, tolerance):
    stored = golden("lssl/tridiagonal_family_N16")
    get = lambda name: stored[f"in64.perturbed_{name}"]

    def run(vectors, dt, u):
        step = krylov.bilinear(*hippo.matrices(vectors), dt[None])
        return jnp.sum(jnp.asarray(get("ct"), dtype) * (step.A[0] @ u + step.B[0])), step

    with jax.enable_x64(dtype == "float64"):
        vectors = _stored(stored, "perturbed")
        arguments = jax.tree.map(lambda x: jnp.asarray(x, dtype), (vectors, get("dt"), get("u")))
        grads, step = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(*arguments)
    found = {"Abar": step.A[0], "Bbar": step.B[0]}
    for name, got in found.items():
        want = stored[f"out64.perturbed_{name}"]
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    by_name = {**grads[0]._asdict(), "dt": grads[1], "u": grads[2]}
    for name, got in by_name.items():
        want = stored[f"grad64.perturbed_{name}"]
        got = got[1:-1] if name in ("dl", "du") else got
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), err_msg=name)


def test_legs_is_normal_but_for_rank_one():
    A, _ = hippo.legs(16)
    p = np.sqrt(np.arange(16) + 0.5)
    modes = hippo.normal_legs(16)
    want = np.linalg.eigvals(A + np.outer(p, p))
    np.testing.assert_allclose(np.sort(want.imag)[8:], modes.imag, rtol=1e-10)
    np.testing.assert_allclose(modes.real, -0.5)
    np.testing.assert_allclose(want.real, -0.5, rtol=1e-10)
