"""Which form runs, what is refused, and what `forced` and `explain` say."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import OPERATORS, long_conv, monarch_matmul, selective_scan, short_conv
from pallas_kernels.core import costs, dispatch
from pallas_kernels.core.config import Config
from pallas_kernels.core.testing import letters_of
from pallas_kernels.selective_scan.xla import XlaConfig

X = jnp.arange(4.0)


def form(factor, refusal=None):
    """A form that multiplies, with a backward pass of its own."""

    @jax.custom_vjp
    def scale(x):
        return factor * x

    scale.defvjp(lambda x: (factor * x, ()), lambda _, dy: (100 * factor * dy,))
    return types.SimpleNamespace(
        run=lambda x, bias, *, config: (scale(x), bias),
        refuses=lambda shapes, device_kind: refusal,
    )


FORMS = {
    "reference": form(1.0),
    "xla": form(2.0),
    "pallas_tpu": form(3.0),
    "pallas_gpu": form(5.0, "shapes are odd"),
}


def call(x, **how):
    return dispatch.call("toy", FORMS, (x, None), **how)[0]


def test_where_whole_numbers_have_64_bits_no_kernel_is_taken():
    """Several break while they are traced: their counters are int32."""
    with dispatch.compiling_for("TPU v6 lite"), jax.enable_x64(True):
        text = jax.jit(call).trace(X).lower(lowering_platforms=("tpu",)).as_text()
        assert "3.0" not in text and "2.0" in text
        with pytest.raises(NotImplementedError, match="jax_enable_x64 is on"):
            call(X, implementation="pallas_tpu")
        assert call(X, implementation="pallas_tpu", config=Config(interpret=True))[1] == 3


def test_none_takes_xla_on_a_cpu():
    assert np.array_equal(call(X), 2 * X)
    # The form's own backward pass, through the choice of the platform.
    assert np.array_equal(jax.jit(jax.grad(lambda x: call(x).sum()))(X), np.full(4, 200.0))


def test_a_program_traced_here_compiles_for_another_platform():
    with dispatch.compiling_for("TPU v6 lite"):
        traced = jax.jit(call).trace(X)
        here = traced.lower().as_text()
        there = traced.lower(lowering_platforms=("tpu",)).as_text()
        gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "3.0" in there and "3.0" not in here and "3.0" not in gpu  # the TPU form's factor
    assert "2.0" in here and "2.0" in gpu  # the GPU form refuses: xla


def test_a_program_for_this_cpu_traces_no_kernel():
    assert "3.0" not in str(jax.make_jaxpr(call)(X))


@pytest.mark.parametrize("name, factor", [("reference", 1), ("xla", 2)])
def test_a_name_takes_exactly_that_form(name, factor):
    assert np.array_equal(call(X, implementation=name), factor * X)


def test_a_name_that_refuses_says_why():
    with pytest.raises(NotImplementedError, match="'pallas_gpu' is refused: shapes are odd"):
        call(X, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="needs a tpu device and this is a cpu"):
        call(X, implementation="pallas_tpu")
    assert np.array_equal(
        call(X, implementation="pallas_tpu", config=Config(interpret=True)), 3 * X
    )


def test_an_unknown_name():
    with pytest.raises(ValueError, match="implementation='cuda'; allowed are None, reference, xla"):
        call(X, implementation="cuda")
    with pytest.raises(ValueError, match="allowed are None"), dispatch.forced("triton"):
        pass


def test_forced_reaches_through_what_is_compiled_already():
    compiled = jax.jit(call)
    assert np.array_equal(compiled(X), 2 * X)
    with dispatch.forced("reference"):
        assert np.array_equal(compiled(X), X)
        assert np.array_equal(call(X, implementation="xla"), 2 * X)  # a name at the call wins
    assert np.array_equal(compiled(X), 2 * X)


def test_counting_takes_the_definition_or_what_it_names():
    with dispatch.counting():
        assert np.array_equal(call(X), X)
        assert np.array_equal(call(X, implementation="xla"), 2 * X)
    u, kernel = (
        jax.ShapeDtypeStruct((1, 4096, 2), X.dtype),
        jax.ShapeDtypeStruct((2, 4096), X.dtype),
    )
    with dispatch.counting():
        counted = costs.count_flops(long_conv, u, kernel).flops
    assert counted == pytest.approx(long_conv.cost(b=1, t=4096, e=2, l=4096).flops, rel=0.2)


def test_device_kind():
    assert dispatch.device_kind() == jax.local_devices()[0].device_kind
    assert dispatch.device_kind(Config(device_kind="TPU v5 lite")) == "TPU v5 lite"
    device = jax.sharding.AbstractDevice(device_kind="TPU7x", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.device_kind() == "TPU7x"


@pytest.mark.parametrize("op", OPERATORS.values(), ids=lambda op: op.__name__)
def test_explain(op):
    sizes = dict(b=2, t=8, e=4, n=3, w=4, h=2, g=2, k=4, v=4)
    sizes |= getattr(op, "sizes", {})
    arrays = [
        None
        if name in getattr(op, "left_out", ())
        else jax.ShapeDtypeStruct(tuple(sizes[x] for x in letters), jnp.float32)
        for name, letters in letters_of(op).items()
    ]
    given = dict(getattr(op, "options", {}))
    if "segment_ids" in inspect.signature(op).parameters:
        given["segment_ids"] = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    reasons = dispatch.explain(op, *arrays, **given)
    assert list(reasons) == list(dispatch.NAMES)
    assert reasons["reference"] is None and reasons["xla"] is None
    assert all(reasons[name] for name in dispatch.KERNELS), "this is a CPU"


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_is_asked_for_by_name_says_why_not(name):
    x = jnp.ones((1, 4, 2))
    with pytest.raises(NotImplementedError, match=f"short_conv: .*{name}' is refused: "):
        short_conv(x, jnp.ones((3, 2)), implementation=name)
    B = jnp.ones((1, 4, 3))
    with pytest.raises(NotImplementedError, match=f"selective_scan: .*{name}' is refused: "):
        selective_scan(x, x, -jnp.ones((2, 3)), B, B, implementation=name)


def test_config_of_another_form():
    with pytest.raises(TypeError, match="config is a Config; this form takes a XlaConfig"):
        XlaConfig.of(Config(), {})


def test_bad_arguments():
    x, A, B = jnp.ones((2, 4, 3)), -jnp.ones((3, 5)), jnp.ones((2, 4, 5))
    with pytest.raises(ValueError, match=r"B has shape \(2, 4, 3\); \[b t n\] with n=5"):
        selective_scan(x, x, A, x, B)
    with pytest.raises(ValueError, match=r"A has shape \(3,\); it must be \[e n\]"):
        selective_scan(x, x, A[:, 0], B, B)
    with pytest.raises(TypeError, match="u has dtype int32"):
        selective_scan(x.astype(int), x, A, B, B)
    with pytest.raises(TypeError, match="segment_ids has dtype float32; it must be int32"):
        selective_scan(x, x, A, B, B, segment_ids=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(4,\); it must be \(2, 4\)"):
        short_conv(x, jnp.ones((2, 3)), segment_ids=jnp.ones(4, int))
    with pytest.raises(ValueError, match="activation='relu'; allowed are"):
        short_conv(x, jnp.ones((2, 3)), activation="relu")
    with pytest.raises(ValueError, match="weight has no taps"):
        short_conv(x, jnp.ones((0, 3)))


def test_no_tokens():
    x, A, B = jnp.ones((2, 0, 3)), -jnp.ones((3, 5)), jnp.ones((2, 0, 5))
    y, state = selective_scan(x, x, A, B, B)
    assert y.shape == (2, 0, 3) and not state.h.any() and state.h.dtype == jnp.float32
    y, state = short_conv(x, jnp.ones((4, 3)))
    assert y.shape == (2, 0, 3) and state.x.shape == (2, 3, 3)
    w1, w2 = jnp.ones((4, 3, 2)), jnp.ones((2, 5, 6))
    total = lambda w1: monarch_matmul(jnp.ones((2, 0, 8)), w1, w2).sum()
    assert total(w1) == 0 and not jax.grad(total)(w1).any()
