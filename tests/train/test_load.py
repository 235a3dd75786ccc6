"""seqzoo.load: a model from its folder alone, wherever it was trained."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import seqzoo
from seqzoo.config import schema
from seqzoo.errors import CheckpointError, ConfigError
from seqzoo.train.evaluate import evaluate
from seqzoo.train.loop import Result
from seqzoo.train.run_files import read_metrics


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run with an average of its weights, over four devices."""
    from seqzoo.train import loop

    words = ("mesh.data=2", "mesh.fsdp=2", "trainer.ema_decay=0.5", "optimizer.lr=0.02")
    return loop.train(tiny(*words), overrides=words, root=tmp_path_factory.mktemp("runs"))


def test_what_is_loaded_scores_as_it_did(trained):
    run = seqzoo.load(trained.path)
    found = evaluate(run.setup, run.params, run.rest, "test")
    assert found["loss"] == pytest.approx(trained.test["loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(trained.test["accuracy"], rel=1e-6)


def test_the_model_is_called_and_the_rest_is_at_hand(trained):
    run = seqzoo.load(str(trained.path), step="last")
    logits = run.model(jnp.zeros((2, 16), jnp.int32))
    assert logits.shape == (2, 16, 32) and np.isfinite(logits).all()
    assert run.step == 12 and run.config["trainer"]["steps"] == 12
    assert run.metrics() == read_metrics(trained.path)
    assert run.task.metric == "accuracy" and run.data.vocab_size == 32


def test_an_average_of_the_weights_is_what_one_gets(trained):
    from seqzoo.train import checkpoint

    run = seqzoo.load(trained.path, 12)
    stored = checkpoint.read_meta(trained.path / "checkpoints" / "12")["arrays"]
    assert any(name.startswith("ema/") for name in stored)
    norms = [float(jnp.linalg.norm(run.params["embed"]["embedding"]))]
    wanted = {"params": {"embed": {"embedding": jnp.zeros((32, 8))}}}
    place = trained.path / "checkpoints" / "12"
    params = checkpoint.read_step(place, wanted, partial=True).state["params"]
    norms.append(float(jnp.linalg.norm(params["embed"]["embedding"])))
    assert norms[0] != norms[1]


def test_a_run_of_another_version_is_read(trained, tmp_path):
    """Settings of training that are not known here, or not written there, are no hindrance."""
    folder = shutil.copytree(trained.path, tmp_path / "older")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["trainer"]["prefetch"]
    config["trainer"]["async_save"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"plugins": {"a": 1}}))
    run = seqzoo.load(folder)
    assert run.setup.trainer.prefetch == 4 and run.setup.trainer.steps == 12
    assert "plugins" not in schema.check(run.config)


def test_what_cannot_be_loaded(trained, tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        seqzoo.load(tmp_path)
    with pytest.raises(CheckpointError, match="allowed are 'last', 'best' and the steps"):
        seqzoo.load(trained.path, step=5)


@pytest.mark.parametrize(
    "target", ["os.system", "flax.nnx.filterlib.builtins.open", "hydra.utils.get_object"]
)
def test_a_folder_names_no_code_of_its_choice(trained, tmp_path, target):
    config = (trained.path / "config.yaml").read_text()
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text(config.replace("seqzoo.data.mqar.MQAR", target))
    with pytest.raises(ConfigError, match=f"{target} is refused"):
        seqzoo.load(copy)


def test_from_python(tmp_path, monkeypatch):
    """`seqzoo.train` is the module and can be called."""
    seen = {}

    def train(config, **options):
        seen.update(options, config=config)
        return Result(
            status="finished", step=1, metric="loss", value=1.0, target=None, test={}, path=tmp_path
        )

    monkeypatch.setattr("seqzoo.train.loop.train", train)
    result = seqzoo.train(overrides=["trainer.steps=3", "optimizer.lr=1e-3"], root=str(tmp_path))
    assert result.status == "finished" and seen["overrides"] == [
        "trainer.steps=3",
        "optimizer.lr=1e-3",
    ]
    assert seen["config"].optimizer.lr == 1e-3
