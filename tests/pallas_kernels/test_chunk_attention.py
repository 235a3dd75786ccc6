"""chunk_attention passes the operators' suite, and keeps its ring as it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ChunkAttentionState, chunk_attention
from pallas_kernels.chunk_attention.arg_specs import named
from pallas_kernels.chunk_attention.xla import XlaConfig
from pallas_kernels.core import bench, testing
from pallas_kernels.core.costs import Cost, count_flops

GROUPED, ALONE, WIDE = map(named, ("grouped", "alone", "wide"))


@pytest.mark.parametrize("length", testing.FAST_LENGTHS)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees(documents, length):
    testing.check_agrees(chunk_attention, GROUPED, length, documents=documents)


@pytest.mark.parametrize("documents, length", [(False, 1), (True, 130)], ids=["step", "packed"])
@pytest.mark.parametrize("spec", [ALONE, WIDE], ids=lambda s: s.name)
def test_agrees_for_other_windows(spec, documents, length):
    testing.check_agrees(chunk_attention, spec, length, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("length", testing.SLOW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", [GROUPED, ALONE, WIDE], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(chunk_attention, spec, length, dtype=dtype, documents=True)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_agrees_in_other_precisions(dtype):
    testing.check_agrees(chunk_attention, GROUPED, 130, dtype=dtype, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(chunk_attention, GROUPED)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_alone(implementation):
    testing.check_documents_alone(chunk_attention, GROUPED, 130, implementation=implementation)


def test_padding_only():
    testing.check_padding_only(chunk_attention, GROUPED)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off(documents):
    testing.check_hand_off(chunk_attention, GROUPED, 130, 51, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 19, 20, 64, 129])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off_at_more_cuts(documents, cut):
    testing.check_hand_off(chunk_attention, GROUPED, 130, cut, documents=documents)


def test_vmap():
    testing.check_vmap(chunk_attention, GROUPED, 37)


def test_deterministic():
    testing.check_deterministic(chunk_attention, GROUPED, 130)


def test_program_size():
    testing.check_program_size(chunk_attention, GROUPED, 130, 1001, 20_001)


@pytest.mark.slow
def test_configs():
    configs = tuple(XlaConfig(block=block) for block in (1, 7, 64, 1000))
    testing.check_configs(chunk_attention, GROUPED, 130, configs)


def test_a_prompt_and_steps_leave_the_same_ring():
    """Token n lies in slot n mod l, whoever wrote it; a step writes one slot."""
    case = testing.draw_case(chunk_attention, GROUPED, 30, fresh=True)
    q, k, v = case.arrays.values()
    step = jax.jit(lambda q, k, v, s: chunk_attention(q, k, v, window=8, initial_state=s))
    y, state = chunk_attention(q, k, v, window=8)
    _, stepped = chunk_attention(q[:, :11], k[:, :11], v[:, :11], window=8)
    outputs = []
    for i in range(11, 30):
        before = stepped
        y_t, stepped = step(*(x[:, i : i + 1] for x in (q, k, v)), stepped)
        outputs.append(y_t)
        assert np.sum(np.any(before.k != stepped.k, axis=(0, 1, 3))) == 1
    np.testing.assert_array_equal(state.count, 30)
    for got, want in zip(stepped, state, strict=True):
        np.testing.assert_array_equal(got, want)
    for n in range(22, 30):
        np.testing.assert_array_equal(state.k[:, :, n % 8], k[:, n])
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), y[:, 11:], atol=1e-6)


def test_a_window_of_one_gives_the_values():
    case = testing.draw_case(chunk_attention, ALONE, 9)
    y, state = chunk_attention(**case.arrays, window=1)
    np.testing.assert_allclose(y, case.arrays["v"], rtol=1e-6)
    assert state.k.shape == (4, 2, 1, 4)


@pytest.mark.parametrize("b, g", [(1, 1), (1, 4), (3, 2)])
def test_steps_leave_the_ring_where_it_is(b, g):
    """A loop of steps holds one ring: nothing as large is copied beside it."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = (struct(8, b, 1, 4, 64), struct(8, b, 1, g, 64), struct(8, b, 1, g, 64))
    call = functools.partial(chunk_attention, window=4096)
    _, state = jax.eval_shape(call, *(struct(*x.shape[1:]) for x in arrays))
    step = lambda state, x: call(*x, initial_state=state)[::-1]
    loop = jax.jit(lambda state, *x: jax.lax.scan(step, state, x), donate_argnums=0)
    memory = loop.lower(state, *arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.k.size * 4 / 2


def test_memory_is_tokens_times_window_at_most():
    """Forward and gradients; nothing is run."""

    def temporaries(t):
        shape = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        program = bench.forward_and_gradients(lambda *a: chunk_attention(*a, window=256))
        return bench.compile_(program, *(shape,) * 4)[1].temp_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long - short < 6144 * 2 * 256 * 4 / 2  # half a float per pair in sight


@pytest.mark.parametrize("backward", [False, True])
def test_cost_is_about_what_xla_does(backward):
    """Which computes the pairs of a block of 64, of which those in the window count."""
    sizes = dict(b=2, t=512, h=4, g=2, k=16, v=16)
    b, t, h, g, k, v = sizes.values()
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = struct(b, t, h, k), struct(b, t, g, k), struct(b, t, g, v)
    run = lambda *a: jnp.sum(chunk_attention(*a, window=64, config=XlaConfig(block=64))[0])
    stated, counted = chunk_attention.cost(**sizes, window=64), count_flops(run, *arrays)
    if backward:
        whole = count_flops(jax.grad(run, argnums=(0, 1, 2)), *arrays)
        stated = chunk_attention.cost(**sizes, window=64, backward=True)
        counted = Cost(*(w - f for w, f in zip(whole, counted, strict=True)))
    assert 0.3 < stated.flops / counted.flops < 0.7
    assert 0.3 < stated.transcendentals / counted.transcendentals < 0.7


@pytest.mark.parametrize(
    "window, error, message",
    [
        (0, ValueError, "window=0; it must be at least 1"),
        (-3, ValueError, "window=-3"),
        (2.0, TypeError, "window is 2.0; it must be an integer"),
    ],
)
def test_bad_windows(window, error, message):
    x = jnp.zeros((1, 3, 2, 4))
    with pytest.raises(error, match=message):
        chunk_attention(x, x, x, window=window)


def test_bad_shapes():
    x = jnp.zeros((1, 3, 2, 4))
    with pytest.raises(ValueError, match="q has 3 heads and k 2"):
        chunk_attention(jnp.zeros((1, 3, 3, 4)), x, x, window=2)
    _, state = chunk_attention(x, x, x, window=3)
    with pytest.raises(ValueError, match=r"initial_state_k has shape \(1, 2, 3, 4\)"):
        chunk_attention(x, x, x, window=4, initial_state=state)
    with pytest.raises(ValueError, match="count of initial_state is float32"):
        chunk_attention(x, x, x, window=3, initial_state=state._replace(count=jnp.zeros(1)))


def test_no_tokens():
    x = jnp.zeros((2, 0, 2, 4))
    y, state = chunk_attention(x, x, x, window=3)
    assert y.shape == (2, 0, 2, 4)
    assert isinstance(state, ChunkAttentionState) and state.k.shape == (2, 2, 3, 4)
