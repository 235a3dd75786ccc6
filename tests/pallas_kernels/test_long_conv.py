"""long_conv passes the operators' suite, and what is its own: its forms, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LongConvState, long_conv
from pallas_kernels.core import testing
from pallas_kernels.long_conv import fft
from pallas_kernels.long_conv.arg_specs import named
from pallas_kernels.long_conv.monarch import factors
from pallas_kernels.long_conv.xla import XlaConfig

BARE, WHOLE, ONE_LAG, TWO_SIDED = map(named, ("bare", "whole", "one_lag", "two_sided"))
DIRECT, FFT, MONARCH = (XlaConfig(form=form) for form in ("direct", "fft", "monarch"))
THREE = XlaConfig(form="monarch", stages=3)
slow = pytest.mark.slow


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("spec", [WHOLE, TWO_SIDED], ids=lambda s: s.name)
def test_agrees(spec, length, documents):
    testing.check_agrees(long_conv, spec, length, documents=documents)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", [BARE, WHOLE, TWO_SIDED], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(long_conv, spec, length, dtype=dtype, documents=True)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_with_one_lag(documents):
    testing.check_agrees(long_conv, ONE_LAG, 37, documents=documents)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=slow)])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(long_conv, BARE, 130, dtype=dtype, documents=True)


@pytest.mark.parametrize("config", [DIRECT, FFT, MONARCH, THREE], ids=["direct", "fft", "2", "3"])
@pytest.mark.parametrize("spec", [BARE, pytest.param(TWO_SIDED, marks=slow)], ids=lambda s: s.name)
def test_forms_agree_to_the_last_digits_of_float64(spec, config):
    """The issue asks for 1e-12: Fourier, Monarch and Toeplitz form, every gradient."""
    testing.check_agrees(long_conv, spec, 130, dtype="float64", config=config)


@slow
@pytest.mark.parametrize("config", [DIRECT, FFT, MONARCH, THREE], ids=["direct", "fft", "2", "3"])
@pytest.mark.parametrize("spec", [WHOLE, TWO_SIDED], ids=lambda s: s.name)
def test_forms_agree_on_packed_documents(spec, config):
    testing.check_configs(long_conv, spec, 130, (config,))


def test_state_dtypes():
    testing.check_state_dtypes(long_conv, WHOLE)


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=slow), "xla"])
@pytest.mark.parametrize("spec", [WHOLE, pytest.param(TWO_SIDED, marks=slow)], ids=lambda s: s.name)
def test_documents_alone(spec, implementation):
    testing.check_documents_alone(long_conv, spec, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(long_conv, WHOLE)


@pytest.mark.parametrize("length, cut", [(40, 17), pytest.param(130, 51, marks=slow)])
@pytest.mark.parametrize("documents", [pytest.param(False, marks=slow), True])
def test_hand_off(documents, length, cut):
    testing.check_hand_off(long_conv, WHOLE, length, cut, documents=documents)


@slow
@pytest.mark.parametrize("cut", [1, 32, 64, 129])
def test_hand_off_at_more_cuts(cut):
    testing.check_hand_off(long_conv, BARE, 130, cut, documents=True)


@slow
def test_vmap():
    testing.check_vmap(long_conv, WHOLE, 37)


@slow
def test_deterministic():
    testing.check_deterministic(long_conv, WHOLE, 130)


@pytest.mark.parametrize("config", [None, MONARCH], ids=["auto", "monarch"])
def test_program_size(config):
    testing.check_program_size(long_conv, BARE, 130, 1001, 20_001, config=config)


def draw(b=2, t=40, e=3, lags=40, seed=0):
    rng = np.random.default_rng(seed)
    u, kernel, reverse = (rng.normal(size=s) for s in ((b, t, e), (e, lags), (e, lags)))
    return (jnp.asarray(x, jnp.float32) for x in (u, kernel, reverse))


@pytest.mark.parametrize("lags", [40, 7, 64], ids=["as long", "shorter", "longer"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_alignment(implementation, lags):
    """Lag 0 is the kernel's alone; reverse_kernel[0] falls on the next token."""
    u, kernel, reverse = draw(lags=lags)
    call = functools.partial(long_conv, implementation=implementation)
    y, state = jax.jit(call)(u, kernel, reverse_kernel=reverse)
    want = np.zeros(u.shape)
    for t in range(40):
        for s in range(40):
            taps, lag = (kernel, t - s) if s <= t else (reverse, s - t - 1)
            if lag < lags:
                want[:, t] += taps[:, lag] * u[:, s]
    assert state is None
    np.testing.assert_allclose(y, want, atol=2e-5)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_no_state_is_a_state_of_zeros(documents):
    u, kernel, _ = draw(lags=25)
    ids = jnp.repeat(jnp.arange(4), 10)[None].repeat(2, axis=0) if documents else None
    zeros = LongConvState(jnp.zeros((2, 24, 3)), jnp.zeros((2,), jnp.int32))
    call = jax.jit(long_conv)
    got = call(u, kernel, segment_ids=ids)
    want = call(u, kernel, initial_state=zeros, segment_ids=ids)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=slow), True])
