"""The BASED models of configs/model/: sizes as released, Zoology's numbers, the dial."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval import describe
from seqzoo.nn.param import decays

LAYERS = {  # of linear attention; a sliding window follows each, all others are convolutions
    "based_360m": (27, (1, 6, 11, 16, 21)),
    "based_1b": (36, (1, 6, 11, 16, 21, 27, 33)),
}


@pytest.mark.parametrize("name, millions", [("based_360m", 362.6), ("based_1b", 1349.5)])
def test_released_sizes(name, millions):
    model = describe.abstract_model(compose([f"model={name}"]).model)
    assert round(describe.parameters(model).total / 1e6, 1) == millions
    n_layers, linear = LAYERS[name]
    kinds = ["base_conv"] * n_layers
    for i in linear:
        kinds[i : i + 2] = ["based", "sliding_window_attention"]
    assert list(model.stack.layers) == kinds
    assert not decays(model.embed.embedding)


def test_the_dial():
    """feature_dim and window set what a layer keeps; neither grows with the context."""
    words = ["model=based_small", "model.mixers.based.n_heads=2", "model.d_model=64"]

    def kept(*more):
        model = describe.abstract_model(compose([*words, *more]).model)
        assert decays(model.embed.embedding)
        assert model.state_bytes(256) == model.state_bytes(16_384)
        return model.state_bytes(256)["recurrent"]

    at = "model.mixers.based.feature_dim={}".format
    window = "model.mixers.sliding_window_attention.window={}".format
    assert kept(at(16)) - kept(at(8)) == 4 * 2 * (153 - 45) * (32 + 1)
    assert kept(window(65)) - kept(window(33)) == 4 * 2 * 32 * 64


def test_golden_zoology(golden):
    """The whole model of the MQAR experiments: logits, loss and every gradient."""
    file = golden("based/zoology_mqar_model")
    node = describe.plain(
        compose(
            [
                "model=zoology_based",
                "data.vocab_size=64",
                "model.d_model=16",
                "model.mixers.based.feature_dim=8",
            ]
        ).model
    )
    graphdef, variables = nnx.split(build(node, rngs=nnx.Rngs(0)))
    params, places = nnx.as_pure(variables), theirs()
    assert set(places) == {k.removeprefix("in.w.backbone.") for k in file if k.startswith("in.w.")}
    for name, (path, turned) in places.items():
        weight = file[f"in.w.backbone.{name}"]
        put(params, path, jnp.asarray(turned(weight)))
    tokens, labels = jnp.asarray(file["in.input_ids"]), jnp.asarray(file["in.labels"])

    def loss(params):
        logits = nnx.merge(graphdef, params)(tokens)
        asked = labels >= 0
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.where(asked, labels, 0)[..., None], axis=-1
        )
        return -jnp.sum(jnp.where(asked, chosen[..., 0], 0)) / jnp.sum(asked), logits

    (found, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert off(logits, file["out64.logits"]) < 1e-5
    assert off(found, file["out64.loss"]) < 1e-5
    for name, (path, turned) in places.items():
        want = turned(file[f"grad64.w.backbone.{name}"]) * file["ct.loss"]
        assert off(at(gradients, path), want) < 1e-4, name


def theirs():
    """Their names -> our place, and how a weight is turned."""
    same, transposed = (lambda w: w), (lambda w: w.T)
    names = {
        "embeddings.word_embeddings.weight": (("embed", "embedding"), same),
        "ln_f.weight": (("norm", "scale"), same),
        "ln_f.bias": (("norm", "bias"), same),
    }
    for i in range(2):
        layer, ours = f"layers.{i}", ("stack", "runs", 0, i)
        for norm, place in (("norm1", "mixer_norm"), ("norm2", "channel_norm")):
            names[f"{layer}.{norm}.weight"] = ((*ours, place, "scale"), same)
            names[f"{layer}.{norm}.bias"] = ((*ours, place, "bias"), same)
    conv, linear = ("stack", "runs", 0, 0, "mixer"), ("stack", "runs", 0, 1, "mixer")
    mixer = "layers.0.sequence_mixer"
    names[f"{mixer}.projection.weight"] = ((*conv, "in_proj", "kernel"), transposed)
    names[f"{mixer}.projection.bias"] = ((*conv, "in_proj", "bias"), same)
    names[f"{mixer}.conv.conv.weight"] = ((*conv, "conv", "weight"), lambda w: w[:, 0].T)
    names[f"{mixer}.conv.conv.bias"] = ((*conv, "conv", "bias"), same)
    for name, ours in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        names[f"layers.1.sequence_mixer.proj_{name}.weight"] = (
            (*linear, ours, "kernel"),
            transposed,
        )
    return names


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree[0] if "runs" in path else tree  # layers are stacked over repeats


def put(tree, path, value):
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value[None] if "runs" in path else value


def off(got, expected):
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))
