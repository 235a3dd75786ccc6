"""What a configuration from outside may not do."""

import os
import pathlib
import sys

import pytest
import yaml

from seqzoo.config.trust import check_targets, load_untrusted
from seqzoo.errors import ConfigError

ATTACKS = {
    "os.system": "os.system",
    "flax.nnx.filterlib.builtins.open": "flax.nnx.filterlib.builtins.open",
    "hydra.utils.get_object": "hydra.utils.get_object",
}


def plain(target):
    return {"model": {"_target_": target, "_args_": ["x"]}}


def nested(target):
    return {"model": {"_target_": "flax.nnx.Linear", "kernel": {"deep": [{"_target_": target}]}}}


def in_args(target):
    return {"model": {"_target_": "flax.nnx.Linear", "_args_": [{"_target_": target}]}}


def under_partial(target):
    return {"model": {"_target_": target, "_partial_": True}}


SHAPES = [plain, nested, in_args, under_partial]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ATTACKS)
def test_attack_is_refused_by_name(tmp_path, target, shape):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(shape(target)))
    with pytest.raises(ConfigError) as error:
        load_untrusted(file)
    assert ATTACKS[target] in str(error.value)
    with pytest.raises(ConfigError):  # a checkpoint's JSON goes the same way
        load_untrusted(shape(target))


@pytest.mark.parametrize("shape", SHAPES)
def test_interpolation_is_refused(tmp_path, shape, monkeypatch):
    monkeypatch.setenv("X", "os.system")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(shape("${oc.env:X}")))
    with pytest.raises(ConfigError, match=r"\$\{oc.env:X\}"):
        load_untrusted(file)
    file.write_text(yaml.safe_dump({"model": {"${oc.env:X}": 1}}))
    with pytest.raises(ConfigError, match="interpolation"):
        load_untrusted(file)


def test_nothing_was_touched(tmp_path):
    """The attack that a check by prefix alone lets through: it would empty the file."""
    file = tmp_path / "precious"
    file.write_text("precious")
    config = {"x": {"_target_": "flax.nnx.filterlib.builtins.open", "_args_": [str(file), "w"]}}
    with pytest.raises(ConfigError, match="does not import as a module"):
        load_untrusted(config)
    # Not even for somebody who trusts all of flax.
    with pytest.raises(ConfigError, match="does not import as a module"):
        load_untrusted(config, trust=["flax"])
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    "target",
    [
        "seqzoo.errors.SeqzooError",  # seqzoo, but not a room on the list
        "seqzoo.config.trust.load_untrusted",
        "optax.GradientTransformation.__new__",
        "optax._src.alias.adam",  # private
        "flax.nnx.filterlib",  # a module
        "flax.nnx.PureState",  # defined elsewhere
        "jax.nn.tanh",
        "optax.no_such_thing",
        "optaxx.adam",
        "optax",
        "",
        "os.path.join",
        "jax.nn",
        "builtins.eval",
        "subprocess.Popen",
        "optax. adam",
    ],
)
def test_what_else_is_refused(target):
    with pytest.raises(ConfigError, match="refused"):
        check_targets({"a": {"_target_": target}})


@pytest.mark.parametrize("target", [3, None, ["os", "system"], {"_target_": "os.system"}])
def test_a_target_is_a_word(target):
    with pytest.raises(ConfigError, match="_target_"):
        check_targets({"a": {"_target_": target}})


@pytest.mark.parametrize(
    "target",
    ["flax.nnx.Linear", "optax.adamw", "optax.nadamw", "jax.nn.silu", "jax.nn.initializers.normal"],
)
def test_what_is_allowed(target):
    config = {"a": [{"b": {"_target_": target, "_partial_": True, "lr": 1e-3}}]}
    assert load_untrusted(config) == config


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mixers.py").write_text("import os\nfrom os import system\nclass Foo: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def test_trust_is_given_by_the_one_who_runs(mylab, monkeypatch):
    config = {"model": {"_target_": "mylab.mixers.Foo"}}
    with pytest.raises(ConfigError, match="--trust mylab"):
        load_untrusted(config)
    assert "mylab" not in sys.modules  # refused before anything of it ran
    with pytest.raises(ConfigError, match="--trust mylab"):
        load_untrusted({**config, "trust": ["mylab"], "env": {"SEQZOO_TRUST": "mylab"}})
    assert load_untrusted(config, trust=["mylab"]) == config
    assert load_untrusted(config, trust="mylab.mixers") == config
    monkeypatch.setenv("SEQZOO_TRUST", "other, mylab")
    assert load_untrusted(config) == config
    # Trusting a package is not trusting what it imported.
    with pytest.raises(ConfigError, match="defined in posix"):
        load_untrusted({"model": {"_target_": "mylab.mixers.system"}})
    with pytest.raises(ConfigError, match="does not import as a module"):
        load_untrusted({"model": {"_target_": "mylab.mixers.os.system"}})


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [true]",
        "a: &x [1]\nb: [*x, *x]",
        "a: [" * 5000,
        "- 1",
        "just words",
        "",
        "a: 2020-01-01",
        "1: b",
        "a: {b",
        "\x00",
    ],
)
def test_yaml_that_is_no_configuration(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_untrusted(file)


def test_deep_and_large_files(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: " + "[" * 100 + "]" * 100)
    with pytest.raises(ConfigError, match="nested deeper"):
        load_untrusted(file)
    with open(file, "wb") as out:
        os.truncate(out.fileno(), 5 * 2**20)
    with pytest.raises(ConfigError, match="bytes"):
        load_untrusted(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_untrusted(pathlib.Path(tmp_path / "missing.yaml"))
