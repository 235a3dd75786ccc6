"""taylor_attention's GPU kernels, interpreted: the operators' suite, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import taylor_attention
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.taylor_attention import pallas_gpu
from pallas_kernels.taylor_attention.arg_specs import draw, draw_extreme, settle
from pallas_kernels.taylor_attention.features import features
from pallas_kernels.taylor_attention.gpu_layout import Widths, tables
from pallas_kernels.taylor_attention.pallas_gpu import PallasGpuConfig

# Every access to memory is a call of Python: one head, three chunks at 130 tokens.
HOW = dict(implementation="pallas_gpu", config=PallasGpuConfig(interpret=True))
of = lambda name, k, v, drawn=draw, b=1, h=1, **options: ArgSpec(
    name=name, sizes=dict(b=b, h=h, k=k, v=v), draw=drawn, settle=settle, options=options
)
WHOLE = of("whole", 4, 5)
# In a model: three warpgroups share features and values out.
WIDE = of("wide", 16, 20, b=2, h=2)
MORE = (
    of("undivided", 3, 2, scale=-0.7, normalize=False),
    of("one_wide", 1, 1, eps=0.0),
    of("extreme", 6, 3, draw_extreme),
    of("two", 12, 17),  # two warpgroups
)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Refused on a GPU, for gradients at some widths; at those here it agrees."""
    monkeypatch.setattr(pallas_gpu, "FLOAT32", True)


def test_agrees():
    testing.check_agrees(taylor_attention, WHOLE, 130, documents=True, **HOW)


