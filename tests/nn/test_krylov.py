"""Dense state spaces: kernel, answer of a state and state after, against the recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.nn import hippo, krylov

E, M, N = 3, 2, 8


def recurrence(step, C, u, x):
    """u `[e b t]` and x `[e b n]` give y `[e b m t]` and the state after; one token at a time."""
    ys = []
    for i in range(u.shape[-1]):
        x = np.einsum("enk,ebk->ebn", step.A, x) + step.B[:, None] * u[..., i, None]
        ys.append(np.einsum("emn,ebn->ebm", C, x))
    return np.stack(ys, -1) if ys else None, x


@functools.cache
def system(measure="legs"):
    with jax.enable_x64(True):
        A, B = (jnp.asarray(x) for x in hippo.MEASURES[measure](N))
        step = krylov.bilinear(A, B, jnp.asarray([1e-3, 1e-2, 1e-1]))
        return krylov.Discrete(*(np.asarray(x) for x in step))


def draw(t):
    rng = np.random.default_rng(t)
    return rng.normal(size=(E, M, N)), rng.normal(size=(E, 2, t)), rng.normal(size=(E, 2, N))


@pytest.mark.parametrize("t", [1, 130, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 64))])
def test_forms_agree(t):
    C, u, x = draw(t)
    step = system()
    want, after = recurrence(step, C, u, x)

    @jax.jit
    def run(step, C, u, x):
        k, _ = krylov.kernel(step, C, t)
        chunks, _ = krylov.scan(step, C, u)
        after = krylov.absorb(step, u[..., ::-1], t, x)
        return k, krylov.respond(step, C, x, t), chunks, after

    with jax.enable_x64(True):
        k, old, chunks, got = map(np.asarray, run(step, C, u, x))
    assert k.shape == (E, M, t)
    y = np.stack([np.einsum("ebi,emi->ebm", u[..., : i + 1], k[..., i::-1]) for i in range(t)], -1)
    np.testing.assert_allclose(y + old, want, atol=1e-12 * np.abs(want).max())
    np.testing.assert_allclose(got, after, atol=1e-12 * np.abs(after).max())
    np.testing.assert_allclose(np.swapaxes(chunks, 2, 3), y, atol=1e-12 * np.abs(y).max())


def test_rows_that_look_back_differently_far():
    C, u, x = draw(37)
    step, count = system(), np.array([0, 21])
    u[0], u[:, 0], u[:, 1, 21:] = u[0], 0, 0  # the latest first; nothing behind what is counted
    with jax.enable_x64(True):
        got = krylov.absorb(step, jnp.asarray(u), jnp.asarray(count), jnp.asarray(x))
        fresh = krylov.absorb(step, jnp.asarray(u), jnp.asarray(count))
    for row, n in enumerate(count):
        inputs = u[:, row : row + 1, :n][..., ::-1]
        _, want = recurrence(step, C, inputs, x[:, row : row + 1])
        np.testing.assert_allclose(got[:, row], want[:, 0], atol=1e-12)
        _, want = recurrence(step, C, inputs, 0 * x[:, row : row + 1])
        np.testing.assert_allclose(fresh[:, row], want[:, 0], atol=1e-12)


@pytest.mark.parametrize("measure", list(hippo.MEASURES))
def test_discretisation(measure):
    A, B = hippo.MEASURES[measure](N)
    step = system(measure)
    for i, dt in enumerate([1e-3, 1e-2, 1e-1]):
        below = np.eye(N) - dt / 2 * A
        np.testing.assert_allclose(
            step.A[i], np.linalg.solve(below, np.eye(N) + dt / 2 * A), atol=1e-13
        )
        np.testing.assert_allclose(step.B[i], np.linalg.solve(below, dt * B), atol=1e-13)


def test_growth_bounds_the_spectral_radius():
    step = system()
    radius = np.abs(np.stack([np.diag(a) for a in step.A])).max(1)  # lower triangular
    with jax.enable_x64(True):
        _, growth = krylov.kernel(step, np.ones((E, M, N)), 4096)
        _, large = krylov.kernel(step._replace(A=1.1 * step.A), np.ones((E, M, N)), 4096)
    assert np.all(growth >= radius - 1e-12) and np.all(growth < radius + 2e-3)
    assert np.all(large >= 1.1 * radius - 1e-12) and np.all(large < 1.1 * radius + 2e-3)


def test_blocks_of_features_change_nothing(monkeypatch):
    C, _, _ = draw(37)
    step = jax.tree.map(np.float32, system())

    def run(A, B, C):
        make = lambda A, B, C: krylov.kernel(krylov.Discrete(A, B), C, 37)[0]
        return jnp.sum(jnp.sin(krylov.in_blocks(make, (A, B, C), N)))

    arguments = tuple(jnp.asarray(a, jnp.float32) for a in (*step, C))
    grad = lambda: jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*arguments)
    want = grad()
    monkeypatch.setattr(krylov, "_BLOCK", N * N)
    for a, b in zip(jax.tree.leaves(grad()), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.abs(b).max()))


def test_float32_keeps_its_digits():
    """What a rounded product would break by 1e-2: long memories over many tokens."""
    C, _, _ = draw(1000)
    with jax.enable_x64(True):
        want = np.asarray(krylov.kernel(system(), C, 1000)[0])
    A, B = (jnp.asarray(x, jnp.float32) for x in hippo.legs(N))
    step = krylov.bilinear(A, B, jnp.asarray([1e-3, 1e-2, 1e-1], jnp.float32))
    got, _ = jax.jit(krylov.kernel, static_argnums=2)(step, jnp.asarray(C, jnp.float32), 1000)
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < 1e-4


def test_inverses_need_no_order_of_rows():
    """Pivots are looked for: a matrix whose diagonal is 0 has an inverse too."""
    M = np.random.default_rng(0).normal(size=(3, 5, 5)) * (1 - np.eye(5))
    found = jax.jit(krylov.inverse)(jnp.asarray(M, jnp.float32))
    np.testing.assert_allclose(found @ M, np.broadcast_to(np.eye(5), M.shape), atol=2e-5)
