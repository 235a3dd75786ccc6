"""The chunked form of chunk_attention passes the operators' suite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunk_attention
from pallas_kernels.chunk_attention.arg_specs import named
from pallas_kernels.chunk_attention.scores import DEVIATION, MEAN
from pallas_kernels.chunk_attention.xla import XlaConfig
from pallas_kernels.core import bench, dispatch, testing
from pallas_kernels.core.costs import Cost, count_flops

CHUNKS, LAPLACE, LONG, SHARP = map(named, ("chunks", "laplace", "long_chunks", "sharp_chunks"))
TWO_SIDED, TWO_SIDED_LAPLACE = map(named, ("two_sided", "two_sided_laplace"))
ALL = (CHUNKS, LAPLACE, LONG, SHARP, TWO_SIDED, TWO_SIDED_LAPLACE)
by_name = dict(ids=lambda spec: spec.name)
slow = pytest.mark.slow


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("spec", [CHUNKS, TWO_SIDED], **by_name)
def test_agrees(spec, length):
    testing.check_agrees(chunk_attention, spec, length, documents=spec is CHUNKS)


@pytest.mark.parametrize("spec", [LAPLACE, LONG, TWO_SIDED_LAPLACE], **by_name)
def test_agrees_for_other_scores(spec):
    testing.check_agrees(chunk_attention, spec, 130, documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", (2, 37, 128, 200))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", ALL, **by_name)
def test_agrees_at_more_lengths(spec, dtype, length):
    documents = length != 128
    testing.check_agrees(chunk_attention, spec, length, dtype=dtype, documents=documents)


@pytest.mark.parametrize("spec", [LAPLACE, TWO_SIDED], **by_name)
@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=slow), "xla"])
def test_documents_alone(implementation, spec):
    testing.check_documents_alone(chunk_attention, spec, 50, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(chunk_attention, CHUNKS)


def test_hand_off():
    testing.check_hand_off(chunk_attention, CHUNKS, 130, 51, documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 19, 20, 129])
@pytest.mark.parametrize("spec", [CHUNKS, LAPLACE], **by_name)
def test_hand_off_at_more_cuts(spec, cut):
    testing.check_hand_off(chunk_attention, spec, 130, cut, documents=cut % 2 == 0)


@pytest.mark.slow
def test_vmap():
    testing.check_vmap(chunk_attention, CHUNKS, 37)


@pytest.mark.slow
def test_deterministic():
    testing.check_deterministic(chunk_attention, CHUNKS, 130)


@pytest.mark.parametrize("spec", [CHUNKS, pytest.param(LONG, marks=slow)], **by_name)
def test_program_size(spec):
    testing.check_program_size(chunk_attention, spec, 150, 1001, 20_001)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CHUNKS, LONG, TWO_SIDED], **by_name)
def test_configs(spec):
    configs = tuple(XlaConfig(block=block) for block in (1, 7, 64, 1000))
    testing.check_configs(chunk_attention, spec, 130, configs)


def gradients(spec, length, **how):
    """y and every gradient of a fresh call; a state of zeros in its place where `state` is true."""
    case = testing.draw_case(chunk_attention, spec, length, fresh=True)

    def run(arrays, state, dtype="float32"):
        arrays = {n: x.astype(dtype) for n, x in arrays.items()}
        y, pull = jax.vjp(
            lambda a: chunk_attention(**a, **spec.options, **how, initial_state=state)[0], arrays
        )
        return {"y": y, **pull(case.dy.astype(dtype))[0]}

    return case, jax.jit(run, static_argnames="dtype")


@pytest.mark.parametrize("length", [45, pytest.param(300, marks=slow)])
@pytest.mark.parametrize("spec", [CHUNKS, pytest.param(LONG, marks=slow)], **by_name)
def test_a_fresh_row_is_cut_on_a_grid(spec, length):
    """Rows without a state or documents take another way: the numbers are those of the band."""
    case, run = gradients(spec, length)
    grid, band = run(case.arrays, None), run(case.arrays, case.state)
    exact = lambda found: jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    testing.assert_close(grid, exact(band), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("spec", [CHUNKS, LAPLACE, LONG], **by_name)
def test_the_grid_in_other_blocks(spec, length, block):
    case, run = gradients(spec, length, config=XlaConfig(block=block))
    _, reference = gradients(spec, length, implementation="reference")
    with jax.enable_x64(True):
        want = reference(case.arrays, None, dtype="float64")
    testing.assert_close(run(case.arrays, None), jax.tree.map(np.asarray, want), "float32")


def test_nothing_crosses_a_chunk():
    """Other keys in the first chunk change no output of the second, to the bit."""
    case = testing.draw_case(chunk_attention, CHUNKS, 45, fresh=True)
    call = jax.jit(functools.partial(chunk_attention, chunk=20))
    y, _ = call(**case.arrays)
    changed, _ = call(**case.arrays | {"k": case.arrays["k"] + (np.arange(45) < 20)[:, None, None]})
    np.testing.assert_array_equal(changed[:, 20:], y[:, 20:])
    assert not np.array_equal(changed[:, :20], y[:, :20])


def test_a_chunk_of_everything_is_attention():
    case = testing.draw_case(chunk_attention, CHUNKS, 37, fresh=True)
    q, k = case.arrays["q"], case.arrays["k"]  # the library wants values as wide as keys
    for causal in (True, False):
        y, _ = jax.jit(functools.partial(chunk_attention, chunk=50, causal=causal))(q, k, k)
        want = jax.nn.dot_product_attention(q, k, k, is_causal=causal)
        np.testing.assert_allclose(y, want, atol=2e-6)


@pytest.mark.parametrize("score", ["laplace", "relu2"])
def test_scores_by_hand(score):
    """Divided by the keys in sight, plus the bias of the distance; no softmax, no root of k."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(5, n)) for n in (4, 4, 3))
    bias, y = rng.normal(size=11), np.zeros((5, 3))
    for i in range(5):
        for j in range(i + 1):
            s = q[i] @ k[j] / (i + 1) + bias[5 + j - i]
            if score == "laplace":
                s = 0.5 * (1 + np.vectorize(math.erf)((s - MEAN) / (DEVIATION * 2**0.5)))
            else:
                s = max(s, 0) ** 2
            y[i] += s * v[j]
    arrays = (jnp.asarray(x[None, :, None], jnp.float32) for x in (q, k, v))
    got, _ = chunk_attention(*arrays, jnp.asarray(bias[None], jnp.float32), chunk=6, score=score)
    np.testing.assert_allclose(got[0, :, 0], y, atol=2e-6)


