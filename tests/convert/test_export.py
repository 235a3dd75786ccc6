"""`seqzoo export`: there and back bit by bit, what transformers wrote, and what is refused."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from seqzoo.cli.main import main
from seqzoo.config.build import build
from seqzoo.convert import export
from seqzoo.convert.checkpoint import FORMATS, open_checkpoint, parameters
from seqzoo.convert.export import describe, export_run
from seqzoo.convert.run import import_run
from seqzoo.errors import CheckpointError, ConfigError
from seqzoo.train.checkpoint import Checkpointer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TIED, UNTIED = GOLDEN / "mamba/hf_state16_hf", GOLDEN / "mamba/hf_state8_bias_untied_hf"
LLAMA = GOLDEN / "attention/llama_gqa_hf"


def model_node(kind: str, **changes) -> dict:
    """A model as a config of ours says it: most keys left to their defaults."""
    node = {
        "_target_": "seqzoo.models.LanguageModel",
        "vocab_size": 13,
        "d_model": 16,
        "n_layers": 3,
        "pattern": [kind],
        "mixers": {
            "mamba": {"_target_": "seqzoo.mixers.mamba.Mamba", "d_state": 4},
            "attention": {"_target_": "seqzoo.mixers.attention.Attention", "n_heads": 2},
        },
        "channel_mixer": None,
    }
    if kind == "attention":
        node["channel_mixer"] = {"_target_": "seqzoo.nn.mlp.SwiGLU"}
    for key, value in changes.items():
        *sections, last = key.split("__")
        inside = node
        for section in sections:
            inside = inside[section]
        inside[last] = value
    for part in (*node["mixers"].values(), *filter(None, [node["channel_mixer"]])):
        part |= {"_partial_": True, "d_model": 16}
    return node


def write_run(path: pathlib.Path, node: dict, arrays: dict | None = None, steps=(0,)) -> dict:
    """A run folder with these parameters, or random ones, at each step its number higher."""
    if arrays is None:
        shell = nnx.eval_shape(lambda: build(node, rngs=nnx.Rngs(0)))
        random = np.random.default_rng(0)
        shapes = flatten_dict(nnx.to_pure_dict(nnx.state(shell, nnx.Param)))
        arrays = {k: random.normal(size=a.shape).astype(np.float32) for k, a in shapes.items()}
    saved = Checkpointer(path / "checkpoints", asynchronous=False)
    for step in steps:
        params = unflatten_dict({k: jnp.asarray(a + step) for k, a in arrays.items()})
        meta = {"metric": {"name": "loss", "mode": "min"}}
        saved.save(step, {"params": params, "rest": {}}, meta, metric=float(step))
    saved.close()
    config = {"model": node, "data": {"_target_": "seqzoo.data.tokens.Tokens", "seq_len": 24}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return arrays


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Mamba of steps 3, the best, and 7."""
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, model_node("mamba"), steps=(3, 7))
    return run


def files_in(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("source", [TIED, UNTIED, LLAMA], ids=lambda path: path.name)
def test_what_transformers_wrote_comes_back(tmp_path, source):
    """Every array, and every value of config.json that both give, through a run folder."""
    if source is UNTIED:
        run = import_run(str(source), "tiny", root=tmp_path)
    else:  # the same without composing a configuration
        run, read = tmp_path / "run", open_checkpoint(str(source))
        write_run(run, read.node, parameters(read))
        shutil.copyfile(source / "config.json", run / "source_config.json")
    (run / "tokenizer.json").write_text("{}")
    written = export_run(run, tmp_path / "out")
    assert files_in(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len({file.stat().st_mode for file in written.files}) == 1
    assert (written.step, written.format) == (0, open_checkpoint(str(source)).format)
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, written.files[0].parent)
    )
    common = before.keys() & after.keys()
    assert {key: after[key] for key in common} == {key: before[key] for key in common}
    assert after.keys() - before.keys() <= {"torch_dtype", "rope_theta"}
    # What stays out shapes a fresh start, chooses code of theirs, or is the default.
    left_out = {"dtype", "initializer_range", "transformers_version", "use_cache"}
    left_out |= {"rescale_prenorm_residual", "time_step_init_scheme"}
    left_out |= {"use_associative_scan", "use_mambapy", "attention_dropout", "pretraining_tp"}
    assert not before.keys() - after.keys() - left_out
    assert open_checkpoint(str(tmp_path / "out")).node == open_checkpoint(str(source)).node


