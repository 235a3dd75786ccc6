"""Block-diagonal and Monarch layers: the authors' values, how they start, what sees what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.nn.param import decays
from seqzoo.nn.structured_mlp import (
    BlockDiagonalLinear,
    BlockDiagonalMLP,
    MonarchLinear,
    MonarchMLP,
)


@pytest.mark.parametrize("name", ["24_48_nb4_nobias", "22_30_nb4_pad"])
def test_golden(golden, name):
    """Forward and every gradient, whole blocks and filled-up ones."""
    file = golden(f"monarch_mixer/blockdiag_{name}")
    x = file["in.x"]
    has_bias = "in.w.bias" in file
    layer = BlockDiagonalLinear(
        x.shape[-1], file["out.y"].shape[-1], use_bias=has_bias, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(layer)
    names = ("weight", "bias") if has_bias else ("weight",)
    ours = {n: file[f"in.w.{n}"] for n in names}
    assert {n: v.shape for n, v in nnx.to_pure_dict(state).items()} == {
        n: v.shape for n, v in ours.items()
    }
    y, pull = jax.vjp(lambda w, x: nnx.merge(graphdef, w)(x), ours, x)
    grads, dx = pull(file["ct.y"])
    near(y, file["out64.y"], 1e-5)
    near(dx, file["grad64.x"], 1e-4)
    for n in names:
        near(grads[n], file[f"grad64.w.{n}"], 1e-4)


def near(got, want, tolerance):
    assert np.max(np.abs(np.asarray(got) - want)) <= tolerance * np.max(np.abs(want))


@pytest.mark.parametrize("kind", [BlockDiagonalLinear, MonarchLinear])
@pytest.mark.parametrize("d_in, d_out", [(22, 30), (30, 10)])
def test_start(kind, d_in, d_out):
    layer = kind(d_in, d_out, n_blocks=4, use_bias=True, rngs=nnx.Rngs(0))
    for name, variable in nnx.to_flat_state(nnx.state(layer)):
        value = np.asarray(variable[...])
        bound = d_out**-0.5 if name == ("bias",) else value.shape[-1] ** -0.5
        assert 0.6 * bound < np.abs(value).max() <= bound
        assert decays(variable) == (name != ("bias",))
    assert layer(jnp.ones((2, 3, d_in))).shape == (2, 3, d_out)
    assert layer(jnp.ones((2, d_in), jnp.bfloat16)).dtype == jnp.float32


def reach(kind, d_in, *d_out, **keywords):
    """Which inputs each output depends on."""

    @jax.jit
    def jacobian():
        layer = kind(d_in, *d_out, **keywords, rngs=nnx.Rngs(0))
        return jax.jacobian(lambda x: layer(x[None, None])[0, 0])(jnp.ones(d_in))

    return np.asarray(jacobian()) != 0


def test_what_sees_what():
    blocks = reach(BlockDiagonalLinear, 8, 16)
    np.testing.assert_array_equal(blocks, np.kron(np.eye(4), np.ones((4, 2))) > 0)
    assert reach(MonarchLinear, 16, 32).all() and reach(MonarchLinear, 32, 16).all()
    assert not reach(BlockDiagonalMLP, 16, d_ff=16).all()
    assert reach(MonarchMLP, 16, d_ff=16).all()


def test_mlp_formula():
    """The gate is the exact GELU of the first half; tokens alone are tokens in rows."""
    mlp = BlockDiagonalMLP(8, rngs=nnx.Rngs(0))
    assert mlp.up.weight.shape == (4, 16, 2) and mlp.down.weight.shape == (4, 2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    gate, value = np.split(np.asarray(mlp.up(x)), 2, axis=-1)
    phi = 0.5 * (1 + jax.scipy.special.erf(gate / np.sqrt(2)))
    np.testing.assert_allclose(mlp(x), mlp.down(gate * phi * value), atol=1e-6)
    np.testing.assert_allclose(mlp(x[:, 0]), mlp(x)[:, 0], atol=1e-6)


def test_configurations():
    for name, kind in dict(block_diagonal_mlp=BlockDiagonalMLP, monarch_mlp=MonarchMLP).items():
        target = f"seqzoo.nn.structured_mlp.{kind.__name__}"
        made = build({"_target_": target, "d_model": 8, "n_blocks": 2}, rngs=nnx.Rngs(0))
        assert isinstance(made, kind), name


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_blocks=0), "n_blocks is 0; it must be at least 1"),
        (dict(n_blocks=9), "n_blocks is 9 and the matrix maps 8 channels to 64"),
        (dict(d_ff=0), "d_ff is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MonarchMLP(8, **keywords, rngs=nnx.Rngs(0))
