"""BaseConv: the contract of a mixer, the authors' values, both forms, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import BaseConv
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECTS = {
    form: Subject(build=functools.partial(BaseConv, form=form, init_std=None), d_model=16)
    for form in ("lm", "zoology")
}
# What the two forms could differ in; everything else is tested with one.
OF_ZOOLOGY = ("steps_go_on", "packed_equal_alone", "packed_streams", "padding_content")


@pytest.mark.parametrize(
    "form, promise", [*(("lm", p) for p in PROMISES), *(("zoology", p) for p in OF_ZOOLOGY)]
)
def test_promise(form, promise):
    result = check_promise(promise, SUBJECTS[form])
    assert result.outcome == "kept", result.detail


def test_golden(golden):
    """The authors' block of the language models, forward and every gradient."""
    file = golden("based/baseconv_k3")
    mixer = BaseConv(24, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(mixer)
    weight = {
        name: jnp.asarray(file[f"in.w.{name}"])
        for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias")
    }
    params = {
        "in_proj": {"kernel": weight["in_proj.weight"].T, "bias": weight["in_proj.bias"]},
        "conv": {"weight": jnp.asarray(file["in.w.conv.conv.weight"][:, 0].T)},
        "out_proj": {"kernel": weight["out_proj.weight"].T, "bias": weight["out_proj.bias"]},
    }

    def run(params, x):
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * file["ct.y"]), y

    ((_, y), (dparams, dx)) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(
        params, jnp.asarray(file["in.x"])
    )
    found = {
        "x": dx,
        "w.in_proj.weight": dparams["in_proj"]["kernel"].T,
        "w.in_proj.bias": dparams["in_proj"]["bias"],
        "w.conv.conv.weight": dparams["conv"]["weight"].T[:, None],
        "w.out_proj.weight": dparams["out_proj"]["kernel"].T,
        "w.out_proj.bias": dparams["out_proj"]["bias"],
    }
    assert set(found) == {k.removeprefix("grad64.") for k in file if k.startswith("grad64.")}
    off = lambda got, want: np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))
    assert off(y, file["out64.y"]) < 1e-5
    for name, got in found.items():
        assert off(got, file[f"grad64.{name}"]) < 1e-4, name


def test_the_form_of_zoology_by_its_sum():
    """conv(x) (x W + b) + x, the last tap on the current token, a bias on the convolution."""
    mixer = BaseConv(3, form="zoology", init_std=None, rngs=nnx.Rngs(0))
    mixer.in_proj.bias[...] = jnp.array([0.3, -0.2, 0.1])
    x = np.random.default_rng(0).standard_normal((7, 3))
    taps, bias = (np.asarray(a[...], np.float64) for a in (mixer.conv.weight, mixer.conv.bias))
    kernel = np.asarray(mixer.in_proj.kernel[...], np.float64)
    past = np.concatenate([np.zeros((2, 3)), x])
    conv = np.stack([sum(taps[i] * past[t + i] for i in range(3)) for t in range(7)]) + bias
    want = conv * (x @ kernel + np.array([0.3, -0.2, 0.1])) + x
    got, _ = mixer(jnp.asarray(x, jnp.float32)[None])
    np.testing.assert_allclose(got[0], want, atol=1e-6)


@pytest.mark.parametrize(
    "form, count",
    # 360m of the card: 6.30 million per layer; Zoology's: d^2 + d, and 3 taps and a bias.
    [("lm", 6 * 1024**2 + 11 * 1024), ("zoology", 1024 * 1024 + 1024 + 4 * 1024)],
)
def test_parameter_count_is_that_of_the_card(form, count):
    mixer = nnx.eval_shape(lambda: BaseConv(1024, form=form, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == count


def test_initial_values():
    mixer = BaseConv(256, n_residuals=54, rngs=nnx.Rngs(0))
    assert float(jnp.std(mixer.in_proj.kernel[...])) == pytest.approx(0.02, rel=0.02)
    assert float(jnp.std(mixer.out_proj.kernel[...])) == pytest.approx(0.02 / 54**0.5, rel=0.02)
    np.testing.assert_array_equal(mixer.in_proj.bias[...], 0)
    assert mixer.conv.bias is None
    for made in (mixer, BaseConv(256, form="zoology", rngs=nnx.Rngs(0))):
        assert 0.95 * 3**-0.5 < float(jnp.abs(made.conv.weight[...]).max()) <= 3**-0.5


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(form="hyena"), "form is 'hyena'; allowed: lm, zoology"),
        (dict(d_conv=0), "d_conv is 0"),
        (dict(expand=0), "expand is 0"),
        (dict(init_std=-1.0), "init_std is -1.0; it must be above 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        BaseConv(16, **keywords, rngs=nnx.Rngs(0))


def test_spread_over_eight_devices():
    graphdef, variables = nnx.split(BaseConv(16, init_std=None, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.x)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(grad)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: grad(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
