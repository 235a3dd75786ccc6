"""MEGA's moving average: golden values, its forms against the recurrence, its settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.nn.ema import EMA, FORMS
from seqzoo.nn.ema_scan import ema_scan, kernel

NAMES = ("delta", "alpha", "beta", "gamma", "omega")
IDS = np.array(
    [[1] * 20 + [2] * 30 + [0] * 3 + [3] * 10, [0] * 9 + [4] * 37 + [0] * 17, [0] * 63, [5] * 63]
)


def off(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / max(np.max(np.abs(want)), 1e-5)


def params_of(file, d, n):
    """Golden weights as ours: `[d n 1]` or `[2 d n 1]` of the source, those of the past first."""
    shape = lambda name: (d,) if name == "omega" else (-1, d, n)
    return {name: jnp.asarray(file[f"in.w.{name}"].reshape(shape(name))) for name in NAMES}


@pytest.mark.parametrize(
    "form", [FORMS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[1:])]
)
@pytest.mark.parametrize("case", ["causal", "causal_truncated", "bidirectional", "bidir_padded"])
def test_golden(golden, case, form):
    """Outputs and every gradient of the source's layer."""
    file = golden(f"tcnca/ema_{case}")
    flags = json.loads(str(file["meta"]))["flags"]
    d, n = flags["D"], flags["ndim"]
    move = EMA(
        d,
        d_state=n,
        causal=not flags["bidirectional"],
        truncation=flags.get("truncation"),
        form=form,
        rngs=nnx.Rngs(0),
    )
    graphdef, _ = nnx.split(move)
    mask = file.get("in.padding_mask")
    ids = None if mask is None else jnp.asarray(~mask, jnp.int32)
    x, ct = (jnp.asarray(np.swapaxes(file[name], 0, 1)) for name in ("in.x", "ct.y"))

    def run(params, x):
        y, _ = nnx.merge(graphdef, params)(x, segment_ids=ids)
        return jnp.sum(y * ct), y

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, y), (grads, dx) = run(params_of(file, d, n), x)
    y = np.swapaxes(y, 0, 1)
    if ids is not None:  # the source averages on into padding, and its gradients with it
        assert off(y[~mask.T], file["out64.y"][~mask.T]) < 1e-5
        return
    assert off(y, file["out64.y"]) < 1e-5
    assert off(np.swapaxes(dx, 0, 1), file["grad64.x"]) < 1e-4
    for name in NAMES:
        assert off(grads[name].reshape(-1), file[f"grad64.w.{name}"].reshape(-1)) < 1e-4, name
    if case == "causal":
        nnx.update(move, params_of(file, d, n))
        assert off(kernel(move.rates(), flags["L"]), file["out64.kernel"]) < 1e-5
        call, state, at = jax.jit(lambda x, s: move(x, state=s)), move.init_state(x.shape[0]), 0
        for i, length in enumerate(file["in.step_lengths"]):
            y, state = call(x[:, at : at + length], state)
            at += length
            assert off(np.swapaxes(y, 0, 1), file["out.y_steps"][at - length : at]) < 1e-5
            assert off(state.h, file["out.step_states"][i]) < 1e-5


def recurrence(x, rates, h, ids=None, before=0):
    """The definition in numpy, float64, of one row: y `[t d]` and h."""
    log_q, into, out = (np.asarray(r, np.float64) for r in rates)
    y = np.zeros_like(x)
    for t in range(len(x)):
        if ids is not None and ids[t] == 0:
            continue
        if ids is not None:
            h = np.zeros_like(h) if before not in (0, ids[t]) else h
            before = ids[t]
        h = np.exp(log_q) * h + into * x[t][:, None]
        y[t] = np.sum(out * h, axis=-1)
    return y, h


@functools.cache
def in_float64():
    move = EMA(4, d_state=3, rngs=nnx.Rngs(0))
    rates = jax.tree.map(np.asarray, move.rates())
    rng = np.random.default_rng(0)
    return rates, rng.normal(size=(4, 63, 4)), rng.normal(size=(4, 4, 3))


@pytest.mark.parametrize("chunk", [32, 5])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_chunks_are_the_recurrence(documents, chunk):
    """To 1e-12 in float64, with a state, whose document goes on or does not."""
    rates, x, h = in_float64()
    before = np.array([1, 4, 3, 2] if documents else [0] * 4)
    ids = IDS if documents else None
    with jax.enable_x64(True):
        rates = jax.tree.map(lambda r: jnp.asarray(r, jnp.float64), rates)
        run = jax.jit(functools.partial(ema_scan, chunk=chunk))
        y, after = run(
            x, rates, h, jnp.asarray(before), segment_ids=None if ids is None else jnp.asarray(ids)
        )
    for row in range(4):
        want_y, want_h = recurrence(
            x[row], rates, h[row], None if ids is None else ids[row], before[row]
        )
        np.testing.assert_allclose(y[row], want_y, atol=1e-12)
        np.testing.assert_allclose(after[row], want_h, atol=1e-12)


