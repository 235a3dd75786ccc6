"""Studies: a total of trials, each taken by one worker at a time, none lost and none doubled."""

import json
import math
import multiprocessing
import os
import pathlib

import optuna
import pytest
from optuna.trial import TrialState

from seqzoo.errors import ConfigError, LockedError
from seqzoo.sweep import locks, space
from seqzoo.sweep.places import find
from seqzoo.sweep.settings import split
from seqzoo.sweep.study import Study

GRID = ("optimizer.lr=1e-3,3e-3,1e-2", "sweep=grid", "sweep.name=rates")
TPE = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "sweep.n_trials=4", "sweep.name=tpe")


@pytest.fixture(params=["journal", "sqlite"])
def place(request, tmp_path):
    """Where a study lies: words for the command line."""
    return () if request.param == "journal" else (f"sweep.storage=sqlite:///{tmp_path}/study.db",)


def test_every_trial_waits_from_the_beginning_and_the_total_stays(create, place):
    study = create(*GRID, *place)
    again = create(*GRID, *place)
    assert again.path == study.path
    assert [row.state for row in again.rows()] == ["waiting"] * 3
    assert [row.point["optimizer.lr"] for row in again.rows()] == ["0.001", "0.003", "0.01"]


def test_two_workers_never_have_the_same_trial(create, place):
    one = create(*GRID, *place)
    two = Study.open(one.path)
    taken = [one.claim(), two.claim(), one.claim()]
    assert sorted(claimed.number for claimed in taken) == [0, 1, 2]
    assert one.claim() is None and two.claim() is None
    for claimed in taken:
        claimed.tell(0.5)
        claimed.__exit__()
    assert one.finished() and two.claim() is None
    assert len(one.optuna.trials) == 3


def test_a_trial_that_lost_its_worker_goes_on_under_its_number(create, place):
    study = create(*GRID, *place)
    first = study.claim()
    first.note(runs=["mqar/x"])
    first.report(4, 0.25)
    words = first.words
    first.__exit__()  # as the kernel does for a process that dies
    claimed = Study.open(study.path).claim()
    assert claimed.number == first.number and claimed.words == words
    assert claimed.attrs["runs"] == ["mqar/x"] and claimed.reported == {4}
    assert claimed.attrs["starts"] == 2
    claimed.report(4, 0.75)  # told already: what the storage has stays
    claimed.tell(0.5)
    claimed.__exit__()
    (row,) = [row for row in study.rows() if row.done]
    assert row.value == 0.5 and row.last == (4, 0.25)


def test_a_grown_total_adds_trials_and_a_smaller_one_is_refused(create, place):
    words = (*TPE[:1], "sweep=random", "sweep.name=grown", *place)
    three = create(*words, "sweep.n_trials=3").rows()
    five = create(*words, "sweep.n_trials=5").rows()
    assert [row.point for row in five[:3]] == [row.point for row in three] and len(five) == 5
    with pytest.raises(ConfigError, match="sweep.n_trials=2, .* has 5 trials.* or raise it"):
        create(*words, "sweep.n_trials=2", "sweep.max_failures=9")
    study = Study.open(create(*words, "sweep.n_trials=5").path)
    assert len(study.rows()) == 5 and study.definition.sweep.max_failures == 3


def test_a_total_that_is_left_out_stays_where_it_is_larger(create):
    words = (*TPE[:1], "sweep=random", "sweep.name=large")
    assert len(create(*words, "sweep.n_trials=21").rows()) == 21  # 20 would be the default
    assert len(create(*words).rows()) == 21


def test_points_that_were_half_enqueued_are_enqueued_once(create, monkeypatch):
    study = create(*GRID)
    points = study.space.grid()
    optuna.delete_study(study_name="rates", storage=study.optuna._storage)
    enqueue = optuna.Study.enqueue_trial
    calls = []

    def twice_then_break(self, *args, **kwargs):
        enqueue(self, *args, **kwargs)
        calls.append(args)
        if len(calls) == 2:
            raise OSError("the connection broke behind the commit")

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", twice_then_break)
        found = create(*GRID)
    assert [row.point for row in found.rows()] == points
    assert len(found.optuna.trials) == 3


