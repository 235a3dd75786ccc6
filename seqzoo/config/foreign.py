"""What other frameworks call our keys: to answer a foreign key, and for docs/keys.md.

One row per key of ours: its name in fla and flame, in MaxText, in Hugging Face transformers, and
other spellings that people type. Facts only; None where a framework has no such key.
"""

from typing import NamedTuple


class Names(NamedTuple):
    """The names of one key elsewhere."""

    fla: str | None = None
    maxtext: str | None = None
    hf: str | None = None
    also: tuple[str, ...] = ()


NAMES: dict[str, Names] = {
    "model.d_model": Names(
        "hidden_size", "base_emb_dim", "hidden_size", ("n_embd", "emb_dim", "dim", "width")
    ),
    "model.n_layers": Names(
        "num_hidden_layers",
        "base_num_decoder_layers",
        "num_hidden_layers",
        ("n_layer", "num_layers", "depth", "layers"),
    ),
    "model.vocab_size": Names("vocab_size", "vocab_size", "vocab_size", ("n_vocab",)),
    "model.pattern": Names("attn", "decoder_block", "layer_types", ("layer_pattern", "blocks")),
    "model.tie_embeddings": Names(
        "tie_word_embeddings", "logits_via_embedding", "tie_word_embeddings", ()
    ),
    "model.dropout": Names(None, "dropout_rate", "hidden_dropout_prob", ("resid_pdrop",)),
    "model.dtype": Names("mixed_precision_param", "dtype", "dtype", ("torch_dtype",)),
    "model.remat": Names("activation_checkpoint", "remat_policy", "gradient_checkpointing", ()),
    "model.residual_dtype": Names("residual_in_fp32", None, "residual_in_fp32", ()),
    "model.channel_mixer.d_ff": Names(
        "intermediate_size", "base_mlp_dim", "intermediate_size", ("d_intermediate", "ffn_dim")
    ),
    "model.mixers.attention.n_heads": Names(
        "num_heads", "base_num_query_heads", "num_attention_heads", ("n_head", "heads")
    ),
    "model.mixers.attention.n_kv_heads": Names(
        "num_kv_heads", "base_num_kv_heads", "num_key_value_heads", ("num_kv_head",)
    ),
    "model.mixers.attention.head_dim": Names("head_dim", "head_dim", "head_dim", ("d_head",)),
    "model.mixers.attention.rope_theta": Names(
        "rope_theta", "rope_max_timescale", "rope_theta", ("rotary_base",)
    ),
    "model.mixers.mamba.d_state": Names("state_size", None, "state_size", ("ssm_state_size",)),
    "model.mixers.mamba.d_conv": Names("conv_kernel", None, "conv_kernel", ("conv_size",)),
    "model.mixers.mamba.expand": Names("expand", None, "expand", ("expand_factor",)),
    "model.mixers.mamba.dt_rank": Names("time_step_rank", None, "time_step_rank", ()),
    "model.mixers.mamba.dt_min": Names("time_step_min", None, "time_step_min", ()),
    "model.mixers.mamba.dt_max": Names("time_step_max", None, "time_step_max", ()),
    "model.mixers.mamba.dt_init_floor": Names("time_step_floor", None, "time_step_floor", ()),
    "data.seq_len": Names(
        "training.seq_len",
        "max_target_length",
        "max_position_embeddings",
        ("input_seq_len", "seq_length", "context_length", "max_length", "max_seq_len"),
    ),
    "data.path": Names("training.dataset", "dataset_path", "dataset_name", ("data_dir",)),
    "trainer.steps": Names(
        "training.steps", "steps", "max_steps", ("num_steps", "total_steps", "max_iters")
    ),
    "trainer.global_batch_size": Names(
        "training.global_batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        ("batch_size", "train_batch_size"),
    ),
    "trainer.grad_accum_steps": Names(
        "training.gradient_accumulation_steps",
        "gradient_accumulation_steps",
        "gradient_accumulation_steps",
        ("accumulate_grad_batches", "grad_accum"),
    ),
    "trainer.seed": Names("training.seed", "init_weights_seed", "seed", ("random_seed",)),
    "trainer.eval_every": Names(None, "eval_interval", "eval_steps", ("val_check_interval",)),
    "trainer.save_every": Names(
        "checkpoint.interval", "checkpoint_period", "save_steps", ("save_interval",)
    ),
    "trainer.log_every": Names("metrics.log_freq", "log_period", "logging_steps", ()),
    "trainer.profile": Names("profiling.enable_profiling", "profiler", None, ("enable_profiling",)),
    "optimizer.lr": Names(
        "optimizer.lr", "learning_rate", "learning_rate", ("max_lr", "base_lr", "peak_lr")
    ),
    "optimizer.weight_decay": Names(None, "adam_weight_decay", "weight_decay", ("wd",)),
    "optimizer.b1": Names(None, "adam_b1", "adam_beta1", ("beta1", "betas")),
    "optimizer.b2": Names(None, "adam_b2", "adam_beta2", ("beta2",)),
    "optimizer.eps": Names("optimizer.eps", "adam_eps", "adam_epsilon", ("epsilon",)),
    "optimizer.clip_norm": Names(
        "training.max_norm",
        "gradient_clipping_threshold",
        "max_grad_norm",
        ("grad_clip", "gradient_clip_val", "clip_grad_norm"),
    ),
    "schedule.warmup_steps": Names(
        "lr_scheduler.warmup_steps", "warmup_steps_fraction", "warmup_steps", ("num_warmup_steps",)
    ),
    "schedule.min_ratio": Names(
        "lr_scheduler.lr_min", "learning_rate_final_fraction", "min_lr_rate", ("min_lr",)
    ),
    "mesh.data": Names(
        "training.data_parallel_replicate_degree", "ici_data_parallelism", None, ("dp",)
    ),
    "mesh.fsdp": Names(
        "training.data_parallel_shard_degree", "ici_fsdp_parallelism", "fsdp_config", ()
    ),
    "mesh.tensor": Names(
        "training.tensor_parallel_degree", "ici_tensor_parallelism", "tp_size", ("tp",)
    ),
    "mesh.sequence": Names(
        "experimental.context_parallel_degree", "ici_sequence_parallelism", None, ("sp", "cp")
    ),
    "name": Names("job.description", "run_name", "run_name", ("experiment_name",)),
    "init_from": Names(
        "checkpoint.load_step", "load_parameters_path", "resume_from_checkpoint", ("init_ckpt",)
    ),
}


def _answers() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for ours, names in NAMES.items():
        for theirs in (names.fla, names.maxtext, names.hf, *names.also):
            if theirs is not None:
                word = theirs.rpartition(".")[2]
                if word != ours.rpartition(".")[2] and ours not in found.setdefault(word, []):
                    found[word].append(ours)
    return found


ANSWERS = _answers()
# Words that mean what two keys of ours mean together.
ANSWERS["residual_in_fp32"] = ["model.residual_dtype"]


def answer(word: str) -> list[str]:
    """Returns our keys for a foreign word: ``answer("hidden_size")`` is ["model.d_model"]."""
    return ANSWERS.get(word, [])
