"""neural_memory passes the operators' suite, and keeps the identities of its equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule, neural_memory
from pallas_kernels.core import bench, testing
from pallas_kernels.core.costs import count_flops
from pallas_kernels.neural_memory.arg_specs import named
from pallas_kernels.neural_memory.xla import XlaConfig

LINEAR, WHOLE, CLIP, NORMALISE, DEEP, EDGES = map(
    named, ("linear", "whole", "clip", "normalise", "deep", "edges")
)


def test_agrees():
    testing.check_agrees(neural_memory, WHOLE, 130, documents=True)


def test_agrees_for_one_token():
    testing.check_agrees(neural_memory, LINEAR, 1)


@pytest.mark.slow
def test_agrees_in_float64():
    """Four layers, clipped."""
    testing.check_agrees(neural_memory, DEEP, 37, dtype="float64", documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", (1, *testing.SLOW_LENGTHS))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", [LINEAR, WHOLE, CLIP, NORMALISE, DEEP], ids=lambda s: s.name)
def test_agrees_at_more_lengths(spec, dtype, length):
    testing.check_agrees(neural_memory, spec, length, dtype=dtype, documents=True)


@pytest.mark.slow
def test_agrees_in_one_document():
    testing.check_agrees(neural_memory, WHOLE, 130)


def test_agrees_at_the_edge_of_the_domain():
    """Shares of 0 and 1, steps of 0, keys and gradients of 0 under normalise."""
    testing.check_agrees(neural_memory, EDGES, 70, documents=True)


def test_state_dtypes():
    testing.check_state_dtypes(neural_memory, WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_documents_alone(implementation):
    testing.check_documents_alone(neural_memory, LINEAR, 50, implementation=implementation)


@pytest.mark.slow
def test_padding_only():
    testing.check_padding_only(neural_memory, LINEAR)


@pytest.mark.slow
def test_hand_off():
    """Inside a chunk, with documents."""
    testing.check_hand_off(neural_memory, LINEAR, 70, 51, documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 16, 32, 64, 129])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_hand_off_at_more_cuts(documents, cut):
    testing.check_hand_off(neural_memory, WHOLE, 130, cut, documents=documents)


@pytest.mark.slow
def test_vmap():
    testing.check_vmap(neural_memory, WHOLE, 37)


@pytest.mark.slow
def test_deterministic():
    testing.check_deterministic(neural_memory, LINEAR, 40)


@pytest.mark.slow
def test_program_size():
    testing.check_program_size(neural_memory, WHOLE, 130, 1001, 20_001)


@pytest.mark.slow
def test_configs():
    testing.check_configs(neural_memory, WHOLE, 130, tuple(XlaConfig(span=s) for s in (1, 3, 99)))


# --- identities ---------------------------------------------------------------------------------


def draw(spec, length, **changes):
    arrays = testing.draw_case(neural_memory, spec, length, dtype="float64").arrays
    return {**arrays, **{k: np.broadcast_to(v, arrays[k].shape) for k, v in changes.items()}}


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def test_a_linear_memory_is_the_delta_rule_that_forgets_apart(in_float64):
    """eta 0, chunk 1: W = (1 - alpha) W - 2 theta (W k - v) k^T; the decay is not in the error."""
    arrays = draw(LINEAR, 20, eta=0.0)
    y, state = jax.jit(functools.partial(neural_memory, chunk=1))(**arrays)
    q, k, v, alpha, _, theta, w0 = arrays.values()
    w = np.broadcast_to(w0, (4, *w0.shape))
    for t in range(20):
        error = np.einsum("bhvk,bhk->bhv", w, k[:, t]) - v[:, t]
        write = 2 * theta[:, t, :, None, None] * error[..., None] * k[:, t, :, None]
        w = (1 - alpha[:, t, :, None, None]) * w - write
        np.testing.assert_allclose(y[:, t], np.einsum("bhvk,bhk->bhv", w, q[:, t]), atol=1e-12)
    np.testing.assert_allclose(state.now.w_out, w, atol=1e-12)


def test_without_forgetting_it_is_gated_delta_rule(in_float64):
    arrays = draw(LINEAR, 20, eta=0.0, alpha=0.0, w_out=0.0)
    q, k, v, alpha, _, theta, _ = arrays.values()
    y, state = jax.jit(functools.partial(neural_memory, chunk=1))(**arrays)
    want, rule = jax.jit(functools.partial(gated_delta_rule, scale=1.0))(q, k, v, alpha, 2 * theta)
    np.testing.assert_allclose(y, want, atol=1e-12)
    np.testing.assert_allclose(np.swapaxes(state.now.w_out, 2, 3), rule.s, atol=1e-12)


def test_steps_of_0_decay_exactly(in_float64):
    arrays = draw(LINEAR, 40, theta=0.0)
    _, state = jax.jit(functools.partial(neural_memory, chunk=16))(**arrays)
    left = np.prod(1 - arrays["alpha"], axis=1)[..., None, None]
    np.testing.assert_allclose(state.now.w_out, left * arrays["w_out"], rtol=1e-13)
    assert not np.any(state.momentum.w_out)


def test_alpha_of_1_clears(in_float64):
    """What was before is gone to the last bit; the write of the token itself stays."""
    arrays = draw(LINEAR, 40)
    alpha = np.array(arrays["alpha"])
    alpha[:, 37] = 1.0
    run = jax.jit(functools.partial(neural_memory, chunk=16))
    still = {**arrays, "alpha": alpha, "eta": 0 * alpha, "theta": 0 * alpha}
    _, one = run(**still)
    _, other = run(**{**still, "w_out": 3 + arrays["w_out"]})
    assert not np.any(one.now.w_out) and not np.any(other.now.w_out)


def test_no_momentum_leaves_each_gradient_to_its_token(in_float64):
    """eta 0: the momentum after the last token is that token's step alone."""
    arrays = draw(LINEAR, 17, eta=0.0)
    _, state = jax.jit(functools.partial(neural_memory, chunk=16))(**arrays)
    k, v, theta = (arrays[n][:, -1] for n in ("k", "v", "theta"))
    error = np.einsum("bhvk,bhk->bhv", state.start.w_out, k) - v
    want = -2 * theta[..., None, None] * error[..., None] * k[:, :, None]
    np.testing.assert_allclose(state.momentum.w_out, want, atol=1e-14)


