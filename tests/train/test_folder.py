"""The run folder, its lock, its records, and what they say at the next start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from seqzoo.errors import CheckpointError, ConfigError, DataError, LockedError
from seqzoo.train import environment
from seqzoo.train.folder import RunFolder, apply_threads
from seqzoo.train.lock import RunLock
from seqzoo.train.run_files import find_runs, read_metrics, read_status
from seqzoo.train.signals import StopRequest

CONFIG = {"data": {"_target_": "seqzoo.data.mqar.MQAR"}, "optimizer": {"lr": 1e-3}}


def opened(root, **options) -> RunFolder:
    return RunFolder.open(CONFIG, ["optimizer.lr=1e-3"], root=root, **options)


def test_the_same_command_finds_the_same_folder(tmp_path):
    with opened(tmp_path) as one:
        pass
    renamed = one.path.with_name(f"mine-{one.hash}")
    one.path.rename(renamed)
    with RunFolder.open(CONFIG, ["typed=otherwise"], root=tmp_path) as other:
        assert (other.path, other.attempt) == (renamed, 2)
    assert (renamed.parent / "latest").resolve() == renamed
    assert find_runs(tmp_path) == [renamed]
    assert [p.name for p in sorted((renamed / "env").iterdir())] == ["001.json", "002.json"]


def test_a_record_says_what_a_run_was_started_with(tmp_path):
    with opened(tmp_path, data_fingerprint="f", layout={"mesh": {"data": 2}}) as folder:
        record = json.loads((folder.path / "env" / "001.json").read_text())
    assert record["data_fingerprint"] == "f" and record["layout"] == {"mesh": {"data": 2}}
    assert record["versions"]["jax"] and record["host"] == socket.gethostname()
    assert set(record["code"]) == {"seqzoo", "pallas_kernels"}
    assert {"commit", "dirty"} == set(record["git"]) and record["threads"] >= 1


def test_what_changes_rounding_is_said(tmp_path):
    opened(tmp_path, layout={"mesh": {"data": 1}}).close()
    with opened(tmp_path, layout={"mesh": {"data": 8}}) as folder:
        assert not folder.bitwise
        (warning,) = folder.warnings
    assert "layout mesh data 1" in warning and "exact in data and state, not bitwise" in warning


def test_threads_are_taken_again(tmp_path, monkeypatch):
    opened(tmp_path).close()
    record = next(tmp_path.glob("*/*/env/001.json"))
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"threads": 3}))
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(environment, "jax_started", lambda: False)
    assert apply_threads(CONFIG, root=tmp_path) == 3 and os.environ["NPROC"] == "3"
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(environment, "jax_started", lambda: True)
    assert apply_threads(CONFIG, root=tmp_path) == 2
    with opened(tmp_path) as folder:
        assert not folder.bitwise and "CPU threads 3" in folder.warnings[0]


def test_changed_data_is_refused_unless_forced(tmp_path):
    opened(tmp_path, data_fingerprint="f").close()
    with pytest.raises(DataError, match="its fingerprint was f, is g"):
        opened(tmp_path, data_fingerprint="g")
    with opened(tmp_path, data_fingerprint="g", force=True):
        assert len(find_runs(tmp_path)) == 2


def test_strict_refuses_what_else_changed(tmp_path):
    opened(tmp_path).close()
    record = next(tmp_path.glob("*/*/env/001.json"))
    content = json.loads(record.read_text())
    content["versions"]["jax"] = "0.0.1"
    record.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--strict: jax was 0.0.1, is"):
        opened(tmp_path, strict=True)
    with opened(tmp_path) as folder:
        assert folder.warnings[0].startswith("jax was 0.0.1, is")


def test_other_rows_to_evaluate_on_are_noticed(tmp_path):
    """They are no identity, and lines of one metrics.jsonl would not compare."""
    few, all_ = ({**CONFIG, "trainer": {"eval_samples": n, "save_every": n}} for n in (100, None))
    RunFolder.open(few, root=tmp_path).close()
    with pytest.raises(ConfigError, match="--strict: trainer.eval_samples was 100, is null"):
        RunFolder.open(all_, root=tmp_path, strict=True)
    with RunFolder.open(all_, root=tmp_path) as folder:
        assert folder.warnings == ["trainer.eval_samples was 100, is null since the last start"]
    with RunFolder.open(all_, root=tmp_path) as folder:
        assert folder.attempt == 3 and not folder.warnings


def test_status_is_whole_and_adds_up(tmp_path):
    with opened(tmp_path) as folder:
        folder.write_status(step=5, metric={"name": "loss", "value": 1.0, "target": None})
        folder.write_status(state="finished", step=6)
        status = read_status(folder.path)
        assert (status["state"], status["step"], status["metric"]["value"]) == ("finished", 6, 1.0)
        assert "finished on" in folder.finished() and "--force" in folder.finished()
        assert not list(folder.path.glob(".*.tmp"))


def test_metrics_are_cut_back_and_never_invented(tmp_path):
    with opened(tmp_path) as folder:
        folder.metrics_path.write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert read_metrics(folder.path) == [{"step": 1}, {"step": 2}]
        folder.rewind_metrics(12)
        assert folder.metrics_path.read_text() == '{"step": 1}\n'
        with pytest.raises(CheckpointError, match="has 12 bytes, the checkpoint was saved at 99"):
            folder.rewind_metrics(99)


def test_a_start_that_did_nothing_is_taken_back(tmp_path):
    root = tmp_path / "runs"
    with opened(root) as folder:
        assert folder.take_back() and not root.exists()
    first = RunFolder.open(CONFIG | {"model": {}}, ["a"], root=root)
    first.close()
    opened(root).close()
    with opened(root) as again:  # it was there before
        assert not again.take_back()
    with opened(root, force=True) as anew:
        assert anew.take_back()
    assert read_status(anew.path)["attempt"] == 2 and len(find_runs(root)) == 2
    assert os.readlink(first.path.parent / "latest") == anew.path.name
    with RunFolder.open(CONFIG | {"task": {}}, ["b"], root=root) as third:
        first.path.parent.joinpath("latest").unlink()
        first.path.parent.joinpath("latest").symlink_to(first.path.name)  # begun meanwhile
        assert third.take_back()
    assert os.readlink(first.path.parent / "latest") == first.path.name
    assert sorted(path.name for path in first.path.parent.iterdir()) == sorted(
        ["latest", first.path.name, anew.path.name]
    )


def test_force_does_not_move_a_run_at_work(tmp_path):
    with opened(tmp_path), pytest.raises(LockedError):
        opened(tmp_path, force=True)


HOLD = """
import sys, time
from seqzoo.train.lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_holds_the_folder_until_it_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"in use by process {child.pid} on .* since"):
            RunLock(tmp_path)
        child.kill()
        child.wait()
    RunLock(tmp_path).release()


@pytest.mark.parametrize(("alive", "beats"), [(True, 1), (False, 0)])
def test_another_host_shows_by_its_beat(tmp_path, alive, beats):
    holder = {"host": "elsewhere", "pid": 1, "since": "now", "beat": 0}
    file = tmp_path / ".lock"
    file.write_text(json.dumps(holder))

    def beat():
        file.write_text(json.dumps(holder | {"beat": beats}))

    timer = threading.Timer(0.1, beat)
    timer.start()
    try:
        if alive:
            with pytest.raises(LockedError, match="process 1 on elsewhere"):
                RunLock(tmp_path, stale_seconds=2.0)
        else:
            RunLock(tmp_path, stale_seconds=0.4).release()
    finally:
        timer.join()


def test_a_request_to_stop_is_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.agree(0) == (False, False) and stop.agree(1, save=True) == (False, True)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agree(2) == (True, False) and stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def on_ctrl_c():
    """Sets what Ctrl-C does before a request is listened for."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once(on_ctrl_c, capfd):
    on_ctrl_c(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agree(0) == (True, False)
        assert "saves; once more ends at once" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored(on_ctrl_c):
    on_ctrl_c(signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.received is None