@pytest.mark.parametrize("kind", ["mamba", "attention"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_import_gives_back_the_same_parameters(tmp_path, kind, tied):
    """Widths that the config leaves open, and a vocabulary of 13 in 32 rows."""
    node = model_node(kind, tie_embeddings=tied, pad_vocab_multiple=32)
    before = write_run(tmp_path / "run", node)
    export_run(tmp_path / "run", tmp_path / "out")
    after = parameters(open_checkpoint(str(tmp_path / "out")))
    assert after.keys() == before.keys()
    assert (("head", "embedding") in after) is not tied
    for path, array in after.items():
        expected = before[path]
        if path[-1] == "embedding":  # the import pads anew, with zeros, and to a multiple of 8
            assert expected.shape == (32, 16) and array.shape == (16, 16)
            assert not array[13:].any()
            array, expected = array[:13], expected[:13]
        np.testing.assert_array_equal(array, expected, err_msg=str(path))
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["vocab_size"] == 13 and values["tie_word_embeddings"] is tied
    assert values["eos_token_id"] is None  # transformers would take a token of its own choice
    assert values.get("max_position_embeddings") == (24 if kind == "attention" else None)


def test_steps_dtypes_and_force_on_the_command_line(trained, tmp_path, capsys):
    words = ["export", str(trained), str(tmp_path / "out")]
    norms = {}
    for step in ("3", "last", "best"):
        assert main([*words, "--step", step, "--force"]) == 0
        norms[step] = load_file(tmp_path / "out/model.safetensors")["backbone.norm_f.weight"]
    out = capsys.readouterr().out
    assert "step 7 as MambaForCausalLM, float32" in out and "seqzoo import" in out
    np.testing.assert_array_equal(norms["best"], norms["3"])
    np.testing.assert_allclose(norms["last"] - norms["3"], 4, rtol=1e-5)

    assert main(words) == 2
    said = capsys.readouterr().err
    assert "holds model.safetensors and config.json already; --force" in said
    assert main([*words, "--force", "--dtype", "bfloat16"]) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    assert {array.dtype for array in found.values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        found["backbone.norm_f.weight"], norms["3"].astype(jnp.dtype("bfloat16"))
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"

    assert main([*words, "--force", "--step", "5"]) == 1
    assert main([*words, "--force", "--format", "llama"]) == 2
    assert "pattern [mamba], is no llama" in capsys.readouterr().err
    assert main([*words, "--force", "--format", "lama"]) == 2
    assert "did you mean 'llama'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, changes, text",
    [
        ("mamba", dict(pattern=["mamba", "attention"]), r"\[mamba,attention\], is no mamba and no"),
        ("mamba", dict(pattern=["attention"]), r"pattern \[attention\], is no mamba and no llama"),
        ("attention", dict(channel_mixer___target_="seqzoo.nn.mlp.GELU"), "with GELU, is no mamba"),
        ("mamba", dict(norm="layernorm"), "model.norm=layernorm; a mamba has rmsnorm"),
        ("mamba", dict(norm_place="post"), "norm_place=post; a mamba has pre"),
        ("mamba", dict(final_norm=False), "final_norm=false; a mamba has true"),
        ("mamba", dict(embed_scale=4.0), "embed_scale=4.0"),
        ("mamba", dict(embed_norm=True), "embed_norm=true"),
        ("mamba", dict(positions="learned", max_positions=9), "positions=learned"),
        ("attention", dict(mixers__attention__rope=False), "mixers.attention.rope=false"),
        ("attention", dict(mixers__attention__causal=False), "mixers.attention.causal=false"),
    ],
)
def test_models_without_such_a_form(kind, changes, text):
    with pytest.raises(ConfigError, match=text):
        describe(model_node(kind, **changes))


def test_a_refusal_says_what_else_there_is(tmp_path):
    (tmp_path / "run").mkdir()
    node = model_node("mamba", pattern=["mamba", "attention"])
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"model": node, "data": {}}))
    with pytest.raises(ConfigError) as error:
        export_run(tmp_path / "run", tmp_path / "out")
    for text in (
        "3 layers, pattern [mamba,attention]",
        "every layer Mamba",
        "Orbax",
        "seqzoo.load",
    ):
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_settings_of_training_alone_stand_against_nothing():
    node = model_node("mamba", dropout=0.1, remat="full", embed_std=1.0, dtype="bfloat16")
    assert describe(node).format is FORMATS["mamba"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_leaves_what_was_there(trained, tmp_path, monkeypatch, there):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
        (folder / "config.json").write_text("old")

    def full(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(CheckpointError, match="could not be written.*No space left"):
        export_run(trained, folder, force=True)
    assert folder.exists() is there
    if there:
        assert files_in(folder) == ["config.json"]
        assert (folder / "config.json").read_text() == "old"


def test_places_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is no folder"):
        export_run(trained, tmp_path / "file")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="checkpoint in parts"):
        export_run(trained, tmp_path / "parts", force=True)
