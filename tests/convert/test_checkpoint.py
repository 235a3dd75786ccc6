"""Foreign checkpoint folders: sharded, tied, contradictory, damaged, and pickles."""

import json
import pathlib
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqzoo.convert.checkpoint import open_checkpoint, parameters
from seqzoo.errors import ConfigError, DataError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TIED, UNTIED = GOLDEN / "mamba/hf_state16_hf", GOLDEN / "mamba/hf_state8_bias_untied_hf"


def copy(source: pathlib.Path, folder: pathlib.Path, weights=True, **changes) -> str:
    """A copy of a checkpoint with other values in config.json; None takes a key out."""
    shutil.copytree(source, folder, ignore=None if weights else shutil.ignore_patterns("*.saf*"))
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def arrays_of(source: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(source / "model.safetensors")


def flat(path) -> dict[str, np.ndarray]:
    return {"/".join(map(str, p)): a for p, a in parameters(open_checkpoint(str(path))).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def shard(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The same weights in two files and an index."""
    copy(source, folder, weights=False)
    arrays = arrays_of(source)
    names = sorted(arrays)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, inside in parts.items():
        save_file({name: arrays[name] for name in inside}, folder / file)
    table = {name: file for file, inside in parts.items() for name in inside}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_equals_whole(tmp_path):
    assert_same(flat(shard(UNTIED, tmp_path / "shards")), flat(UNTIED))


def test_a_missing_shard_is_named(tmp_path):
    folder = shard(UNTIED, tmp_path / "shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match="model-00002-of-00002.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_may_not_leave_its_folder(tmp_path, file):
    folder = shard(UNTIED, tmp_path / "shards")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(DataError, match="no file of its folder"):
        open_checkpoint(str(folder))


def test_bfloat16_weights_become_float32(tmp_path):
    folder = pathlib.Path(copy(UNTIED, tmp_path / "half"))
    halves = {name: a.astype(ml_dtypes.bfloat16) for name, a in arrays_of(UNTIED).items()}
    save_file(halves, folder / "model.safetensors")
    found = flat(folder)
    assert all(array.dtype == np.float32 for array in found.values())
    np.testing.assert_array_equal(
        found["norm/scale"], halves["backbone.norm_f.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("said", [True, None])
def test_a_tied_head_in_the_file_is_not_loaded_twice(tmp_path, said):
    """transformers leaves tie_word_embeddings out of config.json where it is the default."""
    folder = pathlib.Path(copy(TIED, tmp_path / "tied", tie_word_embeddings=said))
    if said:
        arrays = arrays_of(TIED)
        arrays["lm_head.weight"] = arrays["backbone.embeddings.weight"].copy()
        save_file(arrays, folder / "model.safetensors")
    assert open_checkpoint(str(folder)).node["tie_embeddings"] is True
    assert_same(flat(folder), flat(TIED))


def test_tied_by_name_but_not_by_value(tmp_path):
    folder = pathlib.Path(copy(TIED, tmp_path / "tied"))
    arrays = arrays_of(TIED)
    arrays["lm_head.weight"] = arrays["backbone.embeddings.weight"] + 1
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head.weight.*differs"):
        open_checkpoint(str(folder))


def test_a_llamas_table_of_frequencies_is_no_parameter(tmp_path):
    """Files of Llama 2 hold it in every layer; it follows from rope_theta."""
    llama = GOLDEN / "attention/llama_gqa_hf"
    folder = pathlib.Path(copy(llama, tmp_path / "old"))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(arrays_of(llama) | table, folder / "model.safetensors")
    assert_same(flat(folder), flat(llama))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_read(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "exploded",))

    folder = pathlib.Path(copy(TIED, tmp_path / "pickled", weights=False))
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    for path in (folder, folder / name):
        with pytest.raises(ConfigError, match=f"{name} is a pickle.*save_pretrained"):
            open_checkpoint(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(use_bias=None), "lacks 'use_bias'"),
        (dict(layer_norm_epsilon=None), "lacks 'layer_norm_epsilon'"),
        (dict(use_bias="no"), "use_bias='no'.*true or false"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*silu"),
        (dict(state_size=8), "A_log' is .*64, 16.*64, 8"),
        (dict(use_bias=True), "lack 'backbone.layers.0.mixer.in_proj.bias'"),
        (dict(use_conv_bias=False), "hold 'backbone.layers.0.mixer.conv1d.bias' and 1 more"),
        (dict(num_hidden_layers=1), "hold 'backbone.layers.1"),
        (dict(tie_word_embeddings=False), "lack 'lm_head.weight'"),
        (dict(intermediate_size=50), "intermediate_size=50.*multiple of hidden_size=32"),
        (dict(model_type="mamba2"), "model_type='mamba2'; known are mamba, llama"),
        (dict(model_type=None, ssm_cfg={}), "mamba_ssm package.*-hf"),
    ],
)
def test_config_json_is_believed_and_checked(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        flat(copy(TIED, tmp_path / "changed", **changes))


def test_every_setting_comes_from_config_json(tmp_path):
    node = open_checkpoint(
        copy(UNTIED, tmp_path / "a", conv_kernel=3, layer_norm_epsilon=1e-6, time_step_rank=5)
    ).node
    mixer = node["mixers"]["mamba"]
    assert (node["d_model"], node["n_layers"], node["vocab_size"]) == (24, 3, 50)
    assert (mixer["d_state"], mixer["d_conv"], mixer["expand"], mixer["dt_rank"]) == (8, 3, 2, 5)
    assert (mixer["use_bias"], mixer["use_conv_bias"]) == (True, True)
    assert (node["tie_embeddings"], node["norm_eps"]) == (False, 1e-6)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "rope_type='llama3'"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(rms_norm_eps=None), "lacks 'rms_norm_eps'"),
    ],
)
def test_llama_settings_that_we_cannot_express(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        open_checkpoint(copy(GOLDEN / "attention/llama_gqa_hf", tmp_path / "changed", **changes))


def test_no_folder_no_config_no_weights(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no config.json"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        open_checkpoint(copy(TIED, tmp_path / "empty", weights=False))


def test_a_file_cut_off_half_way(tmp_path):
    folder = pathlib.Path(copy(TIED, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match="model.safetensors cannot be read"):
        open_checkpoint(str(folder))
