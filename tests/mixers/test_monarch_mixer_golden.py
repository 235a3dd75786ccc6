"""Monarch Mixer against the authors' values: filters, mixers, a whole layer; every gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from pallas_kernels import long_conv
from seqzoo.mixers import MonarchMixer
from seqzoo.nn.block import Block
from seqzoo.nn.implicit_filter import ImplicitFilter, fading, positions
from seqzoo.nn.structured_mlp import BlockDiagonalMLP

Read = Callable[[str], np.ndarray]


def filter_tree(read: Read, prefix: str, two_sided: bool) -> dict:
    """A HyenaFilter of theirs as an ImplicitFilter of ours."""

    def network(name: str) -> dict:
        return {
            "weights": {i: read(f"{prefix}.{name}.{2 * i}.weight").T for i in range(4)},
            "biases": {i: read(f"{prefix}.{name}.{2 * i}.bias") for i in range(3)},
        }

    return {
        "z": read(f"{prefix}.pos_emb.z")[0],
        "frequency": read(f"{prefix}.implicit_filter.1.freq")[0],
        "skip": read(f"{prefix}.bias"),
        "forward": network("implicit_filter"),
        **({"reverse": network("implicit_filter_rev")} if two_sided else {}),
    }


def mixer_tree(
    read: Read, *, two_sided: bool, residual: bool, norm: bool, prefix: str = "w."
) -> dict:
    """A MonarchMixerSequenceMixing of theirs as a MonarchMixer of ours."""
    dense = lambda name: {
        "kernel": read(f"{prefix}{name}.weight").T,
        "bias": read(f"{prefix}{name}.bias"),
    }
    tree = {
        "in_proj": dense("in_linear"),
        "conv": {
            "weight": read(f"{prefix}short_filter.weight")[:, 0].T,
            "bias": read(f"{prefix}short_filter.bias"),
        },
        "filter": filter_tree(read, f"{prefix}filter_fn", two_sided),
        "out_proj": dense("out_linear"),
    }
    if residual:
        tree["residual_filter"] = filter_tree(read, f"{prefix}filter_fn2", two_sided)
    if norm:
        tree["input_norm"] = layer_norm(read, f"{prefix}layernorm")
    return tree


def layer_tree(read: Read) -> dict:
    """A BertLayer of theirs as a Block of ours."""
    return {
        "mixer": mixer_tree(read, two_sided=True, residual=True, norm=False, prefix="w.attention."),
        "channel_mixer": {
            "up": {"weight": read("w.mlp.gated_layers.weight")},
            "down": {"weight": read("w.mlp.wo.weight"), "bias": read("w.mlp.wo.bias")},
        },
        "channel_norm": layer_norm(read, "w.mlp.layernorm"),
    }


def layer_norm(read: Read, prefix: str) -> dict:
    return {"scale": read(f"{prefix}.weight"), "bias": read(f"{prefix}.bias")}


def check(file, make, tree: Callable[[Read], dict], run, tolerances) -> None:
    """Outputs and every gradient of `run(module, x) -> {name: output}` are those of the file.

    Args:
        file: the golden arrays.
        make: gives the module.
        tree: their weights, or gradients, as a tree of ours.
        run: what is compared, by their names.
        tolerances: of outputs and of gradients, from the golden README.
    """
    of_outputs, of_gradients = tolerances
    module = make()
    graphdef, state = nnx.split(module)
    weights = tree(lambda name: file[f"in.{name}"])
    shapes = lambda t: {k: v.shape for k, v in flatten_dict(t).items()}
    assert shapes(nnx.to_pure_dict(state)) == shapes(weights)
    x_name = "x" if "in.x" in file else "u"

    def objective(weights, x):
        outputs = run(nnx.merge(graphdef, weights), x)
        cts = {n: file[f"ct.{n}"] for n in outputs if f"ct.{n}" in file}
        return sum(jnp.sum(outputs[n] * ct) for n, ct in cts.items()), outputs

    grad = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (grads, dx), outputs = grad(weights, file[f"in.{x_name}"])
    for name, got in outputs.items():
        near(name, got, file[f"out64.{name}"], of_outputs)
    wanted = flatten_dict(tree(lambda name: file[f"grad64.{name}"]))
    for path, got in flatten_dict(grads).items():
        near(path, got, wanted[path], of_gradients)
    near("x", dx, file[f"grad64.{x_name}"], of_gradients)


def near(name, got, want, tolerance):
    error = np.max(np.abs(np.asarray(got) - want)) / max(np.max(np.abs(want)), 1e-5)
    assert error <= tolerance, (name, error)


@pytest.mark.parametrize(
    "name, keywords, tolerances",
    [
        (
            "bidir_L37",
            dict(width=10, max_length=37, two_sided=True, emb_dim=5, order=16, frequency=10.0),
            (1e-4, 2e-4),
        ),
        (
            "causal_L40_of_64",
            dict(width=8, max_length=64, emb_dim=3, order=12, frequency=1.0),
            (1e-5, 1e-4),
        ),
    ],
)
def test_filter(golden, name, keywords, tolerances):
    """Kernels of both directions, and the convolution with them."""
    file = golden(f"monarch_mixer/hyena_filter_{name}")
    two_sided = keywords.get("two_sided", False)

    def run(made_by, x):  # theirs has time last
        kernel, reverse = made_by(x.shape[-1])
        x = jnp.swapaxes(x, 1, 2)
        y, _ = long_conv(x, kernel, made_by.skip[...], reverse)
        found = {"y": jnp.swapaxes(y, 1, 2), "k_fwd": kernel}
        return found if reverse is None else found | {"k_rev": reverse}

    make = functools.partial(ImplicitFilter, **keywords, rngs=nnx.Rngs(0))
    check(file, make, lambda read: filter_tree(read, "w.f", two_sided), run, tolerances)
    length, width = keywords["max_length"], keywords["width"]
    np.testing.assert_allclose(
        fading(width), np.abs(file["in.b.f.modulation.deltas"][0, 0]), rtol=1e-5
    )
    features = positions(length, keywords["emb_dim"])
    np.testing.assert_allclose(features[:, :1], file["in.b.f.pos_emb.t"][0], atol=1e-6)


@pytest.mark.parametrize(
    "name, width, keywords, tolerances",
    [
        ("bidir_residual", 12, dict(max_length=37, causal=False), (5e-5, 6e-4)),
        ("causal", 10, dict(max_length=48, residual_long_conv=False), (8e-5, 4e-4)),
        ("causal_residual_ln", 8, dict(max_length=24, input_norm=True), (1e-4, 3e-4)),
    ],
)
def test_mixer(golden, name, width, keywords, tolerances):
    tree = functools.partial(
        mixer_tree,
        two_sided=not keywords.get("causal", True),
        residual=keywords.get("residual_long_conv", True),
        norm=keywords.get("input_norm", False),
    )
    make = functools.partial(MonarchMixer, width, filter_order=12, **keywords, rngs=nnx.Rngs(0))
    run = lambda mixer, u: {"y": mixer(u)[0]}
    check(golden(f"monarch_mixer/mixer_{name}"), make, tree, run, tolerances)


def test_layer(golden):
    """The authors' block: neither norm nor addition around the mixer, post-norm around the MLP."""
    mixer = functools.partial(
        MonarchMixer, 16, max_length=25, causal=False, owns_residual=True, filter_order=12
    )
    make = lambda: Block(
        16,
        mixer=mixer,
        channel_mixer=functools.partial(BlockDiagonalMLP, 16, d_ff=24),
        norm="layernorm",
        norm_place="post",
        norm_eps=1e-12,
        rngs=nnx.Rngs(0),
    )
    run = lambda block, u: {"y": block(u)[0]}
    check(golden("monarch_mixer/bert_layer"), make, layer_tree, run, (2e-4, 4e-4))
