"""Mamba as Hugging Face transformers stores it (`MambaForCausalLM`).

Facts: huggingface/transformers, models/mamba. Everything is read from config.json: class defaults
there have changed between versions, and released files differ from them.
"""

from collections.abc import Mapping
from typing import Any

from seqzoo.convert.config import Config
from seqzoo.convert.mapping import Format, Leaf, Settings

_MIXER = "seqzoo.mixers.mamba.Mamba"
_LAYER = "backbone.layers.{i}."

LEAVES = (
    Leaf(("embed", "embedding"), "backbone.embeddings.weight", "rows"),
    Leaf(("norm", "scale"), "backbone.norm_f.weight"),
    Leaf(("head", "embedding"), "lm_head.weight", "rows"),
    Leaf(("mixer_norm", "scale"), _LAYER + "norm.weight"),
    # in_proj gives first what is convolved, then the gate, as ours does.
    Leaf(("mixer", "in_proj", "kernel"), _LAYER + "mixer.in_proj.weight", "transpose"),
    Leaf(("mixer", "in_proj", "bias"), _LAYER + "mixer.in_proj.bias"),
    Leaf(("mixer", "conv", "weight"), _LAYER + "mixer.conv1d.weight", "conv"),
    Leaf(("mixer", "conv", "bias"), _LAYER + "mixer.conv1d.bias"),
    Leaf(("mixer", "x_proj", "kernel"), _LAYER + "mixer.x_proj.weight", "transpose"),
    Leaf(("mixer", "dt_proj", "kernel"), _LAYER + "mixer.dt_proj.weight", "transpose"),
    Leaf(("mixer", "dt_bias"), _LAYER + "mixer.dt_proj.bias"),
    Leaf(("mixer", "A_log"), _LAYER + "mixer.A_log"),
    Leaf(("mixer", "D"), _LAYER + "mixer.D"),
    Leaf(("mixer", "out_proj", "kernel"), _LAYER + "mixer.out_proj.weight", "transpose"),
    Leaf(("mixer", "out_proj", "bias"), _LAYER + "mixer.out_proj.bias"),
)


def node(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` node of a config.json; `tie_word_embeddings` must be in it.

    Raises:
        ConfigError: a setting is missing, or means something that our Mamba cannot do.
    """
    config = Config(values)
    config.must_be("hidden_act", "silu", "swish")
    d_model, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    inner = config.integer("intermediate_size", d_model * config.integer("expand", 0))
    if inner % d_model or inner < d_model:
        config.refuse(
            "intermediate_size", inner, f"a multiple of hidden_size={d_model} (ours is `expand`)"
        )
    rank = config.get("time_step_rank")
    return {
        "_target_": "seqzoo.models.language_model.LanguageModel",
        "vocab_size": config.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": n_layers,
        "pattern": ["mamba"],
        "mixers": {
            "mamba": {
                "_target_": _MIXER,
                "_partial_": True,
                "d_model": d_model,
                "dtype": "float32",
                "n_residuals": n_layers,
                "d_state": config.integer("state_size"),
                "d_conv": config.integer("conv_kernel"),
                "expand": inner // d_model,
                "dt_rank": rank if rank == "auto" else config.integer("time_step_rank"),
                # These shape a fresh start only.
                "dt_min": float(config.get("time_step_min", 0.001)),
                "dt_max": float(config.get("time_step_max", 0.1)),
                "dt_init_floor": float(config.get("time_step_floor", 1e-4)),
                "dt_scale": float(config.get("time_step_scale", 1.0)),
                "use_bias": config.flag("use_bias"),
                "use_conv_bias": config.flag("use_conv_bias"),
            }
        },
        "channel_mixer": None,
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": float(config.get("layer_norm_epsilon")),
        # We compute in float32 unless told otherwise; then both kinds of residual are alike.
        "residual_dtype": "float32",
        "dtype": "float32",
    }


def values(ours: Settings) -> dict[str, Any]:
    """The config.json of a model of ours; `node` reads it back."""
    model, mixer = ours.model, ours.mixer
    return {
        "hidden_act": "silu",
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["n_layers"],
        "intermediate_size": mixer["expand"] * model["d_model"],
        "expand": mixer["expand"],
        "state_size": mixer["d_state"],
        "conv_kernel": mixer["d_conv"],
        "time_step_rank": ours.block.mixer.dt_rank,
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        "time_step_floor": mixer["dt_init_floor"],
        "time_step_scale": mixer["dt_scale"],
        "use_bias": mixer["use_bias"],
        "use_conv_bias": mixer["use_conv_bias"],
        "layer_norm_epsilon": model["norm_eps"],
        "residual_in_fp32": model["residual_dtype"] == "float32",
        "tie_word_embeddings": model["tie_embeddings"],
    }


FORMAT = Format(
    model_type="mamba",
    architecture="MambaForCausalLM",
    node=node,
    values=values,
    leaves=LEAVES,
    embedding="backbone.embeddings.weight",
    head="lm_head.weight",
    mixer=_MIXER,
    channel_mixer=None,
)