def test_an_ask_beyond_the_total_is_given_back(create):
    study = create(*GRID)
    other = Study.open(study.path)
    taken = [other.claim() for _ in range(3)]
    # As if a trial still waited when this worker looked.
    assert study._ask() is None
    assert len(study.rows()) == 3 and study.optuna.trials[3].state == TrialState.FAIL
    assert not study.finished()
    for claimed in taken:
        claimed.tell(0.1)
    assert study.finished()


def test_tpe_draws_by_study_seed_and_trial_number(create, place):
    study = create(*TPE, *place)
    others = [Study.open(study.path) for _ in range(3)]
    points = [one.claim().point["optimizer.lr"] for one in (study, *others)]
    assert len(set(points)) == 4
    again = create(*TPE[:2], "sweep.name=again")
    assert [again.claim().point["optimizer.lr"] for _ in range(4)] == points
    other = create(*TPE[:2], "sweep.name=other", "sweep.seed=1")
    assert other.claim().point["optimizer.lr"] != points[0]


def test_a_worker_that_died_while_it_drew_changes_nothing(create):
    study = create(*TPE, "optimizer.weight_decay=0,0.1")
    whole = create(*TPE, "optimizer.weight_decay=0,0.1", "sweep.name=whole").claim().point
    trial = study.optuna.ask()
    first = study.space.parameters[0]
    trial.suggest_float(first.name, 1e-4, 1e-2, log=True)  # and then a SIGKILL
    claimed = study.claim()
    assert claimed.number == trial.number and claimed.point == whole


def test_a_diverged_trial_counts_as_worst_and_tpe_lives_with_it(create):
    study = create(*TPE, "sweep.n_trials=14")
    for number in range(14):
        with study.claim() as claimed:
            claimed.report(4, math.nan)
            claimed.tell(study.definition.worst if number % 3 else number / 14)
    states = [row.state for row in study.rows()]
    assert states.count("diverged") == 9 and states.count("finished") == 5
    assert study.rows()[1].value == -math.inf
    assert sum(study.importances().values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("optimizer.lr=1e-3,1e-2",), "optimizer.lr was 1e-3,3e-3,1e-2, is 1e-3,1e-2"),
        (("optimizer.lr=1e-3,3e-3,1e-2", "data.seed=0,1"), "data.seed was not searched"),
        (("optimizer.lr=1e-3,3e-3,1e-2", "sweep.seeds=2"), "sweep.seeds was 1, is 2"),
        (("optimizer.lr=1e-3,3e-3,1e-2", "trainer.steps=13"), "is trainer.steps=13"),
    ],
)
def test_another_search_by_the_same_name_is_refused(create, words, why):
    create(*GRID)
    with pytest.raises(ConfigError, match="searches something else") as caught:
        create(*words, "sweep=grid", "sweep.name=rates")
    assert why in str(caught.value) and "sweep.name=NAME" in str(caught.value)


def test_a_config_file_that_changed_behind_the_same_words_is_told(tiny_words, tmp_path):
    def make(folder: str, b1: float) -> Study:
        file = tmp_path / folder / "optimizer/mine.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"defaults: [adamw, _self_]\nb1: {b1}\n")
        space._checked.cache_clear()  # as in a process of its own
        settings = split([*tiny_words, "optimizer=mine", *GRID])
        return Study.create(settings, root=tmp_path / "runs", config_dir=str(tmp_path / folder))

    study = make("here", 0.8)
    assert make("there", 0.8).path == study.path  # the same content
    behind = f"behind the same words changed since {study.definition.created}"
    with pytest.raises(ConfigError, match="config files or defaults") as caught:
        make("there", 0.7)
    assert behind in str(caught.value) and "nothing more" not in str(caught.value)
    assert "--config-dir" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"--config-dir was {tmp_path}/there, is .*/here"):
        make("here", 0.7)


