"""A Llama-style Transformer as Hugging Face transformers stores it (`LlamaForCausalLM`).

Facts: huggingface/transformers, models/llama. It is our Transformer baseline: pre-norm, rotary
halves, grouped queries, SwiGLU.
"""

from collections.abc import Mapping
from typing import Any

from seqzoo.convert.config import Config
from seqzoo.convert.mapping import Format, Leaf, Settings

_MIXER, _CHANNEL_MIXER = "seqzoo.mixers.attention.Attention", "seqzoo.nn.mlp.SwiGLU"
_LAYER = "model.layers.{i}."

LEAVES = (
    Leaf(("embed", "embedding"), "model.embed_tokens.weight", "rows"),
    Leaf(("norm", "scale"), "model.norm.weight"),
    Leaf(("head", "embedding"), "lm_head.weight", "rows"),
    Leaf(("mixer_norm", "scale"), _LAYER + "input_layernorm.weight"),
    Leaf(("channel_norm", "scale"), _LAYER + "post_attention_layernorm.weight"),
    *(
        leaf
        for ours, theirs in dict(
            q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", out_proj="o_proj"
        ).items()
        for leaf in (
            Leaf(("mixer", ours, "kernel"), f"{_LAYER}self_attn.{theirs}.weight", "transpose"),
            Leaf(("mixer", ours, "bias"), f"{_LAYER}self_attn.{theirs}.bias"),
        )
    ),
    *(
        Leaf(("channel_mixer", one, "kernel"), f"{_LAYER}mlp.{one}_proj.weight", "transpose")
        for one in ("gate", "up", "down")
    ),
)


def node(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` node of a config.json; `tie_word_embeddings` must be in it.

    Raises:
        ConfigError: a setting is missing, or means something that our Transformer cannot do.
    """
    config = Config(values)
    config.must_be("hidden_act", "silu", "swish")
    config.must_be("mlp_bias", False, default=False)
    config.must_be("sliding_window", None, default=None)
    d_model, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    n_heads = config.integer("num_attention_heads")
    common = {"d_model": d_model, "dtype": "float32", "n_residuals": n_layers}
    return {
        "_target_": "seqzoo.models.language_model.LanguageModel",
        "vocab_size": config.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": n_layers,
        "pattern": ["attention"],
        "mixers": {
            "attention": {
                "_target_": _MIXER,
                "_partial_": True,
                **common,
                "n_heads": n_heads,
                "n_kv_heads": config.integer("num_key_value_heads", n_heads),
                "head_dim": config.get("head_dim", None) or d_model // n_heads,
                "rope_theta": _rope_theta(config),
                "use_bias": config.flag("attention_bias", False),
            }
        },
        "channel_mixer": {
            "_target_": _CHANNEL_MIXER,
            "_partial_": True,
            **common,
            "d_ff": config.integer("intermediate_size"),
        },
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": float(config.get("rms_norm_eps")),
        "residual_dtype": "float32",
        "dtype": "float32",
    }


def _rope_theta(config: Config) -> float:
    """The base of the wavelengths: a key of its own in older files, in rope_parameters in newer."""
    rope = config.get("rope_parameters", None) or config.get("rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        config.refuse("rope_type", kind, "default (no scaling of positions)")
    return float(rope["rope_theta"] if "rope_theta" in rope else config.get("rope_theta"))


def values(ours: Settings) -> dict[str, Any]:
    """The config.json of a model of ours; `node` reads it back."""
    model, mixer, block = ours.model, ours.mixer, ours.block
    theta = float(mixer["rope_theta"])
    longest = {} if ours.seq_len is None else {"max_position_embeddings": ours.seq_len}
    return {
        "hidden_act": "silu",
        "mlp_bias": False,
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": mixer["n_heads"],
        "num_key_value_heads": block.mixer.n_kv_heads,
        "head_dim": block.mixer.head_dim,
        "attention_bias": mixer["use_bias"],
        "intermediate_size": block.channel_mixer.up.out_features,
        "rms_norm_eps": model["norm_eps"],
        # Where older and where newer versions of transformers look for it.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": model["tie_embeddings"],
        **longest,
    }


FORMAT = Format(
    model_type="llama",
    architecture="LlamaForCausalLM",
    node=node,
    values=values,
    leaves=LEAVES,
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    mixer=_MIXER,
    channel_mixer=_CHANNEL_MIXER,
    computed=("rotary_emb.inv_freq",),  # of Llama 2 and older: theta ** (-2 i / head_dim)
)
