"""What looks on: progress, TensorBoard, Weights & Biases, the profiler, timing."""

import importlib.machinery
import sys
import types

import pytest

from seqzoo.eval.records import read_lines
from seqzoo.train.hooks.profiler import Profiler
from seqzoo.train.hooks.progress import Progress
from seqzoo.train.hooks.tensorboard import TensorBoard

TIMING = {"tokens_per_second": 12345.6, "step_seconds": 0.5, "data_wait": 0.2}


def test_lines_where_there_is_no_terminal(capsys):
    logged = []
    progress = Progress("auto", steps=100, metric="accuracy", log=logged.append)
    progress.start(0)
    progress.line(10, {"loss": 0.5, "accuracy": 0.25, "lr": 1.0}, TIMING)
    progress.line(20, {"loss": 0.4}, TIMING)  # too soon after the last line
    progress.evaluated(20, "valid", {"loss": 0.45, "report/x": 1.0})
    progress.say("compiling")
    progress.close()
    printed = capsys.readouterr().out.splitlines()
    assert printed == logged == [
        "step 10/100  loss 0.5  accuracy 0.25  12,346 tokens/s  waits for data 20%  ETA 0:45",
        "step 20  valid: loss 0.45",
        "compiling",
    ]  # fmt: skip


def test_a_bar_on_a_terminal(capsys):
    progress = Progress("bar", steps=100, metric="accuracy", log=lambda text: None)
    progress.start(0)
    progress.line(50, {"loss": 0.5}, TIMING)
    progress.say("compiled [x]")  # brackets are no markup
    progress.close()
    printed = capsys.readouterr().out
    assert "compiled [x]" in printed and "50/100" in printed and "loss 0.5" in printed


def test_none_is_silent_but_logged(capsys):
    logged = []
    progress = Progress("none", steps=10, metric="loss", log=logged.append)
    progress.start(0)
    progress.say("compiling")
    assert capsys.readouterr().out == "" and logged == ["compiling"]


def scalars(folder):
    """(tag, step) -> value, as TensorBoard would show them: purged steps are gone."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 12 + size + 4
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def test_tensorboard_forgets_what_came_after_the_checkpoint(fit, stop_at, run_folder):
    words = ("logger.tensorboard=true", "trainer.log_every=1")
    stop_at(9, *words)
    # As if it had been killed after step 10 was written, with 8 as the newest checkpoint.
    (run_folder() / "checkpoints" / "10").rename(run_folder() / "gone")
    path = fit(*words).path
    found = scalars(path / "tb")
    losses = {step: values for (tag, step), values in found.items() if tag == "train/loss"}
    assert sorted(losses) == list(range(1, 13))
    assert all(len(values) == 1 for values in losses.values())
    lines = [line for line in read_lines(path / "metrics.jsonl") if "train/loss" in line]
    for line in lines:
        assert losses[line["step"]][0] == pytest.approx(line["train/loss"], rel=1e-6)
    assert ("valid/accuracy", 12) in found and ("timing/mfu", 12) in found


def test_tensorboard_forgets_a_start_that_saved_nothing(tmp_path):
    for attempt in (1, 2):
        board = TensorBoard(tmp_path, attempt)
        board.start(0)
        board.line(1, {"loss": attempt / 2}, {})
        board.close()
    assert scalars(tmp_path) == {("train/loss", 1): [1.0]}


def test_wandb_takes_the_hash_for_its_id(fit, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **options: calls.append(("init", options)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    path = fit("logger.wandb=true").path
    (_, options), *rest = calls
    assert path.name.endswith(options["id"]) and options["resume"] == "allow"
    assert options["mode"] == "offline" and options["dir"] == str(path)
    assert rest[-1] == ("finish",)
    logged = [(step, key) for _, step, values in rest[:-1] for key in values]
    assert (3, "train/loss") in logged and (4, "valid/loss") in logged


def test_wandb_that_is_not_installed(monkeypatch):
    from seqzoo.errors import ConfigError
    from seqzoo.train.settings import LoggerSettings

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger.wandb=true needs .*seqzoo\[wandb\]"):
        LoggerSettings(wandb=True)


def test_a_profile_of_some_steps_names_the_mixers(fit):
    path = fit("trainer.profile=3:5").path
    traces = list((path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"attention" in traces[0].read_bytes()


@pytest.mark.parametrize(("steps", "traced"), [((3, 4, 5), [3]), ((4, 5, 6), [4]), ((5, 6), [])])
def test_a_profile_begins_where_the_run_goes_on(monkeypatch, tmp_path, steps, traced):
    begun, ended = [], []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: begun.append(step))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: ended.append(step))
    profiler = Profiler(tmp_path / "profile", 3, 5)
    for step in steps:
        profiler.before_step(step, None)
    profiler.close()
    assert begun == traced and ended == [5][: len(traced)]


def test_timing_is_kept_across_starts(fit, stop_at):
    stop_at(5)
    lines = read_lines(fit().path / "timing.jsonl")
    assert [line["attempt"] for line in lines] == [1, 1, 2, 2]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
