"""MoM against the authors' numbers: outputs, choices, losses, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import MoM
from seqzoo.nn.report import captured

CASES = {
    "shared": dict(d_model=24, num_memories=4),
    "single_kv": dict(d_model=24, num_memories=3, expand_v=2, single_kv_proj=True),
    "padded": dict(d_model=16, num_memories=4),
}


def layer_of(file, d_model, **keywords):
    """Our layer with the file's weights, and what brings our gradients into their layout."""
    mixer = MoM(d_model, n_heads=2, head_dim=8, norm_eps=1e-6, **keywords, rngs=nnx.Rngs(0))
    values = named(mixer, {name[5:]: a for name, a in file.items() if name.startswith("in.w.")})
    for parameter, value in values:
        assert parameter.shape == value.shape
        parameter[...] = jnp.asarray(value)
    assert len(values) == len(nnx.to_flat_state(nnx.state(mixer, nnx.Param)))
    return mixer


def named(mixer, theirs):
    """(parameter of ours, array of theirs in our layout)."""
    memories = range(0 if mixer.single_kv_proj else mixer.num_memories)
    each = lambda own, shared: np.stack(
        [*(theirs[f"{own}.{i}.weight"].T for i in memories), theirs[f"{shared}.weight"].T]
    )
    matrix = lambda name: theirs[f"{name}.weight"].T
    taps = [theirs[f"{name}_conv1d.weight"][:, 0].T.reshape(4, 2, -1) for name in "qkv"]
    return [
        (mixer.router.kernel, matrix("gate")),
        (mixer.q_proj.kernel, matrix("q_proj")),
        (mixer.k_proj.kernel, each("k_proj", "shared_k")),
        (mixer.v_proj.kernel, each("v_proj", "shared_v")),
        (mixer.rule.a_proj.kernel, each("a_proj", "shared_a")),
        (mixer.rule.b_proj.kernel, each("b_proj", "shared_b")),
        (mixer.rule.decay.A_log, theirs["A_log"]),
        (mixer.rule.decay.dt_bias, theirs["dt_bias"]),
        (mixer.conv.weight, np.concatenate(taps, axis=-1).reshape(4, -1)),
        (mixer.gate.kernel, matrix("g_proj")),
        (mixer.norm.scale, theirs["o_norm.weight"]),
        (mixer.out_proj.kernel, matrix("o_proj")),
    ]


@pytest.mark.parametrize("name", CASES)
def test_layer_of_the_authors(golden, name):
    file = golden(f"mom/mom_layer_{name}")
    mixer = layer_of(file, **CASES[name])
    mask = file.get("in.attention_mask")
    ids = None if mask is None else jnp.asarray(mask, jnp.int32)
    graphdef, variables = nnx.split(mixer)

    @jax.jit
    def everything(variables, x, dy):
        def run(variables, x):
            call = lambda mixer: mixer(x, segment_ids=ids)[0]
            return captured(nnx.merge(graphdef, variables), call)

        y, pull, told = jax.vjp(run, variables, x, has_aux=True)
        return y, told, *pull(dy)

    y, told, by_weight, by_x = everything(variables, file["in.x"], file["ct.y"])
    want = file["out64.y"] if mask is None else file["out64.y"] * mask[..., None]
    assert off(y, want) < 1e-5
    loss = told["loss__load_balance"] / mixer.aux_loss_scale
    np.testing.assert_allclose(loss, file["out64.aux_loss"], rtol=1e-5)
    assert float(told["value__router_dropped"]) == 0
    assert off(by_x, file["grad64.x"]) < 1e-4
    gradients = {name[9:]: a for name, a in file.items() if name.startswith("grad64.w.")}
    nnx.update(mixer, by_weight)
    for parameter, wanted in named(mixer, gradients):
        assert off(parameter[...], wanted) < 1e-4


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))