@pytest.mark.parametrize("form", ["chunk", "fft", pytest.param("monarch", marks=pytest.mark.slow)])
def test_forms_are_the_recurrence(form):
    """Kernel and recurrence to 1e-12 in float64, packed documents, both directions at once."""
    with jax.enable_x64(True):
        move = EMA(4, d_state=3, causal=False, form=form, dtype="float64", rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(move)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.as_pure(params))
        move = nnx.merge(graphdef, params)
        _, x, _ = in_float64()
        y, _ = jax.jit(lambda x: move(x, segment_ids=jnp.asarray(IDS)))(jnp.asarray(x))
        past, future = move.rates(0), move.rates(1)
        for row in range(4):
            zero, turned = np.zeros((4, 3)), np.where(IDS[row] > 0, 9 - IDS[row], 0)[::-1]
            want = recurrence(x[row], past, zero, IDS[row])[0]
            want = want + recurrence(x[row][::-1], future, zero, turned)[0][::-1]
            want = want + np.asarray(params["omega"]) * x[row]
            np.testing.assert_allclose(y[row], want / (1 + np.exp(-want)), atol=1e-12)


@pytest.mark.parametrize(
    "form, truncation",
    [("chunk", None), ("fft", 11)]
    + [
        pytest.param(form, cut, marks=pytest.mark.slow)
        for form in FORMS
        for cut in (None, 11)
        if (form, cut) not in (("chunk", None), ("fft", 11))
    ],
)
def test_streams(form, truncation):
    """A stream, step by step or in pieces, gives what the whole gives, truncated or not."""
    move = EMA(4, d_state=3, form=form, truncation=truncation, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 40, 4))
    whole, after = jax.jit(move.__call__)(x)
    call = jax.jit(lambda x, state: move(x, state=state))
    first, state = call(x[:, :20], move.init_state(2))
    second, state = call(x[:, 20:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state, after)
    step = jax.jit(lambda state, x_t: move.step(x_t, state)[::-1])
    state, stepped = jax.lax.scan(step, move.init_state(2), jnp.swapaxes(x, 0, 1))
    np.testing.assert_allclose(jnp.swapaxes(stepped, 0, 1), whole, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state, after)


def test_initial_values():
    move = EMA(256, d_state=16, rngs=nnx.Rngs(0))
    for name, std in dict(delta=0.2, alpha=0.2, gamma=1.0, omega=1.0).items():
        value = getattr(move, name)[...]
        assert float(jnp.std(value)) == pytest.approx(std, rel=0.1), name
        assert abs(float(jnp.mean(value))) < 0.2 * std, name
    beta = move.beta[...][0]
    np.testing.assert_allclose(jnp.mean(beta, axis=0), [1, -1] * 8, atol=0.01)
    assert float(jnp.std(beta[:, 0])) == pytest.approx(0.02, rel=0.2)
    q = np.exp(move.rates().log_q)
    assert q.min() > 0.6 and q.max() < 0.9  # 3/4 in the middle: an average over 4 tokens
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(move, nnx.Param)))
    assert count == 4 * 256 * 16 + 256


def test_a_decay_of_nothing_is_finite():
    """delta and alpha that overflow a sigmoid: q is 0 to the last bit of float32."""
    move = EMA(2, d_state=2, rngs=nnx.Rngs(0))
    move.delta[...] = move.alpha[...] = jnp.full((1, 2, 2), 50.0)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(move(x)[0])))
    assert np.all(np.isfinite(grad(jnp.ones((1, 40, 2)))))


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=0), "d_state is 0"),
        (dict(truncation=0), "truncation is 0"),
        (dict(form="scan"), "form is 'scan'; allowed: chunk, fft, monarch"),
        (dict(chunk=0), "chunk is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        EMA(4, **keywords, rngs=nnx.Rngs(0))


def test_both_ways_has_no_stream():
    move = EMA(4, causal=False, rngs=nnx.Rngs(0))
    for call in (lambda: move.init_state(1), lambda: move.step(jnp.zeros((1, 4)), None)):
        with pytest.raises(NotImplementedError, match="looks both ways"):
            call()


def test_float64_with_float32_parameters():
    """Decays go into powers in float64: chunks, and steps, agree to 1e-12."""
    with jax.enable_x64(True):
        move = EMA(4, d_state=3, dtype="float64", rngs=nnx.Rngs(0))
        assert move.delta.dtype == jnp.float32

        @jax.jit
        def both(x):
            step = lambda state, x_t: move.step(x_t, state)[::-1]
            state, y = jax.lax.scan(step, move.init_state(1), jnp.swapaxes(x, 0, 1))
            return move(x), (jnp.swapaxes(y, 0, 1), state)

        whole, stepped = both(in_float64()[1][:1])
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stepped), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
