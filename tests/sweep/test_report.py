"""The report of a sweep, and the tables in the terminal."""

import csv
import json
import re

import pytest
from rich.console import Console

from seqzoo.cli import main
from seqzoo.sweep import table
from seqzoo.sweep.report import trial_rows, write_sweep_report
from seqzoo.sweep.results import Results, Trial, best_rows, number, remarks, results
from seqzoo.sweep.study import Study

KEPT = {"mamba": (256, 512), "attention": (4096, 8192)}


def trial(index: int, mixer: str, lr: float, values: list[float], **more) -> Trial:
    size = KEPT[mixer][index % 2]
    default = dict(
        number=index,
        state="finished",
        point={"mixer": mixer, "optimizer.lr": lr},
        value=sorted(values)[len(values) // 2] if values else None,
        values=values,
        tests=values,
        diverged=0,
        architecture=mixer,
        size={"without_embeddings": 900.0, "state_recurrent": 64.0, "state_total": float(size)},
        seconds=60.0,
        runs=[],
        failure=None,
    )
    return Trial(**{**default, **more})


@pytest.fixture(scope="module")
def found() -> Results:
    inf = float("-inf")
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    trials = [trial(i, "mamba", lr, [0.5 + i / 10, 0.52 + i / 10]) for i, lr in enumerate(rates)]
    trials += [trial(4 + i, "attention", lr, [0.96, 0.97]) for i, lr in enumerate(rates[:2])]
    trials += [
        trial(6, "mamba", 0.1, [inf, inf], state="diverged", value=inf, diverged=2, tests=[]),
        trial(7, "mamba", 2e-3, [], state="pruned", value=0.3, tests=[]),
        trial(8, "attention", 5e-3, [], state="failed", value=None, failure="disk <full>"),
    ]
    return Results(
        name="rates",
        metric="accuracy",
        mode="max",
        sampler="grid",
        seeds=2,
        space={"mixer": "mamba,attention", "optimizer.lr": "1e-3,3e-3"},
        trials=trials,
        importances={"mixer": 0.8, "optimizer.lr": 0.2},
    )


def test_the_best_of_each_architecture_with_its_spread(found):
    first, second = best_rows(found)
    assert (first["architecture"], first["best"], first["trials"]) == ("attention", 4, 3)
    assert second["min - max (test)"] == "0.8 - 0.82" and second["diverged"] == 1
    assert second["optimizer.lr"] == 3e-2 and second["state bytes, all"] == 512
    assert first["failed"] == 1 and second["pruned"] == 1


def test_what_is_not_as_a_comparison_should_be_is_said(found):
    told = "\n".join(remarks(found))
    for text in (
        "NOT TUNED ALIKE: trials per architecture differ: attention 3, mamba 6",
        "fewer than 5 seeds",
        "2 runs diverged",
        "1 trials were ended early",
        "mamba: not learned (best 0.82",
    ):
        assert text in told
    assert "attention: not learned" not in told and "not better" not in told


def test_a_best_rate_at_the_edge_of_a_grid_is_said(found):
    rates = [trial(i, "mamba", lr, [0.96 + i / 100] * 2) for i, lr in enumerate((1e-3, 3e-3, 1e-2))]
    edge = Results(**{**vars(found), "trials": rates})
    assert any("edge of the grid" in text for text in remarks(edge))


def test_the_page_opens_offline_and_has_every_plot(found, tmp_path):
    page = write_sweep_report(found, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r'<img alt="(\w+)" src="data:image/png;base64,', text)
    assert shown == ["best", "learning_rate", "frontier", "parallel", "importance"]
    assert not re.search(r"(src|href)=[\"']?https?:", text)
    assert "disk &lt;full&gt;" in text and "9 trials by grid, 2 seeds each" in text
    for name in shown:
        assert (page.parent / f"{name}.png").stat().st_size > 2000
    with open(page.parent / "trials.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["trial"] == "4" and len(rows) == 9
    assert rows[0].keys() == trial_rows(found)[0].keys()


def test_a_study_of_nothing_reports_too(create, tmp_path):
    study = create("optimizer.lr=1e-3,3e-3", "sweep=grid")
    page = write_sweep_report(results(study), tmp_path / "report")
    assert "2 waiting" in page.read_text() and not list(page.parent.glob("*.png"))


def test_texts_of_choices_are_the_numbers_that_they_spell():
    assert [number(text) for text in ("8", "1e-3", "mamba", 0.5)] == [8, 1e-3, "mamba", 0.5]


def test_the_command_finds_a_study(create, capsys, tmp_path, monkeypatch):
    study = create("optimizer.lr=1e-3,3e-3", "sweep=grid")
    with study.claim() as claimed:
        claimed.note(runs=[], architecture="attention", values=["0.5"], tests=[0.4], diverged=0)
        claimed.tell(0.5)
    assert main.main(["report", str(study.path), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][0]["accuracy (valid)"] == 0.5
    assert told["page"] == str(study.path / "report/index.html")
    monkeypatch.chdir(tmp_path)
    assert main.main(["report", study.path.name]) == 0  # by its name, below runs/sweeps
    assert "not finished: 1 of 2 trials" in capsys.readouterr().out


def _three(create) -> Study:
    study = create("optimizer.lr=1e-3,3e-3,1e-2", "sweep=grid", "sweep.name=rates")
    with study.claim() as claimed:
        claimed.tell(0.25)
    with study.claim() as claimed:
        claimed.fail("the disk is full")
    return study


def test_a_line_says_where_a_study_stands(create):
    study = _three(create)
    told = table.line(study, study.rows())
    assert told == "rates: 3 trials: 1 waiting, 1 finished, 1 failed; best accuracy 0.25 (trial 0)"


def test_the_live_table_draws_on_a_terminal(create):
    study = _three(create)
    console = Console(force_terminal=True, width=100, record=True)
    with table.LiveTable(study, console) as live:
        live.say("worker 0 died [by signal 9]")
    text = console.export_text()
    assert "worker 0 died [by signal 9]" in text and "failed" in text and "0.003" in text
    assert "best accuracy 0.25 (trial 0)" in text


def test_lines_where_there_is_no_terminal(create, capsys):
    study = _three(create)
    with table.LiveTable(study, Console(force_terminal=False)) as live:
        live.draw(now=True)
        live.draw(now=True)  # nothing has changed
    assert capsys.readouterr().out.count("rates: 3 trials") == 1
