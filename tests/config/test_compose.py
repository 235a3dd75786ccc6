"""Composing: every file of configs/ composes; every mistake is answered before anything runs."""

import pathlib
import subprocess
import sys

import pytest
import yaml

from seqzoo.config.compose import compose, expand
from seqzoo.config.paths import options, shipped
from seqzoo.errors import ConfigError

CONFIGS = shipped()
MQAR = ("data=mqar", "task=masked_answers")


def names(group):
    return options(group, [CONFIGS])


# What a data set of files wants said.
NEEDED = {"path": "somewhere", "vocab_size": 256}
PLACES = {
    file.stem: [f"data.{key}={value}" for key, value in NEEDED.items() if f"\n{key}: ???" in text]
    for file in (CONFIGS / "data").glob("*.yaml")
    for text in [file.read_text()]
} | {"masked_text": ["data.text.path=somewhere"]}


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiments_compose(experiment):
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    data = text.split("override /data: ")[1].split()[0]
    config = compose([f"experiment={experiment}", *PLACES[data]])
    assert config.model._target_.startswith("seqzoo.models.")


@pytest.mark.parametrize(
    "group", ["model", "data", "task", "optimizer", "schedule", "trainer", "mesh", "logger"]
)
def test_every_file_of_a_group_composes(group):
    for name in names(group):
        words = [f"{group}={name}"] if group in ("data", "task") else [*MQAR, f"{group}={name}"]
        if group == "model" and "data.n_classes" in recipe(name):
            words = ["data=listops", "task=classification", f"model={name}"]
        if group == "data" and name in ("text", "tokens"):
            with pytest.raises(ConfigError, match="has no value; set it with data."):
                compose(words)
        compose(words + (PLACES[name] if group == "data" else []))


def recipe(name):
    """The text of a model's file and of those that it starts from."""
    text = (CONFIGS / "model" / f"{name}.yaml").read_text()
    base = yaml.safe_load(text).get("defaults", ["_self_"])[0]
    return text + (recipe(base) if isinstance(base, str) and base != "_self_" else "")


@pytest.mark.parametrize("mixer", names("mixer"))
def test_every_mixer_makes_a_pattern(mixer):
    config = compose([*MQAR, "model=mamba_small", f"model.pattern=[{mixer}]"])
    assert list(config.model.mixers) == [mixer]
    assert config.model.mixers[mixer].d_model == config.model.d_model


def test_every_file_starts_with_what_it_is():
    for file in CONFIGS.rglob("*.yaml"):
        first = file.read_text().splitlines()[0]
        assert first.startswith("# "), f"{file.relative_to(CONFIGS)} starts with {first!r}"


def test_hybrid_from_the_command_line():
    config = compose(
        [*MQAR, "model=mamba_small", "model.pattern=[mamba,mamba,attention]", "model.d_model=96"]
    )
    assert list(config.model.mixers) == ["mamba", "attention"]
    assert config.model.mixers.attention.d_model == 96


def test_a_mixer_of_the_pattern_takes_its_keys():
    words = ["model=mamba_small", "model.pattern=[mamba,attention]"]
    config = compose([*MQAR, *words, "model.mixers.attention.n_heads=2"])
    assert config.model.mixers.attention.n_heads == 2


def test_a_channel_mixer_by_name():
    config = compose([*MQAR, "model=mamba_small", "model.channel_mixer=swiglu"])
    assert config.model.channel_mixer._target_.endswith("SwiGLU")


def test_numbers_take_the_type_of_their_key():
    config = compose([*MQAR, "trainer.steps=1e3", "optimizer.lr=1"])
    assert type(config.trainer.steps) is int and type(config.optimizer.lr) is float