@pytest.mark.parametrize("b, g", [(1, 1), pytest.param(3, 2, marks=slow)])
def test_steps_leave_the_ring_where_it_is(b, g):
    """A loop of steps holds one ring: nothing as large is copied beside it."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = (struct(8, b, 1, 2, 64), struct(8, b, 1, g, 64), struct(8, b, 1, g, 64))
    call = functools.partial(chunk_attention, chunk=4096)
    _, state = jax.eval_shape(call, *(struct(*x.shape[1:]) for x in arrays))
    step = lambda state, x: call(*x, initial_state=state)[::-1]
    loop = jax.jit(lambda state, *x: jax.lax.scan(step, state, x), donate_argnums=0)
    memory = loop.lower(state, *arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.k.size * 4 / 2


def test_memory_is_tokens_times_chunk_at_most():
    """Forward and gradients; nothing is run."""

    def temporaries(t):
        shape = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        program = bench.forward_and_gradients(lambda *a: chunk_attention(*a, chunk=256))
        return bench.compile_(program, *(shape,) * 4)[1].temp_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long - short < 6144 * 2 * 256 * 4 / 4  # a quarter of a float per pair of a chunk


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=slow)])
def test_cost_is_about_what_xla_does(backward):
    """Which computes all pairs of a chunk, of which those that look back count."""
    sizes = dict(b=2, t=512, h=4, g=2, k=16, v=16)
    b, t, h, g, k, v = sizes.values()
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = struct(b, t, h, k), struct(b, t, g, k), struct(b, t, g, v)
    config = XlaConfig(block=64)
    run = lambda *a: jnp.sum(chunk_attention(*a, chunk=64, config=config)[0])
    stated, counted = chunk_attention.cost(**sizes, chunk=64), count_flops(run, *arrays)
    if backward:
        whole = count_flops(jax.grad(run, argnums=(0, 1, 2)), *arrays)
        stated = chunk_attention.cost(**sizes, chunk=64, backward=True)
        counted = Cost(*(w - f for w, f in zip(whole, counted, strict=True)))
    assert 0.3 < stated.flops / counted.flops < 0.7
    assert 0.3 < stated.transcendentals / counted.transcendentals < 0.7
    two_sided = chunk_attention.cost(**sizes, chunk=64, causal=False)
    assert two_sided.flops == 2 * 64 / 65 * chunk_attention.cost(**sizes, chunk=64).flops


def test_models_count_chunks_and_not_all_pairs():
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = lambda *a: jnp.sum(chunk_attention(*a, chunk=64)[0])
    with dispatch.counting():
        short, long = (count_flops(run, *(struct(1, t, 1, 8),) * 3).flops for t in (512, 2048))
    assert long == pytest.approx(4 * short, rel=0.01)


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        (dict(), ValueError, "window=None and chunk=None; give one of them"),
        (dict(chunk=3, window=3), ValueError, "window=3 and chunk=3; give one of them"),
        (dict(chunk=0), ValueError, "chunk=0; it must be at least 1"),
        (dict(chunk=2.0), TypeError, "chunk is 2.0; it must be an integer"),
        (dict(chunk=2, score="cosine"), ValueError, "score='cosine'; allowed: softmax, laplace"),
        (dict(window=2, score="relu2"), ValueError, "score='relu2', causal=True, bias None with a"),
        (dict(window=2, causal=False), ValueError, "causal=False, bias None with a window"),
        (dict(chunk=2, bias=5), ValueError, "bias has 5 distances; chunk=2 has 2 \\* 2 - 1 = 3"),
        (dict(window=3, bias=5), ValueError, "bias given with a window"),
    ],
)
def test_bad_keywords(keywords, error, message):
    x = jnp.zeros((1, 3, 2, 4))
    if "bias" in keywords:
        keywords = keywords | {"bias": jnp.zeros((2, keywords["bias"]))}
    with pytest.raises(error, match=message):
        chunk_attention(x, x, x, **keywords)


def test_no_state_where_it_looks_both_ways():
    x = jnp.zeros((1, 3, 2, 4))
    _, state = chunk_attention(x, x, x, chunk=2)
    assert chunk_attention(x, x, x, chunk=2, causal=False)[1] is None
    with pytest.raises(ValueError, match="initial_state with causal=False"):
        chunk_attention(x, x, x, chunk=2, causal=False, initial_state=state)


def test_no_tokens():
    x = jnp.zeros((2, 0, 2, 4))
    y, state = chunk_attention(x, x, x, chunk=3)
    assert y.shape == (2, 0, 2, 4) and state.k.shape == (2, 2, 3, 4)
    y, state = chunk_attention(x, x, x, chunk=3, causal=False)
    assert y.shape == (2, 0, 2, 4) and state is None
