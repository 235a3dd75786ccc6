"""Commands that list and compare run folders; they must not start jax."""

import json
import subprocess
import sys
import time

import pytest

from seqzoo.cli.main import COMMANDS


def test_runs_lists_what_is_there(seqzoo, write_run, tmp_path):
    write_run(tmp_path, accuracy=0.5)
    write_run(tmp_path, accuracy=0.97, optimizer__lr=3e-3)
    code, out, _ = seqzoo("runs", "--runs", tmp_path)
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["run", "state", "step", "metric", "value", "target", "age"]
    assert len(rows) == 2 and "lr_0.003" in rows[1] and "0.97" in rows[1]

    code, out, _ = seqzoo("runs", "--runs", tmp_path, "--format", "json")
    assert [row["value"] for row in json.loads(out)] == [0.5, 0.97]


def test_runs_by_experiment_and_state(seqzoo, write_run, tmp_path):
    write_run(tmp_path, name="one")
    write_run(tmp_path, name="two", state="preempted")
    rows = lambda *words: json.loads(
        seqzoo("runs", *words, "--runs", tmp_path, "--format", "json")[1]
    )
    assert [row["run"].split("/")[0] for row in rows("two")] == ["two"]
    assert [row["run"].split("/")[0] for row in rows("--state", "finished")] == ["one"]
    assert "no run" in seqzoo("runs", "two", "--state", "failed", "--runs", tmp_path)[1]
    code, _, err = seqzoo("runs", "tow", "--runs", tmp_path)
    assert code == 2 and "no runs of 'tow'; did you mean 'two'?; there are one, two" in err
    code, _, err = seqzoo("runs", "--state", "finnished", "--runs", tmp_path)
    assert code == 2 and "'finished'" in err


def test_a_killed_run_is_interrupted_not_running(seqzoo, write_run, tmp_path):
    path = write_run(tmp_path, state="running")
    assert " interrupted " in seqzoo("runs", "--runs", tmp_path)[1]
    lock = {"host": "elsewhere", "pid": 1, "since": "now", "beat": 3}
    (path / ".lock").write_text(json.dumps(lock))
    assert " running " in seqzoo("runs", "--runs", tmp_path)[1]


def test_runs_without_a_folder(seqzoo, tmp_path):
    code, _, err = seqzoo("runs", "--runs", tmp_path / "nothing")
    assert code == 2 and "no such folder" in err


def test_diff_shows_what_differs(seqzoo, write_run, tmp_path):
    one = write_run(tmp_path, accuracy=0.5)
    other = write_run(tmp_path, accuracy=0.97, optimizer__lr=3e-3, model__d_model=32)
    code, out, _ = seqzoo("diff", one, other)
    assert code == 0
    assert "optimizer.lr" in out and "0.003" in out and "model.d_model" in out
    assert "task.metric" not in out
    found = json.loads(seqzoo("diff", one, other, "--format", "json")[1])
    assert found["configuration"]["model.d_model"] == [16, 32]
    assert found["metrics"]["best accuracy"] == [0.5, 0.97]
    assert found["environment"] == {}
    assert "task.metric" in seqzoo("diff", one, other, "--all")[1]


def test_diff_of_a_run_with_itself(seqzoo, write_run, tmp_path):
    path = write_run(tmp_path)
    out = seqzoo("diff", path, path)[1]
    assert out.count(": equal") == 3


@pytest.mark.parametrize("command", [["diff", "X", "RUN"], ["report", "X"]])
def test_wrong_paths(seqzoo, write_run, tmp_path, command):
    run = write_run(tmp_path / "runs")
    there = lambda x: [str(run) if w == "RUN" else str(x) if w == "X" else w for w in command]
    code, _, err = seqzoo(*there(tmp_path / "nothing"))
    assert code == 2 and "there is no such folder" in err and "seqzoo runs" in err
    code, _, err = seqzoo(*there(run.parent))
    assert code == 2 and "no run folder" in err and run.name in err


def test_a_config_that_names_code_is_only_shown(seqzoo, write_run, tmp_path):
    one = write_run(tmp_path)
    other = write_run(tmp_path, data__seed=1)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seqzoo.data.mqar.MQAR", "os.system"))
    code, out, _ = seqzoo("diff", one, other)
    assert code == 0 and "os.system" in out


def test_quick_commands_start_quickly_and_without_jax(write_run, tmp_path):
    """Help in a third of a second is the promise; here only what it rests on: no jax, no hydra."""
    write_run(tmp_path)
    program = (
        "import sys; from seqzoo.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(sorted({'jax', 'hydra', 'flax', 'orbax', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    for words in (["--help"], ["runs", "--runs", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_every_help_has_examples_and_starts_no_jax():
    program = (
        "import sys; from seqzoo.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'jax', 'orbax', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:") == len(COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_a_wrong_command_is_answered(seqzoo):
    code, _, err = seqzoo("trian")
    assert code == 2 and "did you mean 'train'" in err


def test_ages_are_short(write_run, tmp_path):
    from seqzoo.cli.runs import age_text, row

    assert [age_text(s) for s in (5, 130, 7300, 200_000)] == ["5 s", "2 min", "2 h", "2 d"]
    assert 0 <= row(write_run(tmp_path), tmp_path)["age"] <= time.time()
