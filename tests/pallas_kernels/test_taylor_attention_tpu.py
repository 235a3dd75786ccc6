"""taylor_attention's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from pallas_kernels import taylor_attention
from pallas_kernels.core import dispatch, testing
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.taylor_attention.arg_specs import draw, named, settle
from pallas_kernels.taylor_attention.features import features
from pallas_kernels.taylor_attention.pallas_tpu import PallasTpuConfig
from pallas_kernels.taylor_attention.tpu_features import orders, phi, pull, rows_of

# Two chunks to a block, three blocks at 130 tokens; the last one is not full.
CONFIG = PallasTpuConfig(interpret=True, chunk=32, block=64)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
WHOLE, UNDIVIDED, ONE_WIDE, EXTREME = map(named, ("whole", "undivided", "one_wide", "extreme"))
# Wide as in a model: every feature is there, and no rows are padding.
WIDE = ArgSpec(name="wide", sizes=dict(b=2, h=2, k=16, v=16), draw=draw, settle=settle)
slow = pytest.mark.slow


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees(documents):
    testing.check_agrees(taylor_attention, WHOLE, 130, documents=documents, **HOW)


@pytest.mark.parametrize(
    "spec",
    [EXTREME, *(pytest.param(spec, marks=slow) for spec in (UNDIVIDED, ONE_WIDE, WIDE))],
    ids=lambda s: s.name,
)
def test_agrees_with_other_settings(spec):
    testing.check_agrees(taylor_attention, spec, 130, documents=True, **HOW)


def test_agrees_in_bfloat16():
    testing.check_agrees(taylor_attention, WHOLE, 130, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_at_more_lengths(dtype, length):
    testing.check_agrees(taylor_attention, WHOLE, length, dtype=dtype, documents=True, **HOW)


@slow
def test_agrees_with_tiles_of_its_own_choice():
    config = PallasTpuConfig.heuristic(dict(WIDE.sizes, t=300), "TPU v5 lite")
    assert (config.chunk, config.block, config.heads) == (128, 384, 2)
    config = PallasTpuConfig(interpret=True, chunk=128, block=256, heads=2)
    how = dict(implementation="pallas_tpu", config=config)
    testing.check_agrees(taylor_attention, WIDE, 300, documents=True, **how)


@slow
def test_state_dtypes():
    testing.check_state_dtypes(taylor_attention, WHOLE, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(taylor_attention, WHOLE, 130, **HOW)


def test_padding_only():
    testing.check_padding_only(taylor_attention, WHOLE, **HOW)


def test_hand_off():
    testing.check_hand_off(taylor_attention, WHOLE, 130, 51, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(taylor_attention, WHOLE, 37, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(taylor_attention, WHOLE, 130, **HOW)


@slow
def test_configs():
    of = functools.partial(PallasTpuConfig, interpret=True)
    configs = (of(chunk=8, block=8), of(chunk=160, block=160, heads=2), of(chunk=16, block=64))
    testing.check_configs(taylor_attention, WHOLE, 130, configs, implementation="pallas_tpu")


def test_two_lengths_in_one_process():
    """jax 0.11 may take the number of steps of one grid for that of another."""
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
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 1e-5


def test_without_races():
    """The slow interpreter: no races, nothing read that was not written, nothing out of bounds."""
    config = PallasTpuConfig(interpret="races", chunk=8, block=16)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 20, 2, n)), jnp.float32) for n in (2, 2, 3))
    ids = jnp.asarray([[1] * 5 + [0] * 3 + [2] * 12])

    def program(implementation, config, *arrays):
        y, _ = taylor_attention(
            *arrays, segment_ids=ids, implementation=implementation, config=config
        )
        return jnp.sum(jnp.sin(y))

    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(program, *how), (0, 1, 2)))(q, k, v)
        for how in (("pallas_tpu", config), ("xla", None))
    )
    assert not interpreter.races.races_found
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [3, pytest.param(16, marks=slow), pytest.param(20, marks=slow)])
def test_features_are_those_of_the_other_forms_in_another_order(k):
    padded = -(-k // 16) * 16
    places, back = orders(k, padded)
    x = np.random.default_rng(0).normal(size=(7, k)).astype(np.float32)
    g = np.random.default_rng(1).normal(size=(rows_of(padded), 7)).astype(np.float32)

    @jax.jit
    def both(x):
        columns = jnp.pad(x, [(0, 0), (0, padded - k)]).T
        made, transposed = jax.vjp(phi, columns)
        return made, pull(columns, g), transposed(g)[0], features(x)

    made, pulled, expected, others = map(np.asarray, both(x))
    assert made.shape == (rows_of(padded), 7)
    np.testing.assert_allclose(made[back].T, others, rtol=1e-6)
    others = np.pad(others, [(0, 0), (0, 1)])  # zeros for rows without a feature
    np.testing.assert_allclose(made, others[:, places].T, rtol=1e-6)
    np.testing.assert_allclose(pulled, expected, rtol=1e-4, atol=1e-5)


def test_blocks_follow_from_sizes_and_device():
    of = lambda kind, t, v, itemsize, h=16: PallasTpuConfig.heuristic(
        dict(b=1, t=t, h=h, k=16, v=v, itemsize=itemsize), kind
    )
    v5e, v6e = "TPU v5 lite", "TPU v6 lite"
    assert (of(v5e, 8192, 64, 2).block, of(v5e, 8192, 112, 4).block) == (2048, 1024)
    assert of(v6e, 8192, 112, 4).block == 2048
    assert of(v5e, 2100, 64, 2).block == 1152  # two of one length
    assert [of(v5e, t, 64, 2).heads for t in (100, 600, 2048)] == [4, 2, 1]
    assert of(v5e, 100, 64, 2, h=3).heads == 3
    wide = PallasTpuConfig.heuristic(dict(b=1, t=300, h=2, k=64, v=256, itemsize=4), v5e)
    assert wide.vmem_limit_bytes is not None


@pytest.mark.parametrize(
    "k, v, dtype, reason",
    [
        (64, 1024, "float32", "MiB of vector memory"),
        (4, 4, "float16", "float16; TPU kernels take float32 and bfloat16"),
    ],
)
def test_refuses(k, v, dtype, reason):
    of = lambda n: jax.ShapeDtypeStruct((1, 9, 1, n), dtype)
    with dispatch.compiling_for("TPU v5 lite"):
        reasons = dispatch.explain(taylor_attention, of(k), of(k), of(v))
        assert reason in reasons["pallas_tpu"]
        assert (
            dispatch.explain(taylor_attention, *[jnp.ones((1, 9, 1, 4))] * 3)["pallas_tpu"] is None
        )


def test_a_single_token_is_xlas():
    """A name is exactly that form or an error; without one, decoding takes xla's step quietly."""
    x = jnp.ones((1, 1, 1, 4))
    with pytest.raises(NotImplementedError, match="one token is one pass over the state"):
        taylor_attention(x, x, x, **HOW)
    with dispatch.compiling_for("TPU v5 lite"):
        reasons = dispatch.explain(taylor_attention, x, x, x)
        assert reasons["xla"] is None and "xla's step" in reasons["pallas_tpu"]
        jaxpr = str(jax.make_jaxpr(lambda x: taylor_attention(x, x, x)[0])(x))
        assert "pallas_call" not in jaxpr


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(chunk=64), "chunk must be a multiple of 128"),
        (dict(chunk=0), "and both at least 1"),
        (dict(block=200), "block is 200; it must be a multiple of the chunk, 128"),
    ],
)
def test_bad_configs(keywords, message):
    with pytest.raises(ValueError, match=message):
        PallasTpuConfig(**keywords)


def test_heads_must_divide():
    config = PallasTpuConfig(interpret=True, heads=2)
    with pytest.raises(ValueError, match="config.heads is 2, no divisor of 3 heads"):
        x = jnp.ones((1, 5, 3, 2))
        taylor_attention(x, x, x, implementation="pallas_tpu", config=config)