def test_what_does_not_change_the_search_may_change(create):
    study = create(*GRID)
    again = create(*GRID, "logger.tensorboard=true", "sweep.max_failures=3", "launcher.workers=7")
    assert again.path == study.path and again.definition.sweep.max_failures == 3


def test_without_a_name_the_search_is_the_name(create):
    words = ("optimizer.lr=1e-3,3e-3", "sweep=grid")
    assert create(*words).path == create(*words).path != create(*words, "sweep.seeds=2").path


def test_number_of_trials_and_grid_must_agree(create):
    with pytest.raises(ConfigError, match="the grid has 3 points"):
        create(*GRID, "sweep.n_trials=2")
    with pytest.raises(ConfigError, match="nothing is searched"):
        create("sweep=random")


def test_a_stop_reaches_everybody_and_a_resume_takes_it_back(create, place):
    study = create(*GRID, *place)
    study.stop("enough")
    assert Study.open(study.path).stopped() == "enough" and (study.path / "stop").exists()
    study.resume()
    assert not study.stopped() and not (study.path / "stop").exists()


def test_a_failed_trial_is_put_aside_until_it_is_resumed(create):
    study = create(*GRID, "sweep.max_failures=1")
    with study.claim() as claimed:
        claimed.fail("the disk is full")
    assert study.claim().number == 1
    (row,) = study.failures()
    assert row.attrs["failure"] == "the disk is full"
    assert not study.too_many_failures() and not study.stopped()
    with study.claim() as claimed:
        claimed.fail("again")
    assert study.too_many_failures() and "max_failures" in study.stopped()
    study.resume()
    assert not study.stopped() and study.claim().number == 0


def test_a_trial_that_kills_its_workers_is_put_aside(create):
    study = create("optimizer.lr=1e-3,3e-3", "sweep=grid")
    for _ in range(4):  # saved and left: no sign of anything
        with study.claim() as claimed:
            assert claimed.number == 0
            claimed.leave()
    numbers = []
    for _ in range(12):
        claimed = study.claim()
        if claimed is None:
            break
        numbers.append(claimed.number)
        claimed.__exit__()
    assert numbers[:10] == [0] * 10
    (row,) = study.failures()
    assert row.number == 0 and "its worker died 10 times" in row.attrs["failure"]


