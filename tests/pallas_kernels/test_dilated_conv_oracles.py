"""dilated_conv against the golden files, explicit kernels, loops and the library's convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dilated_conv

FILES = {
    "tcn_linear_K4_f4_J3": (4, dict(activation="linear")),
    "tcn_relu_res_K3_f2_J4": (2, dict()),
    "tcn_relu_res_wn_K5_f5_J3": (5, dict()),
    "tcn_symmetric_relu_res_K5_f3_J2": (3, dict(symmetric=True)),
}


def stack_of(file, growth, keywords, **how):
    """s and y of a golden file as a function of its arguments."""
    levels = len(file["in.bias"])
    dilations = tuple(growth**i for i in range(levels))

    def run(a):
        if "v" in a:
            weight = a["g"][:, None] * a["v"] / jnp.linalg.norm(a["v"], axis=1, keepdims=True)
        else:
            weight = a["w"]
        s, _ = dilated_conv(a["x"], weight, a["bias"], dilations=dilations, **keywords, **how)
        return {"s": s, "y": jax.nn.silu(s + a["omega"] * a["x"])}

    return run


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "implementation, dtype",
    [
        ("xla", "float32"),
        ("xla", "float64"),
        pytest.param("reference", "float64", marks=pytest.mark.slow),
    ],
)
def test_golden(golden, name, implementation, dtype):
    file = golden(f"tcnca/{name}")
    growth, keywords = FILES[name]
    with jax.enable_x64(dtype == "float64"):
        a = {k[3:]: jnp.asarray(v, dtype) for k, v in file.items() if k.startswith("in.")}
        run = stack_of(file, growth, keywords, implementation=implementation)

        @jax.jit
        def everything(a):
            out, pull = jax.vjp(lambda a: run(a)["y"], a)
            return run(a), pull(jnp.asarray(file["ct.y"], dtype))[0]

        out, gradients = jax.tree.map(np.asarray, everything(a))
    # The README's: float32 1e-5 and 1e-4; float64 by the oracle, gradients stored in float32.
    tolerance, of_gradients = (1e-5, 1e-4) if dtype == "float32" else (1e-12, 1e-6)
    for key, got in out.items():
        assert off(got, file[f"out64.{key}"]) < tolerance, key
    stored = {key for key in file if key.startswith("grad64.")}
    assert stored == {f"grad64.{key}" for key in gradients}
    for key, got in gradients.items():
        assert off(got, file[f"grad64.{key}"]) < of_gradients, key


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-5)


def draw(taps, dilations, t, e=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, t, e)), rng.normal(size=(len(dilations), taps, e))


def call(x, weight, **keywords):
    """In float64."""
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(dilated_conv, **keywords))
        return np.asarray(run(jnp.asarray(x), jnp.asarray(weight))[0])


def test_impulse_response_is_a_kronecker_product():
    taps = 4
    dilations = tuple(taps**i for i in range(3))
    _, weight = draw(taps, dilations, 1)
    impulse = np.zeros((1, 70, 2))
    impulse[:, 0] = 1
    got = call(impulse, weight, dilations=dilations, activation="linear")[0]
    for channel in range(2):
        # The last level's tap is the highest digit of the lag.
        kernel = functools.reduce(np.kron, weight[::-1, :, channel])
        np.testing.assert_allclose(got[:64, channel], kernel, rtol=0, atol=1e-12)
        assert not np.any(got[64:, channel])


@pytest.mark.parametrize("symmetric", [False, True])
def test_linear_stack_is_one_long_kernel(symmetric):
    """Against a loop of O(L R) over the kernel, the first samples too.

    What looks ahead has no values of its levels beyond both ends: the inner samples.
    """
    taps, dilations, t = (3, (1, 2, 5), 40)
    x, weight = draw(taps, dilations, t)
    ahead = sum(dilations) * (taps // 2) * symmetric
    want = np.zeros_like(x)
    for channel in range(2):
        kernel = np.ones(1)
        for w, d in zip(weight[:, :, channel], dilations, strict=True):
            spread = np.zeros((taps - 1) * d + 1)
            spread[::d] = w
            kernel = np.convolve(kernel, spread)
        for i in range(t):
            for lag, k in enumerate(kernel, -ahead):
                if 0 <= i - lag < t:
                    want[:, i, channel] += k * x[:, i - lag, channel]
    got = call(x, weight, dilations=dilations, activation="linear", symmetric=symmetric)
    inner = slice(ahead, t - ahead)
    off_by = np.abs(got - want)[:, inner].max()
    assert off_by < 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_against_the_librarys_convolution(symmetric):
    taps, dilations = 5, (1, 3, 9)
    x, weight = draw(taps, dilations, 50, e=3)
    with jax.enable_x64(True):
        s = jnp.asarray(x)
        for w, d in zip(weight, dilations, strict=True):
            reach = (taps - 1) * d
            padding = (reach // 2, reach // 2) if symmetric else (reach, 0)
            a = jax.lax.conv_general_dilated(
                s,
                jnp.asarray(w)[::-1, None],  # the library's last tap is the present
                window_strides=(1,),
                padding=[padding],
                rhs_dilation=(d,),
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=3,
            )
            s = s + jax.nn.relu(a)
    got = call(x, weight, dilations=dilations, symmetric=symmetric)
    np.testing.assert_allclose(got, s, rtol=0, atol=1e-12 * np.abs(s).max())


def test_shifting_the_input_shifts_the_output():
    taps, dilations = 4, (1, 4)
    x, weight = draw(taps, dilations, 60)
    reach = (taps - 1) * sum(dilations)
    whole = call(x, weight, dilations=dilations)
    later = call(x[:, 7:], weight, dilations=dilations)
    np.testing.assert_allclose(later[:, reach:], whole[:, 7 + reach :], rtol=0, atol=1e-12)


def test_gradients_against_finite_differences():
    taps, dilations = 3, (1, 3)
    x, weight = draw(taps, dilations, 20)
    dy = np.random.default_rng(1).normal(size=x.shape)
    bias = np.random.default_rng(2).normal(size=(2, 2))
    with jax.enable_x64(True):

        @jax.jit
        def loss(x, weight, bias):
            return jnp.sum(dy * dilated_conv(x, weight, bias, dilations=dilations)[0])

        gradients = jax.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
        for i, gradient in enumerate(gradients):
            arguments = [x, weight, bias]
            direction = np.random.default_rng(3).normal(size=gradient.shape)
            moved = []
            for step in (1e-6, -1e-6):
                arguments[i] = (x, weight, bias)[i] + step * direction
                moved.append(float(loss(*arguments)))
            want = float(np.sum(np.asarray(gradient) * direction))
            assert abs((moved[0] - moved[1]) / 2e-6 - want) < 1e-6 * abs(want) + 1e-6