def test_padding_alone_moves_nothing(ahead):
    """One document with padding around it is what it is without, in the very program for many."""
    u, kernel, reverse = draw()
    reverse = reverse if ahead else None
    call = jax.jit(lambda u, ids: long_conv(u, kernel, None, reverse, segment_ids=ids)[0])
    ids = np.zeros((2, 40), np.int32)
    ids[0, 3:33], ids[1, :21] = 1, 2
    padded = call(u, ids)
    second = ids + (ids > 0) * (np.arange(40) > 12)  # and now two documents
    packed = call(u, second)
    for row, places in ((0, slice(3, 33)), (1, slice(0, 21))):
        alone, _ = long_conv(u[row : row + 1, places], kernel, None, reverse)
        np.testing.assert_allclose(padded[row, places], alone[0], atol=2e-5)
    np.testing.assert_allclose(
        packed[0, 3:13], long_conv(u[:1, 3:13], kernel, None, reverse)[0][0], atol=2e-5
    )


@pytest.mark.parametrize("form", ["direct", "fft", "monarch"])
def test_causality(form):
    """To the bit in the direct form, else to 1e-5 of the largest output."""
    u, kernel, _ = draw(t=100, lags=100)
    run = jax.jit(lambda u: long_conv(u, kernel, config=XlaConfig(form=form))[0])
    before, after = (np.asarray(run(x))[:, :57] for x in (u, u.at[:, 57].add(3.0)))
    allowed = 0 if form == "direct" else 1e-5 * np.abs(before).max()
    assert np.abs(after - before).max() <= allowed


def test_a_token_needs_no_transform():
    u, kernel, _ = draw(t=1, lags=64)
    state = LongConvState(jnp.ones((2, 63, 3)), jnp.zeros((2,), jnp.int32))
    step = lambda u, kernel, state: long_conv(u, kernel, initial_state=state)
    assert "fft" not in str(jax.make_jaxpr(step)(u, kernel, state))
    assert "fft" in str(jax.make_jaxpr(step)(jnp.tile(u, (1, 64, 1)), kernel, state))


def test_keeps_nothing_but_what_it_was_given():
    u, kernel, reverse = draw(t=200, lags=200)
    gates = jnp.ones_like(u), jnp.ones_like(u)

    def run(*arrays):
        return long_conv(arrays[0], arrays[1], None, reverse, None, *arrays[2:])[0]

    _, pull = jax.vjp(run, u, kernel, *gates)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull))
    assert kept <= 1.01 * sum(x.nbytes for x in (u, kernel, reverse, *gates))


def test_rounded_operands():
    """bfloat16 products with float32 sums: within 1e-2, gradients too."""
    u, kernel, _ = draw(t=300, lags=300)
    dy = jnp.cos(jnp.arange(u.size).reshape(u.shape) * 1.7)

    def results(config):
        y, pull = jax.vjp(lambda *x: long_conv(*x, config=config)[0], u, kernel)
        return y, *pull(dy)

    rounded = XlaConfig(form="monarch", operands="bfloat16")
    both = jax.jit(lambda: (results(rounded), results(FFT)))()
    for got, want in zip(*both, strict=True):
        off = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert 1e-4 < off < 1e-2


