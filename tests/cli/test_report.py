"""Reports of hand-written runs: what a table shows, what it refuses, what it says of itself."""

import base64
import csv
import json
import re
import shutil

import pytest

from seqzoo.eval import plots
from seqzoo.eval.compare import compare, interval, learned, spread
from seqzoo.eval.records import finished, read, read_all, series
from seqzoo.eval.report import size_of, write_comparison, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def test_one_run(write_run, tmp_path):
    run = write_run(tmp_path, accuracy=0.97, test=0.96)
    page = write_report(run)
    assert page == run / "report/index.html"
    for name in ("loss", "metric", "lr", "grad_norm", "tokens_per_second"):
        assert (run / f"report/{name}.png").read_bytes().startswith(PNG)
    text = page.read_text()
    for shown in ("0.97", "0.96", "mqar-v1-0123", "finished", "attention", "optimizer.lr"):
        assert shown in text, shown


def test_what_mixers_report_is_drawn(write_run, tmp_path):
    """Load per memory and entropy over time: a panel per name, of what training reported."""
    run = write_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as out:
        for step in (110, 120):
            told = {"router_load/0": 0.4, "router_load/1": 0.6, "router_entropy/load": 0.97}
            line = {
                f"{split}/report/{k}": v for split in ("train", "valid") for k, v in told.items()
            }
            out.write(json.dumps({"step": step, **line}) + "\n")
    text = write_report(run).read_text()
    for name in ("report_router_load", "report_router_entropy"):
        assert (run / f"report/{name}.png").read_bytes().startswith(PNG)
        assert f'alt="{name}"' in text


def test_layers_are_drawn_in_one_panel(write_run, tmp_path):
    """Mean and layers of a run together; of several runs the means alone."""
    run = write_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as out:
        for step in (110, 120):
            told = {f"train/report/memory_surprise/layer_{i}": 0.1 * i for i in range(12)}
            out.write(
                json.dumps({"step": step, "train/report/memory_surprise": 0.5, **told}) + "\n"
            )
    told = series(read(run).metrics)
    panel = plots.panels(None, told)[-1]
    names = list(plots.lines_of(panel, {"a": told})["a"])
    assert names[0] == "train/report/memory_surprise" and names[-1].endswith("layer_11")
    assert [name[-2:].strip("_") for name in names[1:4]] == ["0", "1", "2"] and len(names) == 13
    assert 'alt="report_memory_surprise"' in write_report(run).read_text()
    for found in plots.lines_of(panel, {"a": told, "b": told}).values():
        assert list(found) == ["train/report/memory_surprise"]


def test_the_page_needs_no_network(write_run, tmp_path):
    text = write_report(write_run(tmp_path)).read_text()
    assert not re.search(r"(src|href)=(?!\"data:)", text)
    assert "http:" not in text and "https:" not in text and "<script" not in text
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 5 and all(base64.b64decode(i).startswith(PNG) for i in images)


def test_what_comes_from_a_folder_is_escaped(write_run, tmp_path):
    run = write_run(tmp_path, name="<script>alert(1)</script>")
    text = write_report(run).read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_csv_holds_every_number(write_run, tmp_path):
    run = write_run(tmp_path)
    with open(write_report(run).with_name("metrics.csv")) as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} >= {"train/loss", "valid/accuracy", "tokens_per_second"}
    assert [row["value"] for row in rows if row["name"] == "valid/accuracy"] == ["0.45", "0.9"]


