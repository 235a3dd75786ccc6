"""Runs that begin from a step of another one, and what they leave behind."""

import json
import shutil

import numpy as np
import pytest

from seqzoo.errors import ConfigError
from seqzoo.train import checkpoint, manifest
from seqzoo.train.branch import changed_settings
from seqzoo.train.identity import plain
from seqzoo.train.run_files import read_metrics, read_status, write_json
from seqzoo.train.session import Session


@pytest.fixture
def trunk(fit):
    """A run of 12 steps with checkpoints at 8 and 12 at least."""
    return fit("optimizer.lr=0.01").path


def position(path, step):
    return checkpoint.read_meta(path / "checkpoints" / str(step))["meta"]["data"]["next_sample"]


def test_a_branch_goes_on_where_the_trunk_was(fit, trunk):
    """At the trunk's own rate it repeats the trunk."""
    longer = fit("optimizer.lr=0.01", "trainer.steps=16")
    branch = fit("optimizer.lr=0.01", "trainer.steps=16", f"init_from={trunk}@8")
    assert branch.path != longer.path and branch.step == 16
    ends = [read_metrics(path)[-1] for path in (longer.path, branch.path)]
    assert ends[0]["test/loss"] == ends[1]["test/loss"]
    assert position(branch.path, 16) == position(longer.path, 16) == 16 * 8
    steps = [line["step"] for line in read_metrics(branch.path)]
    assert min(steps) == 8 and read_status(branch.path)["attempt"] == 1
    assert read_status(branch.path)["tokens"] == read_status(longer.path)["tokens"] == 16 * 8 * 16


def test_a_trunk_is_named_by_a_path_from_here(fit, trunk, monkeypatch):
    """As one types it; and where no checkpoint of the branch is whole, it begins there again."""
    monkeypatch.chdir(trunk.parents[1])
    words = (f"init_from={trunk.relative_to(trunk.parents[1])}@8", "trainer.steps=9")
    branch = fit(*words)
    ended = read_metrics(branch.path)
    write_json(branch.path / "status.json", read_status(branch.path) | {"state": "running"})
    for file in branch.path.glob("checkpoints/*/meta/metadata"):
        file.write_text("{}")
    assert fit(*words).path == branch.path and read_metrics(branch.path) == ended
    log = (branch.path / "train.log").read_text()
    assert "no checkpoint is whole; beginning anew" in log
    assert log.count("beginning from step 8") == 2


def test_a_model_that_only_looks_alike_is_told(tiny):
    """Its arrays fit, and it computes something else; what it is computed by is no matter."""
    theirs, ours = plain(tiny())["model"], plain(tiny("model.norm_eps=0.1", "model.remat=full"))
    theirs.pop("norm_eps", None)  # the constructor's 1e-5
    told = list(changed_settings(theirs, ours["model"], "model"))
    assert told == ["model.norm_eps was 1e-05, is 0.1"]


def test_everything_may_be_left_behind(fit, trunk):
    reset = "reset=[optimizer,schedule,data]"
    branch = fit(f"init_from={trunk}@last", reset, "optimizer=lion", "data.seed=5")
    lines = [line for line in read_metrics(branch.path) if "train/loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert position(branch.path, 12) == 12 * 8
    assert read_status(branch.path)["tokens"] == 12 * 8 * 16
    first = [line for line in read_metrics(trunk) if "train/loss" in line][0]
    assert lines[0]["train/param_norm"] != first["train/param_norm"]


def test_it_is_found_again_and_needs_the_trunk_no_more(fit, trunk, stop_at, run_folder):
    words = (f"init_from={trunk}@8", "trainer.steps=16", "optimizer.lr=0.02")
    stop_at(13, *words)
    trunk.rename(trunk.with_name("moved"))
    result = fit(*words)
    assert result.step == 16 and read_status(result.path)["attempt"] == 2


def test_a_best_step_that_moves_is_noticed_and_not_followed(fit, trunk, monkeypatch):
    best = checkpoint.find_step(trunk / "checkpoints", "best")
    words = (f"init_from={trunk}@best", "reset=[schedule]")
    with monkeypatch.context() as patch, pytest.raises(OSError):  # before anything is saved
        patch.setattr(Session, "advance", _broken)
        fit(*words)
    document = json.loads((best / "meta" / "metadata").read_text())
    document["content"]["metric"] = None  # the best is another one now
    (best / "meta" / "metadata").write_text(json.dumps(manifest.seal(document["content"])))
    other = checkpoint.find_step(trunk / "checkpoints", "best")
    branch = fit(*words)
    log = (branch.path / "train.log").read_text()
    assert other != best and log.count(f"beginning from step {best.name}") == 2
    said = f"@best was step {best.name} when this run began and is step {other.name} now"
    assert said in log and said in str(fit(*words))
    shutil.rmtree(trunk)
    assert said not in str(fit(*words))


def _broken(session):
    raise OSError("the machine is gone")


def test_weights_are_those_of_the_step(fit, trunk):
    branch = fit(f"init_from={trunk}@8", "trainer.steps=9", "optimizer=sgd", "optimizer.lr=1e-30",
                 "reset=[optimizer]", "trainer.save_every=1")  # fmt: skip
    stored = [
        checkpoint.read_meta(path / "checkpoints" / str(step))["arrays"]
        for path, step in ((trunk, 8), (branch.path, 9))
    ]
    names = [name for name in stored[0] if name.startswith("params/")]
    assert names and all(stored[0][n]["shards"] == stored[1][n]["shards"] for n in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init_from=nowhere@3"], "nowhere is no run folder"),
        (["init_from={trunk}@77"], r"init_from=.*@77: .*allowed are 'last', 'best'"),
        (["init_from={latest}@best"], "'latest' moves from run to run.*write init_from=/"),
        (["init_from={trunk}@8", "reset=[optimiser]"], "'optimiser'; allowed: .*mean 'optimizer'"),
        (["init_from={trunk}@8", "optimizer=lion"], r"its optimizer does not fit .*reset=\[optim"),
        (["init_from={trunk}@8", "data.seed=5"], r"read other data .*reset=\[data\]"),
        (["init_from={trunk}@8", "trainer.steps=8"], r"is over at step 8.*reset=\[schedule\]"),
    ],
)
def test_what_does_not_fit(fit, trunk, words, said):
    words = [word.format(trunk=trunk, latest=trunk.parent / "latest") for word in words]
    with pytest.raises(ConfigError, match=said):
        fit(*words)


def test_batches_of_another_size_go_on_after_the_last_sample(fit, trunk):
    branch = fit(f"init_from={trunk}@12", "trainer.steps=14", "trainer.global_batch_size=10")
    assert "at sample 100 rather than 96" in (branch.path / "train.log").read_text()
    assert position(branch.path, 14) == 100 + 2 * 10
    assert np.isfinite(branch.test["loss"])


def test_a_branch_that_begins_at_its_target_says_that_it_trains_nothing(fit, trunk):
    words = ("trainer.steps=14", "trainer.eval_every=4", "trainer.stop_at_target=true")
    branch = fit(f"init_from={trunk}@12", *words, "task.target=0")
    assert branch.step == 12
    assert "trainer.stop_at_target=false lets it train" in (branch.path / "train.log").read_text()