def test_agrees_in_bfloat16():
    """Sums; gradients take longer, below."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 70, 1, n)), jnp.bfloat16) for n in (4, 4, 5))
    got, _ = taylor_attention(q, k, v, **HOW)
    want, _ = taylor_attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="xla")
    assert got.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((got.astype(jnp.float32) - want) ** 2) / np.mean(want**2)) < 1e-2


@slow
def test_gradients_agree_in_bfloat16():
    testing.check_agrees(taylor_attention, WHOLE, 130, dtype="bfloat16", documents=True, **HOW)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("spec", MORE, ids=lambda s: s.name)
def test_agrees_with_other_settings(spec, documents):
    testing.check_agrees(taylor_attention, spec, 130, dtype="bfloat16", documents=documents, **HOW)


@slow
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_at_the_widths_of_a_model(documents):
    testing.check_agrees(taylor_attention, WIDE, 130, dtype="bfloat16", documents=documents, **HOW)


@slow
@pytest.mark.parametrize("length", [2, 63, 64, 128, 200])
def test_agrees_at_more_lengths(length):
    testing.check_agrees(taylor_attention, WHOLE, length, documents=True, **HOW)


@slow
def test_state_dtypes():
    testing.check_state_dtypes(taylor_attention, WHOLE, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(taylor_attention, of("rows", 4, 5, b=2), 70, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(taylor_attention, WHOLE, **HOW)


@slow
def test_hand_off():
    testing.check_hand_off(taylor_attention, WHOLE, 130, 51, documents=True, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(taylor_attention, WHOLE, 130, **HOW)


@slow
def test_two_lengths_in_one_process():
    rng = np.random.default_rng(0)

    def everything(how, arrays):
        def total(*arrays):
            y, state = taylor_attention(*arrays, **how)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state.kv)) + jnp.sum(state.z)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays)

    for steps in (1, 3):
        arrays = [rng.normal(size=(1, 64 * steps, 1, 2)).astype(np.float32) for _ in range(3)]
        got, want = everything(HOW, arrays), everything(dict(implementation="xla"), arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 2e-5


@slow
@pytest.mark.parametrize("slots", [1, 2])
def test_without_races(slots):
    """Three warpgroups, each a thread of the interpreter's, forward and backward.

    Three threads that wait for each other need as many of XLA's: conftest.py's devices bring them.
    """
    config = PallasGpuConfig(interpret="races", slots=slots)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 190, 1, n)), jnp.bfloat16) for n in (13, 13, 20))
    ids = jnp.asarray([[1] * 5 + [0] * 3 + [2] * 182])

    def program(*arrays):
        how = dict(segment_ids=ids, implementation="pallas_gpu", config=config)
        return jnp.sum(jnp.sin(taylor_attention(*arrays, **how)[0].astype(jnp.float32)))

    gradients = jax.jit(jax.grad(program, (0, 1, 2)))(q, k, v)
    assert not interpreter.get_races().races_found
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in gradients)


@pytest.mark.parametrize("k", [3, 16])
def test_features_are_those_of_the_other_forms(k):
    rng = np.random.default_rng(0)
    q, x = (rng.normal(size=(7, k)).astype(np.float32) for _ in range(2))
    widths = Widths.of_sizes(k, 64)
    known = {name: np.asarray(table, np.float32) for name, table in tables(widths, 0.3).items()}

    def made(x, factor):
        x = np.pad(x, [(0, 0), (0, 16 - k)])
        left, right = np.einsum("tk,jifk->ijtf", x, known["select"]) + np.moveaxis(
            known["ones"][:, :, None], 1, 0
        )
        found = left * right * known[factor][:, None]
        return np.moveaxis(found, 0, 1).reshape(7, -1)

    with jax.disable_jit():
        want, scaled = features(jnp.asarray(x)), features(jnp.asarray(0.3 * q, jnp.float32))
    np.testing.assert_allclose(made(x, "of_k")[:, : want.shape[1]], want, rtol=1e-6)
    np.testing.assert_allclose(made(q, "of_q")[:, : want.shape[1]], scaled, rtol=1e-5, atol=1e-7)
    assert not np.any(made(x, "of_k")[:, want.shape[1] :])


@pytest.mark.parametrize(
    "k, v, shares",
    [
        (16, 64, [(0, 0, 32), (32, 0, 32)]),  # the third has the sum of weights
        (16, 112, [(0, 0, 48), (48, 0, 48), (80, 16, 32)]),
        (12, 17, [(0, 0, 32)]),
        (4, 5, [(0, 0, 16)]),
    ],
)
def test_every_value_has_one_warpgroup_that_sends_it(k, v, shares):
    assert Widths.of_sizes(k, v).shares() == shares


@pytest.mark.parametrize(
    "k, v, dtype, kind, reason",
    [
        (16, 64, "bfloat16", "NVIDIA H100 80GB HBM3", None),
        (16, 112, "bfloat16", "NVIDIA H200", None),
        (8, 64, "float32", "NVIDIA H200", "not that exact yet"),
        (24, 64, "bfloat16", "NVIDIA H200", "24 wide; the kernel's features are those of 16 or"),
        (16, 128, "bfloat16", "NVIDIA H200", "values are 128 wide; a state of more than 112"),
        (16, 64, "float16", "NVIDIA H200", "float16"),
        (16, 64, "bfloat16", "NVIDIA A100-SXM4-80GB", "written for Hopper"),
    ],
)
def test_refuses(k, v, dtype, kind, reason, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "FLOAT32", False)
    shape = lambda n: jax.ShapeDtypeStruct((1, 9, 1, n), dtype)
    with dispatch.compiling_for(kind):
        found = dispatch.explain(taylor_attention, shape(k), shape(k), shape(v))["pallas_gpu"]
    assert found is None if reason is None else reason in found


def test_a_single_token_is_xlas():
    """A name is exactly that form or an error; without one, decoding takes xla's step quietly."""
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="one token is one pass over the state"):
        taylor_attention(x, x, x, **HOW)
    with dispatch.compiling_for("NVIDIA H200"):
        reasons = dispatch.explain(taylor_attention, x, x, x)
        assert reasons["xla"] is None and "xla's step" in reasons["pallas_gpu"]
        jaxpr = str(jax.make_jaxpr(lambda x: taylor_attention(x, x, x)[0])(x))
        assert "mosaic" not in jaxpr and "core_map" not in jaxpr and "mpmd_map" not in jaxpr


def test_bad_config():
    with pytest.raises(ValueError, match="slots is 3; it must be 1 or 2"):
        PallasGpuConfig(slots=3)