MISTAKES = {
    "model.d_modle=32": "did you mean 'model.d_model'",
    "modle.d_model=32": "did you mean 'model.d_model'",
    "d_model=32": "did you mean 'model.d_model'",
    "trainer.step=5": "did you mean 'trainer.steps'",
    "model.d_model=wide": "model.d_model=wide is text; it must be int",
    "trainer.steps=1.5": "trainer.steps=1.5 is a float; it must be int",
    "optimizer.lr=null": "optimizer.lr=None is null; it must be",
    "optimizer.learning_rate=1": "seqzoo calls it 'optimizer.lr'",
    "model.hidden_size=32": "seqzoo calls it 'model.d_model'",
    "batch_size=32": "seqzoo calls it 'trainer.global_batch_size'",
    "model=mamba_smal": "did you mean 'mamba_small'",
    "model.pattern=[mamba,atention]": "did you mean 'attention'",
    "model.mixers.mambo.d_state=4": "did you mean 'model.mixers.mamba.d_state'",
    "model.mixers.mamba.d_sate=4": "did you mean 'model.mixers.mamba.d_state'",
    "model.d_model": "is no key=value",
    "model.d_model=1,2": "names several values; -m runs each",
    "model.pattern=[mamba": "cannot be read",
    "hydra.run.dir=x": "hydra's own settings are off",
    "model.vocab_size=10": "model.vocab_size=10 is smaller than data.vocab_size=256",
    "model.pattern=[]": "must be a list of mixers",
    "model.channel_mixer.d_ff=8": "model.channel_mixer",
    "model.channel_mixer=swigl": "configs/channel_mixer/ has no such file; did you mean 'swiglu'",
    "model.pattern=[[mamba]]": "[mamba] is no name of a mixer; write one list of names",
    "model.pattern=[mamba,3]": "3 is no name of a mixer",
    "mixer=mamba": "write model.pattern=[mamba]",
    "channel_mixer=swiglu": "write model.channel_mixer=swiglu",
    "launcher=slurm": "it needs -m, or 'seqzoo sweep'",
    "launcher.partition=gpu": "it needs -m, or 'seqzoo sweep'",
    "sweep=grid": "it belongs to 'seqzoo sweep'",
    "sweep.n_trials=8": "it belongs to 'seqzoo sweep'",
    "=3": "'=3' has no key before its =",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_named_with_the_nearest_valid_key(word):
    with pytest.raises(ConfigError) as error:
        compose([*MQAR, "model=mamba_small", word])
    assert MISTAKES[word] in str(error.value)


def test_labels_that_a_model_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="model.n_classes=4 is smaller than data.n_classes=10"):
        compose(["experiment=lra_listops", "model.n_classes=4"])


def test_a_classifier_without_labelled_data_says_what_to_choose():
    with pytest.raises(ConfigError, match="from data.input_dim, .* choose data=... that has one"):
        compose([*MQAR, "model=lssl_small"])


def test_mistakes_end_the_command_with_exit_code_2_before_jax_starts():
    code = (
        "import sys; from seqzoo.cli.main import main; code = main(['train', 'model.d_modle=3']);"
        "print('jax' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "model.d_model" in done.stderr
    assert done.stdout.strip() == "False"


def test_expand():
    jobs = expand(["optimizer.lr=1e-3,1e-2", "trainer.seed=range(2)", "model.pattern=[mamba]"])
    assert len(jobs) == 4 and all(job[2] == "model.pattern=[mamba]" for job in jobs)
    long = [["model.pattern=[mamba]"], ["model.pattern=[based]"]]
    assert expand(["mixer=mamba,based"]) == long and expand(["mixer=mamba"]) == long[:1]


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    (word,), (other,) = expand(["data.path=~/my-books/v1.0"]), expand(["data.path=/b"])
    assert (word, other) == (["data.path='/homes/me/my-books/v1.0'"], ["data.path=/b"])
    words = ["experiment=pmnist_lssl", "data.path=~/data/mnist"]
    assert compose(words).data.path == "/homes/me/data/mnist"


def test_a_users_own_groups(tmp_path: pathlib.Path):
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Mine.\ndefaults: [mamba_small, _self_]\nd_model: 48\n")
    config = compose([*MQAR, "model=mine"], config_dir=str(tmp_path / "configs"))
    assert config.model.d_model == 48 and config.model.pattern == ["mamba"]
    (folder / "mamba_small.yaml").write_text("# Hidden.\n")
    with pytest.raises(ConfigError, match="has the name of one of seqzoo's own"):
        compose(MQAR, config_dir=str(tmp_path / "configs"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        compose(MQAR, config_dir=str(tmp_path / "nowhere"))