def test_a_chunk_looks_at_the_weights_before_it():
    """Keys and values of a chunk change no gradient of the same chunk, but those of the next."""
    arrays = testing.draw_case(neural_memory, LINEAR, 9).arrays
    run = jax.jit(lambda **a: neural_memory(**a, chunk=8)[1].momentum.w_out)
    arrays["eta"] = 0 * arrays["eta"]  # the momentum is the last gradient
    other = {**arrays, "v": arrays["v"] + (np.arange(9) == 3)[:, None, None]}
    cut = lambda a, n: {k: x if k == "w_out" else x[:, :n] for k, x in a.items()}
    np.testing.assert_array_equal(run(**cut(arrays, 8)), run(**cut(other, 8)))
    assert not np.allclose(run(**arrays), run(**other))


# --- cost and memory ----------------------------------------------------------------------------


def _program(t):
    spec = named("issue")
    struct = lambda letters: jax.ShapeDtypeStruct(
        tuple({**spec.sizes, "t": t}[x] for x in letters), jnp.float32
    )
    letters = testing.letters_of(neural_memory)
    arrays = [struct(letters[n]) for n in (*testing.required(neural_memory), *spec.given)]
    call = lambda *a: neural_memory(*a[:7], w_in=a[7], gamma=a[8], chunk=64)
    return call, arrays


@pytest.mark.slow
def test_memory_is_a_state_per_chunk():
    """Forward and gradients; nothing is run. Two of 128 KiB (weights, momentum) per 64 tokens."""

    def temporaries(t):
        call, arrays = _program(t)
        y = jax.eval_shape(call, *arrays)[0]
        return bench.compile_(bench.forward_and_gradients(call), y, *arrays)[1].temp_bytes

    short, long = temporaries(1024), temporaries(4096)
    states = 2 * 4 * 2 * 64 * 256 * (4096 - 1024) / 64
    assert long - short < 1.5 * states + 4 * 3072 * 64 * 10  # and some copies of the tokens


def test_cost_is_about_what_xla_does():
    call, arrays = _program(1024)
    counted = count_flops(lambda *a: call(*a)[0], *arrays)
    stated = neural_memory.cost(b=1, t=1024, h=1, k=64, v=64, n=256, m=256, chunk=64)
    assert 0.7 < stated.flops / counted.flops < 1.1


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        (dict(chunk=0), ValueError, "chunk=0; it must be at least 1"),
        (dict(chunk=2.0), TypeError, "chunk is 2.0; it must be an integer"),
        (dict(activation="relu"), ValueError, "activation='relu'; allowed: gelu, silu"),
        (dict(limit="norm"), ValueError, "limit='norm'; allowed: none, clip, normalise"),
        (dict(max_norm=0.0), ValueError, "max_norm=0.0; it must be above 0"),
        (dict(gamma=jnp.zeros((2, 4))), ValueError, "keys have k=5 and values v=4"),
        (dict(w_hidden=jnp.zeros((2, 1, 3, 3))), ValueError, "w_hidden is given and w_in is not"),
        (dict(w_out=jnp.zeros((2, 4, 3))), ValueError, r"\[h v k\] with k=5 was expected"),
        (dict(s_in=jnp.zeros((2, 3, 5))), ValueError, "a momentum is given for a weight"),
        (dict(eta=jnp.zeros((4, 3))), ValueError, r"eta has shape \(4, 3\)"),
    ],
)
def test_bad_calls(keywords, error, message):
    arrays = testing.draw_case(neural_memory, LINEAR, 3).arrays
    with pytest.raises(error, match=message):
        neural_memory(**{**arrays, "chunk": 16, **keywords})


def test_bad_states():
    arrays = testing.draw_case(neural_memory, LINEAR, 3).arrays
    _, state = neural_memory(**arrays, chunk=16)
    call = lambda state: neural_memory(**arrays, chunk=16, initial_state=state)
    wrong = state.now._replace(w_out=state.now.w_out[:2])
    with pytest.raises(ValueError, match="w_out of initial_state.now has shape"):
        call(state._replace(now=wrong))
    with pytest.raises(ValueError, match="gamma of initial_state.momentum has shape"):
        call(state._replace(momentum=state.momentum._replace(gamma=jnp.zeros((4, 2, 4)))))
    with pytest.raises(ValueError, match="count of initial_state is float32"):
        call(state._replace(count=jnp.zeros(4)))
    with pytest.raises(NotImplementedError, match="pallas_gpu' is refused"):
        neural_memory(**arrays, chunk=16, implementation="pallas_gpu")


def test_no_tokens():
    arrays = {k: v if k == "w_out" else v[:, :0] for k, v in draw(LINEAR, 3).items()}
    y, state = neural_memory(**{k: np.float32(v) for k, v in arrays.items()}, chunk=4)
    assert y.shape == (4, 0, 2, 4) and not np.any(state.count)


@pytest.mark.parametrize("keywords, message", [(dict(span=0), "span is 0; it must be at least 1")])
def test_bad_config(keywords, message):
    with pytest.raises(ValueError, match=message):
        XlaConfig(**keywords)
