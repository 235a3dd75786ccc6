"""long_conv's TPU kernels, interpreted: the operators' suite, transforms, and what they refuse."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import long_conv
from pallas_kernels.core import testing
from pallas_kernels.core.dispatch import compiling_for, explain
from pallas_kernels.long_conv import tpu_waves
from pallas_kernels.long_conv.arg_specs import named
from pallas_kernels.long_conv.pallas_tpu import PallasTpuConfig
from pallas_kernels.long_conv.xla import XlaConfig

BARE, WHOLE, ONE_LAG, TWO_SIDED = map(named, ("bare", "whole", "one_lag", "two_sided"))
SHORT = PallasTpuConfig(interpret=True, tokens=100)
LONG = PallasTpuConfig(interpret=True, short=1, block=128)
CONFIGS = {"short": SHORT, "long": LONG}
slow = pytest.mark.slow


def how(form: str) -> dict:
    return dict(implementation="pallas_tpu", config=CONFIGS[form])


def op(
    u, kernel, skip=None, reverse_kernel=None, bias=None, pre_gate=None, post_gate=None,
    *, segment_ids=None, **more,
):  # fmt: skip
    """The operator without documents, as its kernels take it."""
    del segment_ids
    return long_conv(u, kernel, skip, reverse_kernel, bias, pre_gate, post_gate, **more)


op.axes = long_conv.axes


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("spec", [WHOLE, TWO_SIDED], ids=lambda s: s.name)
def test_agrees(spec, form):
    """The causal one with a state."""
    testing.check_agrees(op, spec, 130, **how(form))


@pytest.mark.parametrize("spec", [WHOLE, pytest.param(TWO_SIDED, marks=slow)], ids=lambda s: s.name)
@pytest.mark.parametrize("form", ["short", pytest.param("long", marks=slow)])
def test_agrees_at_one_token(spec, form):
    testing.check_agrees(op, spec, 1, **how(form))


@slow
@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [37, 63, 128, 300])
@pytest.mark.parametrize("spec", [BARE, WHOLE, ONE_LAG, TWO_SIDED], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length, form):
    testing.check_agrees(op, spec, length, dtype=dtype, **how(form))


@pytest.mark.parametrize("form", CONFIGS)
def test_agrees_in_bfloat16(form):
    """Products of bfloat16 operands, sums in float32."""
    testing.check_agrees(op, BARE, 60, dtype="bfloat16", **how(form))


@slow
def test_agrees_with_many_columns_and_two_parts():
    """M of 24: four channels to a group; one lag: places from 128 M on."""
    rng = np.random.default_rng(0)
    for t, lags in ((3000, 2500), (1500, 1)):
        u = rng.normal(size=(1, t, 3)).astype(np.float32)
        kernel = rng.normal(size=(3, lags)).astype(np.float32) / lags**0.5

        def both(implementation, config, u=u, kernel=kernel):
            run = lambda u, kernel: long_conv(
                u, kernel, implementation=implementation, config=config
            )[0]
            y, pull = jax.vjp(run, u, kernel)
            return y, *pull(jnp.cos(y))

        want = both("xla", XlaConfig(form="fft"))
        for got, expected in zip(both("pallas_tpu", LONG), want, strict=True):
            assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < 5e-6


@slow
def test_hand_off():
    testing.check_hand_off(op, WHOLE, 40, 17, **how("short"))


@slow
@pytest.mark.parametrize("form", CONFIGS)
def test_vmap(form):
    testing.check_vmap(op, WHOLE, 30, **how(form))


@pytest.mark.parametrize("form", ["short", pytest.param("long", marks=slow)])
def test_deterministic(form):
    testing.check_deterministic(op, TWO_SIDED, 30, **how(form))


@pytest.mark.parametrize("form", ["short", pytest.param("long", marks=slow)])
def test_two_lengths_in_one_process(form):
    """jax 0.11 keeps pl.num_programs of another grid; nothing here reads it."""
    for length in dict(short=(20, 33), long=(130, 300))[form]:
        testing.check_agrees(op, BARE, length, **how(form))


@pytest.mark.parametrize("form", ["short", pytest.param("long", marks=slow)])
def test_no_races(form):
    """Nor reads of what was never written, or out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", short=CONFIGS[form].short, tokens=32, block=128)
    testing.check_agrees(op, TWO_SIDED, 16, implementation="pallas_tpu", config=config)
    assert not interpreter.races.races_found


@pytest.mark.parametrize("n", [2048, 6144])
def test_two_stages_are_one(n):
    """The stages, put together, are the transform; back, twice its transpose by n."""
    m, group = tpu_waves.columns(n), tpu_waves.group(tpu_waves.columns(n))
    x = np.random.default_rng(1).normal(size=n // 2)
    z = x.reshape(-1, m).T @ tpu_waves.first_stage(n // 2 // m)  # [i2, k1]
    z = z[:, :128] + 1j * z[:, 128:]
    cos, sin = (wave[:m] for wave in tpu_waves.twiddles(n))
    second = tpu_waves.second_stage(n)
    rows = group * m
    z = (second[:m, :m] - 1j * second[rows : rows + m, :m]) @ (z * (cos - 1j * sin))
    whole = tpu_waves.one_stage(n, n // 2) @ x
    whole = (whole[: n // 2] + 1j * whole[n // 2 :]).reshape(-1)
    k = np.arange(128) + 256 * np.arange(m)[:, None]
    # The upper half of the frequencies are conjugates of the lower.
    want = np.where(
        k < n // 2,
        whole[np.minimum(k, n // 2 - 1)],
        whole[np.maximum(0, n - 1 - k) % (n // 2)].conj(),
    )
    np.testing.assert_allclose(z, want, atol=1e-9)


def test_documents_and_very_long_rows_are_refused():
    def why_not(t, segment_ids=None):
        arrays = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, t, 128), (128, t)))
        with compiling_for("TPU7x"):
            return explain(long_conv, *arrays, segment_ids=segment_ids)["pallas_tpu"]

    assert why_not(8192) is None
    assert "MiB of vector memory" in why_not(2**17)
    assert "segment ids" in why_not(64, jax.ShapeDtypeStruct((1, 64), jnp.int32))


def test_a_configuration_of_another_form_is_for_that_one():
    """Mixers name the form of xla; a kernel does as it likes."""
    arrays = testing.draw_case(op, BARE, 20).arrays
    run = lambda config: long_conv(**arrays, config=config)[0]
    assert np.array_equal(run(SHORT), run(None))  # here xla runs
    with pytest.raises(TypeError, match="takes a XlaConfig"):
        long_conv(**arrays, implementation="xla", config=SHORT)