def test_a_worker_without_the_folder_joins_by_the_storage(create, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = create(*GRID, f"sweep.storage={url}")
    with study.claim() as lost:
        pass  # its worker died, and its checkpoints lie in the first folder
    there = Study.join("rates", url, root=tmp_path / "elsewhere")
    assert there.path != study.path and there.definition.place != study.definition.place
    claimed = there.claim()
    assert claimed.number == 1 and claimed.words[1:] == lost.words[1:]
    assert study.claim().number == lost.number
    with pytest.raises(ConfigError, match="holds no study 'rats'"):
        Study.join("rats", url, root=tmp_path / "elsewhere")


@pytest.fixture
def machines(create, tmp_path):
    """Two machines that share a storage and no folder."""
    url = f"sqlite:///{tmp_path}/study.db"
    one = create(*GRID, f"sweep.storage={url}", "sweep.vectorize=[optimizer.lr]")
    return one, Study.join("rates", url, root=tmp_path / "elsewhere")


def test_of_two_machines_that_take_a_trial_at_once_one_has_it(machines, monkeypatch):
    one, other = machines
    begin, taken = other.optuna._storage.set_trial_state_values, []

    def slower(*args):
        if not taken:
            taken.append(one.take(0))  # between the other's look and its write
        return begin(*args)

    monkeypatch.setattr(other.optuna._storage, "set_trial_state_values", slower)
    with pytest.raises(LockedError, match="another worker has trial 0"):
        other.take(0)
    assert taken[0].attrs["place"] == one.definition.place and taken[0].attrs["starts"] == 1
    (row,) = [row for row in one.rows() if row.number == 0]
    assert row.attrs["place"] == one.definition.place
    assert not other.free(other._frozen(0)) and other.take(1) is not None
    taken[0].tell(0.5)
    assert other.take(0) is None  # its lock was given back


def test_a_take_that_broke_behind_the_commit_comes_back(machines, monkeypatch):
    _, study = machines
    begin, calls = study.optuna._storage.set_trial_state_values, []

    def broken_once(*args):
        begun = begin(*args)
        calls.append(begun)
        if len(calls) == 1:
            raise OSError("the connection broke behind the commit")
        return begun

    monkeypatch.setattr(study.optuna._storage, "set_trial_state_values", broken_once)
    with pytest.raises(LockedError):
        study.take(0)
    assert calls == [True, False] and not study.free(study._frozen(0))
    study._busy.clear()  # five seconds later: whoever began might still be about to say where
    assert not study.free(study._frozen(0))
    monkeypatch.setattr(locks, "fresh", lambda began: False)  # a minute later
    assert study.free(study._frozen(0)) and study.take(0).number == 0


def test_a_study_is_found_by_name_or_folder(create, tmp_path):
    study = create(*GRID)
    root = tmp_path / "runs"
    assert find("rates", root) == find(str(study.path), root) == study.path
    with pytest.raises(ConfigError, match="there is no study rats; .* rates"):
        find("rats", root)


def test_a_password_is_not_written_down(create, tmp_path, monkeypatch):
    study = create(*GRID)
    text = json.loads((study.path / "study.json").read_text())
    from seqzoo.sweep import storage

    assert text["storage"] is None
    url = "postgresql://me:secret@host/db"
    assert storage.shown(url) == "postgresql://me@host/db"


def _take_all(path: str, answers: "multiprocessing.Queue") -> None:
    study = Study.open(path)
    numbers = []
    while (claimed := study.claim()) is not None:
        with claimed:
            numbers.append(claimed.number)
            claimed.report(1, 0.5)
            claimed.tell(claimed.number / 10)
    answers.put(numbers)


def _share_out(path: pathlib.Path, workers: int) -> list[int]:
    """Lets processes work on a study; returns who had what, together."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    crew = [spawn.Process(target=_take_all, args=(str(path), answers)) for _ in range(workers)]
    for one in crew:
        one.start()
    numbers = [number for _ in crew for number in answers.get(timeout=120)]
    for one in crew:
        one.join()
    return numbers


def test_processes_share_a_study_out(create):
    study = create("data.seed=range(0,12)", "sweep=grid")
    assert sorted(_share_out(study.path, 2)) == list(range(12))
    assert [row.value for row in study.rows()] == [n / 10 for n in range(12)]


@pytest.mark.slow
def test_processes_share_a_study_out_in_sqlite(create, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = create("data.seed=range(0,12)", "sweep=grid", f"sweep.storage={url}")
    assert sorted(_share_out(study.path, 3)) == list(range(12))


def test_postgresql_shares_a_study_out_and_may_be_away(create, postgres):
    study = create(
        "data.seed=range(0,12)", "sweep=grid", f"sweep.storage={postgres.url}",
        "sweep.patience_minutes=1",
    )  # fmt: skip
    claimed = study.claim()
    postgres.stop()
    heard = []
    study.patience.say = lambda text: (heard.append(text), postgres.start())
    claimed.report(4, 0.5)
    assert "is away" in heard[0] and heard[-1] == "the storage is back"
    study.patience.say = print
    claimed.tell(0.0)
    claimed.__exit__()
    assert sorted([*_share_out(study.path, 2), claimed.number]) == list(range(12))
    values = [row.value for row in Study.open(study.path).rows()]
    assert values == [n / 10 for n in range(12)]


def test_words_of_a_sqlite_file_are_the_same_everywhere(create, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = create(*GRID, "sweep.storage=sqlite:///study.db")
    os.chdir("/")
    assert len(Study.open(study.path).rows()) == 3
    settings = split(["optimizer.lr=1,2", "sweep.storage=study.db"])
    with pytest.raises(ConfigError, match="a URL is needed"):
        Study.create(settings, root=tmp_path)