def test_a_run_that_has_only_begun(write_run, tmp_path):
    """No metrics, no timing, no status but its beginning."""
    run = write_run(tmp_path)
    for name in ("metrics.jsonl", "timing.jsonl", "status.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 10, "train/loss": 3.0}\n{"step": 20, "train/lo')
    assert "unknown" not in write_report(run).read_text()
    assert series(read(run).metrics) == {"train/loss": ([10], [3.0])}


def test_numbers_that_are_none():
    lines = [{"step": 1, "a": "NaN", "b": {"c": 2, "d": "text"}, "e": True}, {"b": 3}]
    found = series(lines)
    assert set(found) == {"a", "b/c"} and found["b/c"] == ([1], [2.0])


def runs_of(write_run, root, values, **changes):
    return [
        write_run(root, accuracy=value, test=value, trainer__seed=seed, **changes)
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_seeds_are_one_row(write_run, tmp_path):
    good = runs_of(write_run, tmp_path, [0.95, 0.97, 0.96, 0.99, 0.98])
    poor = runs_of(write_run, tmp_path, [0.5, 0.6, 0.55, 0.52, 0.61], optimizer__lr=1.0)
    page, found = write_comparison([*poor, *good], tmp_path / "out")
    assert [len(row.records) for row in found.rows] == [5, 5]
    assert [row.median for row in found.rows] == [0.97, 0.55]
    first = found.rows[0]
    assert 0.95 <= first.low <= 0.97 <= first.high <= 0.99
    assert found.matched == [
        "parameters without embeddings", "state bytes", "training FLOPs per token",
    ]  # fmt: skip
    text = " ".join(found.remarks)
    assert "not better" not in text and "seeds" not in text
    with open(page.with_name("comparison.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["solved"] for row in rows] == ["5/5", "0/5"]
    assert rows[0]["accuracy (test)"] == "0.97" and rows[0]["data fingerprint"] == "mqar-v1-0123"
    assert {"commit", "hash", "device", "versions", "implementation", "precision"} <= set(rows[0])


def test_what_decides_a_result_parts_rows_and_how_it_is_computed_does_not(write_run, tmp_path):
    changes: list[dict] = [
        dict(),
        dict(trainer__seed=1),
        dict(trainer__seed=2, model__remat="full"),
        dict(trainer__precision="high"),
        dict(trainer__seed=1, trainer__precision="high"),
        dict(trainer__seed=2, trainer__deterministic=True),
        dict(trainer__seed=3, init_from="runs/mqar/trunk-0123456789"),
        dict(trainer__seed=4, trainer__stop_at_target=True),
    ]
    found = compare(read_all([write_run(tmp_path, **one) for one in changes]), {})
    assert sorted(len(row.records) for row in found.rows) == [1, 1, 1, 2, 3]


def test_what_is_not_matched_is_marked(write_run, tmp_path):
    one = write_run(tmp_path, accuracy=0.9)
    other = write_run(tmp_path, accuracy=0.91, model__d_model=32, trainer__global_batch_size=4)
    mixers = json.loads(json.dumps(read(other).config["model"]["mixers"]))
    assert mixers["attention"]["d_model"] == 16  # hand-written: the model does not even fit
    _, found = write_comparison([one, other], tmp_path / "out")
    text = "\n".join(found.remarks)
    assert "the size of a model could not be had" in text
    assert "NOT MATCHED: tokens read, from 6,400 to 12,800" in text
    assert "NOT MATCHED: order of the data" in text
    assert "fewer than 5 seeds" in text and "tuning is not recorded" in text


def test_sizes_that_differ_are_not_matched(write_run, tmp_path):
    one = write_run(tmp_path, accuracy=0.9)
    wide = {
        "attention": {
            "_target_": "seqzoo.mixers.attention.Attention",
            "_partial_": True,
            "d_model": 16,
            "n_heads": 2,
            "head_dim": 32,
        }
    }
    other = write_run(tmp_path, accuracy=0.91, model__mixers=wide)
    _, found = write_comparison([one, other], tmp_path / "out")
    assert found.matched == []
    (remark,) = [text for text in found.remarks if text.startswith("NOT MATCHED: parameters")]
    assert "parameters without embeddings by" in remark and "--match" in remark
    assert "overlap" not in remark


def test_different_data_do_not_share_a_table(seqzoo, write_run, tmp_path):
    one = write_run(tmp_path)
    other = write_run(tmp_path, fingerprint="mqar-v1-9999", data__seed=1)
    code, _, err = seqzoo("report", one, other, "--out", tmp_path / "out")
    assert code == 2 and "mqar-v1-0123" in err and "mqar-v1-9999" in err
    assert not (tmp_path / "out").exists()


def test_different_metrics_do_not_share_a_table(seqzoo, write_run, tmp_path):
    one, other = write_run(tmp_path), write_run(tmp_path, metric="loss", optimizer__lr=1)
    code, _, err = seqzoo("report", one, other, "--out", tmp_path / "out")
    assert code == 2 and "different metrics (accuracy, loss)" in err


def test_diverged_runs_count_as_worst(write_run, tmp_path):
    good = runs_of(write_run, tmp_path, [0.9, 0.9])
    bad = write_run(tmp_path, accuracy=0.99, state="not_finite", trainer__seed=2)
    found = compare(read_all([*good, bad]), {})
    (row,) = found.rows
    assert min(row.values) == float("-inf") and row.median == 0.9
    assert "1 of 3 runs diverged and count as worst" in found.remarks
    worse = [
        write_run(tmp_path, metric="loss", accuracy=v, state=s, trainer__seed=i, optimizer__lr=9.0)
        for i, (v, s) in enumerate([(0.1, "not_finite"), (2.0, "finished"), (3.0, "finished")])
    ]
    (row,) = compare(read_all(worse), {}).rows
    assert row.median == 3.0


def test_overlapping_intervals_are_not_better(write_run, tmp_path):
    one = runs_of(write_run, tmp_path, [0.90, 0.95, 0.99, 0.91, 0.93])
    other = runs_of(write_run, tmp_path, [0.89, 0.94, 0.98, 0.92, 0.92], optimizer__lr=0.5)
    found = compare(read_all([*one, *other]), {})
    assert any("not better than" in text and "overlap" in text for text in found.remarks)


def test_intervals_and_spreads():
    assert interval([3.0]) == (3.0, 3.0)
    low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert 1.0 <= low <= 3.0 <= high <= 100.0
    assert interval([1.0, 2.0, 3.0]) == interval([1.0, 2.0, 3.0])
    assert spread([100, 102]) == pytest.approx(0.02) and spread([0, 0]) == 0


def test_slices_of_a_run_that_learned_nothing_read_so(write_run, tmp_path):
    evaluation = {
        "split": "test", "step": 100, "metrics": {"accuracy": 0.4, "accuracy/long": 0.3},
    }  # fmt: skip
    for metric, accuracy, shown in (("exact", 0.5, "not learned"), ("accuracy", 0.97, "0.3")):
        changes = dict(optimizer__lr=accuracy, task__metric=metric)
        run = write_run(tmp_path, accuracy=accuracy, metric=metric, **changes)
        (run / "report").mkdir()
        (run / "report/eval-test.json").write_text(json.dumps(evaluation))
        text = write_report(run).read_text()
        assert re.search(rf"accuracy/long</td><td[^>]*>{shown}", text)
    assert (
        learned("loss", 0.5) and not learned("accuracy/short", 0.5) and not learned("exact", None)
    )


def test_a_class_that_is_not_trusted_costs_only_its_size(write_run, tmp_path):
    run = write_run(tmp_path)
    text = (run / "config.yaml").read_text().replace("seqzoo.mixers.attention", "mylab.mixers")
    (run / "config.yaml").write_text(text)
    size, why = size_of(read(run))
    assert size is None and "--trust mylab" in why
    assert "--trust mylab" in write_report(run).read_text()


def test_the_command_prints_the_table(seqzoo, write_run, tmp_path):
    one, other = write_run(tmp_path, accuracy=0.5), write_run(tmp_path, optimizer__lr=0.1)
    code, out, _ = seqzoo("report", one, other)
    assert code == 0 and "matched on parameters" in out and "index.html" in out
    assert (one.parent / "report/index.html").exists()
    found = json.loads(seqzoo("report", one, other, "--format", "json")[1])
    assert [row["place"] for row in found["rows"]] == [1, 2]
    # A shell's `runs/mqar/*` names the link and the report too.
    code, again, _ = seqzoo("report", one.parent / "latest", *sorted(one.parent.iterdir()))
    assert code == 0 and again == out


def test_the_link_is_a_run_like_any_other(seqzoo, write_run, tmp_path):
    """Named beside another one it is compared; the run that it names as well counts once."""
    one, other = write_run(tmp_path, accuracy=0.5), write_run(tmp_path, optimizer__lr=0.1)
    link = one.parent / "latest"
    assert link.resolve() == other
    assert len(json.loads(seqzoo("report", one, link, "--format", "json")[1])["rows"]) == 2
    assert seqzoo("report", other, link)[1].endswith("metrics.csv\n")  # one run alone


def test_studies_collect_finished_runs_once(write_run, tmp_path, capsys):
    """The plots of experiments/ are given runs/mqar/*, as a shell writes it out."""
    run = write_run(tmp_path, accuracy=0.9)
    assert (run.parent / "latest").is_symlink()
    (run.parent / "report").mkdir()
    open_run = write_run(tmp_path, accuracy=0.8, state="running", trainer__seed=1)
    found = finished(map(str, sorted(run.parent.iterdir())))
    assert [one.path for one in found] == [run.resolve()]
    assert capsys.readouterr().err == f"left out: {open_run} is not finished\n"


def test_a_run_that_was_begun_again_counts_twice_and_is_told(write_run, tmp_path):
    run = write_run(tmp_path, accuracy=0.5)
    again = shutil.copytree(run, run.with_name(f"{run.name}.1"))
    (remark,) = [
        text for text in compare(read_all([run, again]), {}).remarks if "begun again" in text
    ]
    assert f"counts 2 times: {run.name}, {again.name}" in remark


def test_a_report_that_cannot_be_written(seqzoo, write_run, tmp_path):
    run = write_run(tmp_path)
    (run / "report").write_text("in the way")
    code, _, err = seqzoo("report", run)
    assert code == 1 and "--out DIR writes it elsewhere" in err
    assert seqzoo("report", run, "--out", tmp_path / "out")[0] == 0
