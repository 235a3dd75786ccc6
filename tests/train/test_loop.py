"""Runs in this process, whole: what they leave, and that they go on exactly."""

import json
import os
import signal

import pytest

from seqzoo.errors import ConfigError, LockedError, NotFiniteError, Preempted
from seqzoo.eval import records
from seqzoo.eval.records import read_lines
from seqzoo.train import checkpoint
from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks import Hook
from seqzoo.train.run_files import read_metrics, read_status
from seqzoo.train.session import Session
from seqzoo.train.setup import build_data


def arrays_of(path, step):
    """Every array of a checkpoint, as bytes by name."""
    stored = checkpoint.read_meta(path / "checkpoints" / str(step))["arrays"]
    return {name: array["shards"] for name, array in stored.items()}


def test_a_run_leaves_what_the_page_says(fit):
    result = fit("task.target=0.5", "logger.tensorboard=true")
    path = result.path
    assert (result.status, result.step) == ("finished", 12)
    status = read_status(path)
    assert (status["state"], status["step"], status["attempt"]) == ("finished", 12, 1)
    assert status["metric"]["name"] == "accuracy" and status["metric"]["target"] == 0.5
    assert set(status["test"]) >= {"accuracy", "loss"}
    lines = read_metrics(path)
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [3, 6, 9, 12]
    assert set(train[0]) >= {"train/accuracy", "train/lr", "train/grad_norm", "train/update_norm"}
    assert [line["step"] for line in lines if "valid/loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "test/loss" in line] == [12]
    best = max(line["valid/accuracy"] for line in lines if "valid/accuracy" in line)
    assert result.value == best
    timing = read_lines(path / "timing.jsonl")
    assert all(t["mfu"] > 0 and 0 <= t["data_wait"] <= 1 for t in timing)
    assert (path / "config.yaml").exists() and list((path / "tb").iterdir())
    assert (path.parent / "latest").resolve() == path
    words = str(result)
    assert "target 0.5" in words and "seqzoo eval" in words and str(path.name) in words


def test_tokens_are_counted_where_rows_have_several_lengths(fit, stop_at):
    words = ("~data.seq_len", "~data.num_kv_pairs", "~data.valid_samples", "~data.test_samples",
             "data=mqar_based", "data.train=[[16,2,16],[24,2,16]]", "data.test=[[16,2,8]]",
             "data.block=8", "trainer.steps=4", "trainer.test_samples=0")  # fmt: skip
    stop_at(1, *words)
    path = fit(*words).path
    status = read_status(path)
    assert (status["attempt"], status["step"], status["tokens"]) == (2, 4, 2 * 8 * (16 + 24))
    assert records.read(path).tokens == 640


def test_a_finished_run_answers_and_does_nothing(fit, monkeypatch):
    path = fit().path
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    monkeypatch.setattr(Session, "advance", lambda self: pytest.fail("it trained again"))
    again = fit()
    assert again.status == "finished before" and "--force" in str(again)
    assert "warning" not in str(again)
    assert "warning: trainer.test_samples was null, is 8" in str(fit("trainer.test_samples=8"))
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_force_begins_anew_and_keeps_the_old_folder(fit):
    path = fit().path
    again = fit(force=True)
    assert again.status == "finished" and again.path == path
    assert (path.with_name(path.name + ".1") / "metrics.jsonl").read_bytes() == (
        path / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    ("step", "number"), [(5, signal.SIGTERM), (8, signal.SIGUSR1), (11, signal.SIGUSR2)]
)
def test_stopped_and_going_on_it_equals_one_never_stopped(
    fit, stop_at, run_folder, tmp_path, step, number
):
    more = ("trainer.ema_decay=0.9", "model.dropout=0.1", "optimizer.lr=0.01")
    whole = fit(*more, root=tmp_path / "whole").path
    told = stop_at(step, *more, number=number)
    assert f"{number.name} at step {step + 1}, saved" in told
    path = run_folder()
    status = read_status(path)
    assert (status["state"], status["step"]) == ("preempted", step + 1)
    assert step + 1 in checkpoint.list_steps(path / "checkpoints")
    assert fit(*more).status == "finished"
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert arrays_of(path, 12) == arrays_of(whole, 12)
    assert read_status(path)["attempt"] == 2


def test_stopped_while_evaluating(fit, run_folder, monkeypatch, tmp_path):
    whole = fit(root=tmp_path / "whole").path
    log = RunFolder.phase
    with monkeypatch.context() as patch:

        def and_stop(folder, name, step=None):
            log(folder, name, step)
            if (name, step) == ("eval", 8):
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(RunFolder, "phase", and_stop)
        with pytest.raises(Preempted):
            fit()
    path = run_folder()
    assert checkpoint.list_steps(path / "checkpoints")[-1] == 8
    fit()
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_it_stops_at_its_target(fit):
    result = fit("trainer.stop_at_target=true", "task.metric=loss", "task.target=100")
    assert result.step == 4 and result.value < 100 and result.test


def test_a_loss_that_is_not_finite_stops_the_run(fit, run_folder):
    with pytest.raises(NotFiniteError, match=r"step \d+ is not finite.*optimizer.lr") as caught:
        fit("optimizer.lr=1e30", "optimizer.clip_norm=null", "trainer.save_every=1")
    assert caught.value.exit_code == 3
    path = run_folder()
    status = read_status(path)
    assert status["state"] == "not_finite" and "not finite" in status["error"]
    steps = checkpoint.list_steps(path / "checkpoints")
    assert steps and f"checkpoint of step {steps[-1]} is kept" in str(caught.value)


def test_a_second_process_is_refused(fit, tiny, tmp_path):
    fingerprint = build_data(tiny()).fingerprint()
    held = RunFolder.open(tiny(), root=tmp_path / "runs", data_fingerprint=fingerprint)
    with held, pytest.raises(LockedError, match=f"process {os.getpid()} on .* since"):
        fit()


def test_changed_code_is_noticed(fit, stop_at, run_folder):
    stop_at(5)
    record = run_folder() / "env" / "001.json"
    content = json.loads(record.read_text())
    content["code"]["seqzoo"] = "another"
    record.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="the code of seqzoo changed"):
        fit(strict=True)
    assert fit().status == "finished"
    assert "warning: the code of seqzoo changed" in (run_folder() / "train.log").read_text()


