"""`seqzoo train` as a command, in this process: exit codes, and what is said."""

import os
import resource
import signal

import pytest

from seqzoo.cli.main import main
from seqzoo.train import programs
from seqzoo.train.run_files import find_runs, read_status
from seqzoo.train.session import Session


@pytest.fixture
def command(tiny_words, tmp_path, capsys, monkeypatch):
    """Runs ``seqzoo train WORDS``; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["train", *tiny_words, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.stepz=5", "there is no key 'trainer.stepz'; did you mean 'trainer.steps'?"),
        ("trainer.steps=many", "trainer.steps=many is text; it must be int"),
        ("trainer.steps=-1", "trainer.steps=-1; it must be at least 1"),
        ("optimizer.learning_rate=1", "seqzoo calls it 'optimizer.lr'"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0; it must be above 0"),
        ("mesh.data=3", "cannot be shared by 3 devices"),
        ("data.num_kv_pairs=100", "num_kv_pairs"),
        ("trainer.seed=-1", "trainer.seed=-1; it must be at least 0"),
        ("schedule.warmup_steps=inf", "schedule.warmup_steps=inf; it must be a number of steps"),
        ("schedule.warmup_steps=13", "takes 13 steps, more than trainer.steps=12"),
        ("reset=[optimizer]", "reset=[optimizer] says what init_from leaves behind, and init_from"),
        ("model.d_model=0", "d_model"),
        ("init_from=nowhere", "nowhere is no run folder"),
        ("trainer.eval_batch_size=3", "trainer.eval_batch_size=3 rows cannot be shared by 2"),
    ],
)
def test_a_bad_configuration_ends_before_any_work(command, tmp_path, word, said):
    code, _, err = command(word, *(["mesh.data=2"] if "eval_batch" in word else []))
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_what_only_a_traced_step_finds_leaves_nothing_either(command):
    words = ("trainer.steps=1", "trainer.test_samples=0")
    assert command(*words)[0] == 0
    (path,) = find_runs("runs")
    before = sorted(os.listdir("runs/mqar"))
    code, _, err = command(*words, "task=classification")
    assert code == 2 and "task=classification needs rows with label" in err
    assert sorted(os.listdir("runs/mqar")) == before
    assert os.readlink("runs/mqar/latest") == path.name


def test_a_missing_and_an_empty_file(command, tmp_path):
    text = ("~data.num_kv_pairs", "~data.valid_samples", "~data.test_samples", "data=text",
            "task=next_token", "data.vocab_size=256")  # fmt: skip
    code, _, err = command(*text, "data.path=nowhere.txt")
    assert code == 2 and "nowhere.txt" in err
    (tmp_path / "empty.txt").touch()
    code, _, err = command(*text, "data.path=empty.txt")
    assert code == 2 and "empty.txt" in err
    (tmp_path / "book.txt").write_text("all work and no play makes Jack a dull boy\n" * 100)
    code, _, err = command(*text, "data.path=book.txt", "data.test_fraction=0")
    assert code == 2 and "test" in err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_changed_since_the_run_began(command, tmp_path, monkeypatch):
    file = tmp_path / "book.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    text = ("~data.num_kv_pairs", "~data.valid_samples", "~data.test_samples", "data=text",
            "task=next_token", "data.vocab_size=256", f"data.path={file}")  # fmt: skip
    _stop_at(monkeypatch, 5)
    assert command(*text)[0] == 75
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    file.write_text("the quick brown dog jumps over the lazy fox\n" * 100)
    code, _, err = command(*text)
    assert code == 2 and "the data changed since the run in" in err and "--force" in err
    assert [read_status(path)["state"] for path in find_runs("runs")] == ["preempted"]


def test_stopped_and_finished(command, monkeypatch, tmp_path):
    _stop_at(monkeypatch, 5)
    code, _, err = command()
    assert code == 75 and "stopped by SIGTERM at step 6, saved; the same command goes on" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = command()
    assert code == 0 and "going on" in (find_runs("runs")[0] / "train.log").read_text()
    assert "trained to step 12" in out and "seqzoo eval runs/mqar/" in out
    code, out, _ = command()
    assert code == 0 and "finished on" in out and "--force runs it again" in out


def test_not_finite(command):
    code, _, err = command("optimizer.lr=1e30", "optimizer.clip_norm=null")
    assert code == 3 and "is not finite" in err


def test_a_batch_that_does_not_fit(command, monkeypatch):
    monkeypatch.setattr(programs, "device_bytes", lambda: 1_000)
    monkeypatch.setattr(programs, "_COMPILED", {})
    code, _, err = command("trainer.grad_accum_steps=2")
    assert code == 1
    assert "8 rows of 16 tokens in 2 microbatches does not fit into memory" in err
    assert "it needs about 0.0" in err and "trainer.grad_accum_steps" in err


def test_memory_that_ends_while_running(command, monkeypatch):
    from jax.errors import JaxRuntimeError

    def fail(self, *arguments):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(programs.Program, "__call__", fail)
    code, _, err = command()
    assert code == 1 and "8 rows of 16 tokens does not fit into memory" in err


def test_a_full_disk_under_the_log(command, monkeypatch):
    from seqzoo.train.metrics_log import MetricsLog

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "write", full)
    code, _, err = command()
    assert code == 1 and "the disk or the quota is full" in err and "make room" in err


def test_many_runs_one_after_the_other(command):
    code, out, err = command("-m", "trainer.seed=1,2", "trainer.steps=3", "optimizer.lr=1e-3,1e30",
                             "optimizer.clip_norm=null", "trainer.save_every=0",
                             "--runs", "other runs")  # fmt: skip
    assert out.count("run ") >= 4 and "run 4 of 4" in out
    assert "trainer.seed=2 --runs 'other runs'\n" in out  # what to try next lies there too
    states = sorted(read_status(path)["state"] for path in find_runs("other runs"))
    assert states == ["finished", "finished", "not_finite", "not_finite"]
    assert code == 3 and "not finite" in err
    head, *rows = out.rstrip().splitlines()[-5:]
    assert head.split() == ["state", "step", "accuracy", "test", "trainer.seed", "optimizer.lr",
                            "run"]  # fmt: skip
    assert [line.split()[0] for line in rows] == ["finished", "not_finite"] * 2
    assert [line.split()[4:6] for line in (rows[0], rows[2])] == [["1", "0.001"], ["2", "0.001"]]
    assert all(f"  {os.path.relpath(path)}" in out for path in find_runs("other runs"))


def test_a_table_of_many_runs_that_were_stopped(command, monkeypatch):
    _stop_at(monkeypatch, 1)
    code, out, err = command("-m", "trainer.seed=1,2")
    assert code == 75 and "stopped before run 2 of 2" in err
    first, second = out.rstrip().splitlines()[-2:]
    assert first.split()[:2] == ["preempted", "2"] and second.split() == ["waiting", "2"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.lr=1e-3,-1", "optimizer.lr=-1.0; it must be above 0"),
        ("trainer.precision=high,hihg", "trainer.precision=hihg; allowed: default, high, highest"),
        ("task.metric=accuracy,accuracy/7", "task.metric=accuracy/7"),
        ("data.num_kv_pairs=2,100", "num_kv_pairs"),
        ("model.d_model=8,0", "d_model"),
    ],
)
def test_a_value_of_the_last_run_ends_all_before_any_work(command, tmp_path, word, said):
    code, _, err = command("-m", word)
    assert code == 2 and said in err
    assert not (tmp_path / "runs").exists()


def test_options(command):
    assert command("trainer.steps=3")[0] == 0
    assert command("trainer.steps=3", "--force")[0] == 0
    assert len(find_runs("runs")) == 2
    assert command("trainer.steps=3", "--runs", "elsewhere", "--strict")[0] == 0
    assert len(find_runs("elsewhere")) == 1


def _stop_at(monkeypatch, step: int) -> None:
    advance = Session.advance

    def and_stop(session):
        if session.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(session)

    monkeypatch.setattr(Session, "advance", and_stop)


def test_a_full_disk_while_saving_stops_the_run_and_keeps_what_was_saved(command, monkeypatch):
    save = Session.save

    def save_on_a_full_disk(session):
        if session.step < 8:
            return save(session)
        session.wait()  # step 4 is on disk before the disk is full
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no large file from here on
        try:
            save(session)
            session.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    large = "model.d_model=64"
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_on_a_full_disk)
        code, _, err = command(large)
    assert code == 1 and "step 8 could not be saved" in err and "The steps [4] stay" in err
    (path,) = find_runs("runs")
    assert read_status(path)["state"] == "failed"
    assert command(large)[0] == 0
    assert "going on from step 4" in (path / "train.log").read_text()