@pytest.mark.parametrize("form", ["fft", "monarch"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite(form, bad):
    """Every output of its channel is nan, none of another channel."""
    u, kernel, _ = draw()
    call = jax.jit(functools.partial(long_conv, config=XlaConfig(form=form)))
    y, _ = call(u, kernel.at[1, 30].set(bad))
    assert np.isnan(y[:, :, 1]).all() and np.isfinite(y[:, :, ::2]).all()


def test_factors_hold_the_length():
    for least in (1, 2, 17, 259, 4097, 262_143):
        for stages in (1, 2, 3, 4):
            found = factors(least, stages)
            assert len(found) == stages
            assert least <= np.prod(found) < least + np.prod(found[1:])


def test_lengths_that_transform_fast():
    assert [fft.fitting(n) for n in (1, 7, 11, 259, 2049, 2**24)] == [
        *(1, 8, 12, 288, 2304, 2**24),
    ]


@pytest.mark.parametrize("name", ["bidir_L37", "causal_L40_of_64"])
@pytest.mark.parametrize(
    "how",
    [dict(implementation="reference"), dict(config=FFT), dict(config=MONARCH)],
    ids=["reference", "fft", "monarch"],
)
def test_golden(golden, name, how):
    """M2's own convolution; kernels are given, so gradients are those of x and the skip."""
    file = golden(f"monarch_mixer/hyena_filter_{name}")

    @jax.jit
    def results(x, kernel, skip, reverse, dy):
        run = lambda x, skip: long_conv(x.swapaxes(1, 2), kernel, skip, reverse, **how)[0]
        y, pull = jax.vjp(run, x, skip)
        return y.swapaxes(1, 2), *pull(dy.swapaxes(1, 2))

    with jax.enable_x64(True):
        names = ("in.x", "out64.k_fwd", "in.w.f.bias", "out64.k_rev", "ct.y")
        wide = (None if n not in file else np.asarray(file[n], np.float64) for n in names)
        y, dx, dskip = results(*wide)
    np.testing.assert_allclose(y, file["out64.y"], atol=1e-12)
    np.testing.assert_allclose(dx, file["grad64.x"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dskip, file["grad64.w.f.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kernel=(4, 8)), r"kernel has shape \(4, 8\)"),
        (dict(kernel=(3, 0)), "kernel has no lags"),
        (dict(skip=(4,)), r"skip has shape \(4,\)"),
        (dict(reverse_kernel=(3, 9)), r"reverse_kernel has shape \(3, 9\)"),
        (dict(post_gate=(2, 9, 3)), r"post_gate has shape \(2, 9, 3\)"),
    ],
)
def test_bad_calls(change, message):
    shapes = dict(u=(2, 8, 3), kernel=(3, 8)) | change
    with pytest.raises(ValueError, match=message):
        long_conv(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_a_state_of_the_wrong_length():
    u, kernel, _ = draw()
    state = LongConvState(jnp.zeros((2, 40, 3)), jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match="initial_state_v has shape"):
        long_conv(u, kernel, initial_state=state)


def test_looking_ahead_has_no_state():
    u, kernel, reverse = draw()
    state = LongConvState(jnp.zeros((2, 39, 3)), jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match="looks ahead has no state"):
        long_conv(u, kernel, reverse_kernel=reverse, initial_state=state)


def test_a_transform_that_is_too_long():
    u = jax.ShapeDtypeStruct((1, 2**23 + 1, 1), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1, 2**23 + 1), jnp.float32)
    with pytest.raises(ValueError, match="cut the sequence into chunks"):
        jax.eval_shape(long_conv, u, kernel)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(form="toeplitz"), "form='toeplitz'; allowed are"),
        (dict(form="monarch", stages=7), "stages=7; allowed are"),
        (dict(form="fft", stages=2), "belong to form='monarch'"),
    ],
)
def test_bad_config(keywords, message):
    with pytest.raises(ValueError, match=message):
        XlaConfig(**keywords)


def test_an_empty_sequence():
    u, kernel, reverse = draw(t=0, lags=5)
    y, state = long_conv(u, kernel)
    assert y.shape == (2, 0, 3) and state.v.shape == (2, 4, 3)
    assert long_conv(u, kernel, reverse_kernel=reverse)[1] is None