def test_the_average_of_the_weights_is_what_is_evaluated(fit):
    still = fit("trainer.ema_decay=0.999999", "optimizer.lr=0.1")
    losses = [line["valid/loss"] for line in read_metrics(still.path) if "valid/loss" in line]
    assert max(losses) - min(losses) < 1e-3
    train = [line["train/loss"] for line in read_metrics(still.path) if "train/loss" in line]
    assert abs(train[-1] - train[0]) > 1e-2


def test_the_best_and_the_last_two_are_kept(fit):
    path = fit("optimizer.lr=0.05", "trainer.steps=24").path
    values = {
        line["step"]: line["valid/accuracy"]
        for line in read_metrics(path)
        if "valid/accuracy" in line
    }
    best = max(values, key=lambda step: (values[step], step))
    assert set(checkpoint.list_steps(path / "checkpoints")) == {best, 20, 24}


def test_saving_by_the_clock_changes_nothing(fit, tmp_path):
    rarely = fit("trainer.save_every=0", "trainer.save_minutes=0").path
    often = fit("trainer.save_minutes=1e-6", root=tmp_path / "often").path
    assert checkpoint.list_steps(often / "checkpoints")[-2:] == [11, 12]
    assert (often / "metrics.jsonl").read_bytes() == (rarely / "metrics.jsonl").read_bytes()
    assert arrays_of(often, 12) == arrays_of(rarely, 12)


def test_an_error_of_an_earlier_start_is_forgotten(fit, stop_at):
    stop_at(5)
    status = read_status(fit().path)
    assert status["state"] == "finished" and "error" not in status


class Closing(Hook):
    """Says when it is closed, and may fail at it."""

    def __init__(self, name, closed, fails=False):
        self.name, self._closed, self._fails = name, closed, fails

    def close(self):
        self._closed.append(self.name)
        if self._fails:
            raise RuntimeError("the line is dead")


def test_a_hook_that_does_not_close_undoes_no_run(fit, monkeypatch):
    closed = []
    close = checkpoint.Checkpointer.close
    monkeypatch.setattr(
        checkpoint.Checkpointer, "close", lambda self: (closed.append("checkpoints"), close(self))
    )
    path = fit(hooks=[Closing("one", closed, fails=True), Closing("two", closed)]).path
    assert closed == ["one", "two", "checkpoints"]
    assert read_status(path)["state"] == "finished"
    assert "warning: one did not close: the line is dead" in (path / "train.log").read_text()


def test_the_step_that_is_tested_is_on_record(fit, monkeypatch):
    """The best one is damaged at the end: the next best is tested, and says so."""
    values, test = Session._values, Session.test

    def falling(session, split, weights, rest):
        found = values(session, split, weights, rest)
        return found | {"accuracy": 1 / session.step} if split == "valid" else found

    def damaged(session):
        session.wait()
        (session.folder.checkpoints / "4" / "meta" / "metadata").write_text("{}")
        return test(session)

    monkeypatch.setattr(Session, "_values", falling)
    first = fit("trainer.seed=1").path
    assert read_status(first)["test_step"] == 4
    assert "testing step 4, the best on the valid split" in (first / "train.log").read_text()
    monkeypatch.setattr(Session, "test", damaged)
    path = fit("trainer.seed=2").path
    assert read_status(path)["test_step"] == 8
    told = (path / "train.log").read_text()
    assert "renamed damaged-4; step 8 is tested in its place" in told


def test_rows_of_several_lengths(fit):
    gone = [f"~data.{k}" for k in ("seq_len", "num_kv_pairs", "valid_samples", "test_samples")]
    words = (*gone, "data=mqar_based", "data.vocab_size=32", "data.block=8")
    lengths = ("data.train=[[16,2,32],[24,2,32]]", "data.test=[[16,2,8],[32,4,8]]")
    path = fit(*words, *lengths).path
    timing = read_lines(path / "timing.jsonl")
    assert all(line["tokens_per_second"] > 0 for line in timing)
    (tested,) = [line for line in read_metrics(path) if "test/loss" in line]
    assert len([name for name in tested if name.startswith("test/accuracy/")]) == 2


def test_without_evaluations_or_saves_the_end_is_still_both(fit):
    path = fit("trainer.eval_every=0", "trainer.save_every=0", "trainer.save_minutes=0").path
    assert checkpoint.list_steps(path / "checkpoints") == [12]
    assert [line["step"] for line in read_metrics(path) if "valid/loss" in line] == [12]
