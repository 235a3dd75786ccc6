"""Commands on runs that were really trained: eval, generate, report, import."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import seqzoo as package
from seqzoo.cli.main import main

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = [
    "model=mamba_small", "model.d_model=16", "model.n_layers=2", "model.mixers.mamba.d_state=4",
    "data.seq_len=16", "trainer.global_batch_size=8", "trainer.steps=6", "trainer.eval_every=3",
    "trainer.log_every=2", "logger.progress=none", "logger.tensorboard=false",
    "mesh.data=1",
]  # fmt: skip


def train(root: pathlib.Path, *words: str) -> pathlib.Path:
    before = set(root.glob("*/*/status.json"))
    assert main(["train", *TINY, *words, "--runs", str(root)]) == 0
    (new,) = [p for p in set(root.glob("*/*/status.json")) - before if not p.parent.is_symlink()]
    return new.parent


@pytest.fixture(scope="module")
def recall(tmp_path_factory):
    """A run on recall; learns nothing in six steps."""
    root = tmp_path_factory.mktemp("runs")
    return train(
        root, "data.vocab_size=32", "data.num_kv_pairs=2", "data.valid_samples=16",
        "data.test_samples=24", "trainer.stop_at_target=false", "name=recall",
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A run on bytes."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return train(
        folder / "runs", "data=text", f"data.path={folder / 'book.txt'}", "task=next_token",
        "model.d_model=24", "name=text",
    )  # fmt: skip


def test_eval_prints_and_keeps_its_metrics(seqzoo, recall):
    code, out, _ = seqzoo("eval", recall)
    assert code == 0 and "accuracy" in out and "test split of mqar" in out
    kept = json.loads((recall / "report/eval-test.json").read_text())
    tested = json.loads((recall / "status.json").read_text())["test"]
    assert kept["metrics"] == pytest.approx(tested)  # the loop's own, at its end
    assert kept["split"] == "test" and kept["data_fingerprint"].startswith("mqar")

    found = json.loads(seqzoo("eval", recall, "--step", "last", "--format", "json")[1])
    assert found["step"] == 6


def test_eval_on_other_data_by_overrides(seqzoo, recall):
    code, out, _ = seqzoo("eval", recall, "data.seq_len=32", "data.test_samples=8")
    assert code == 0 and "not learned" in out
    kept = json.loads(
        (recall / "report/eval-test-data.seq_len_32-data.test_samples_8.json").read_text()
    )
    assert kept["data"]["seq_len"] == 32 and kept["data"]["num_kv_pairs"] == 2


def test_eval_of_slices(seqzoo, recall):
    """Other data altogether, whose rows come in groups."""
    words = ["data=induction_heads", "data.test_lengths=[8,12]", "data.test_samples=8"]
    found = json.loads(seqzoo("eval", recall, *words, "--format", "json")[1])
    slices = {name for name in found["metrics"] if name.startswith("accuracy/")}
    assert len(slices) == 2
    assert "accuracy/" in seqzoo("eval", recall, *words, "--samples", "4")[1]


@pytest.mark.parametrize(
    "words, text",
    [
        (["data.seq_lenn=32"], "did you mean 'data.seq_len'"),
        (["data.seq_len=many"], "data.seq_len=many is text; it must be int"),
        (["data.context_length=32"], "seqzoo calls it 'data.seq_len'"),
        (["model.d_model=32"], "belongs to what was trained"),
        (["optimizer.lr=1"], "belongs to what was trained"),
        (["trainer.steps=1"], "belongs to what was trained"),
        (["model=mamba_small"], "belongs to what was trained"),
        (["data=mqarr"], "did you mean 'mqar'"),
        (["data.vocab_size=64"], "data.vocab_size=64 is more than the model knows (32)"),
        (["data.seq_len"], "is no key=value"),
        (["data.seq_len=16,32"], "data.seq_len=16,32 names several values"),
        (["--samples", "0"], "--samples is 0"),
    ],
)
def test_eval_answers_mistakes(seqzoo, recall, words, text):
    code, _, err = seqzoo("eval", recall, *words)
    assert code == 2 and text in err, err


def test_eval_of_a_run_that_cannot_be_written_shows_its_figures(seqzoo, recall, tmp_path):
    copy = shutil.copytree(recall, tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
    (copy / "report").write_text("in the way")
    code, out, _ = seqzoo("eval", copy, "--samples", "8")
    assert code == 0 and "accuracy" in out and "eval-test.json cannot be written" in out


@pytest.mark.parametrize("command", [["eval"], ["generate", "--tokens", "1"]])
def test_steps_and_folders_that_are_not_there(seqzoo, recall, write_run, tmp_path, command):
    name, *words = command
    code, _, err = seqzoo(name, recall, *words, "--step", "7")
    assert code == 1 and "allowed are 'last', 'best' and the steps [" in err
    code, _, err = seqzoo(name, tmp_path / "nothing", *words)
    assert code == 2 and "there is no such folder" in err
    code, _, err = seqzoo(name, recall.parent, *words)
    assert code == 2 and "no run folder" in err and recall.name in err
    code, _, err = seqzoo(name, write_run(tmp_path), *words)
    assert code == 1 and "there is no checkpoint in" in err


def test_generate_continues_text(seqzoo, text):
    code, out, err = seqzoo("generate", text, "--prompt", "the quick ", "-n", "20", "--no-stop")
    assert code == 0 and out.startswith("the quick ")
    assert "tokens/s" in err and "state" in err
    again = seqzoo("generate", text, "--prompt", "the quick ", "-n", "20", "--no-stop")[1]
    assert again == out
    other = seqzoo(
        "generate", text, "--prompt", "the quick ", "-n", "20", "--no-stop", "--seed", "1"
    )[1]
    assert other != out


def test_generate_several_rows_and_json(seqzoo, text, tmp_path):
    (tmp_path / "start.txt").write_text("fox")
    words = ["--prompt", "the", "--prompt-file", tmp_path / "start.txt", "-n", "8"]
    out = seqzoo("generate", text, *words)[1]
    assert out.startswith("--- 1\nthe") and "--- 2\nfox" in out
    found = json.loads(
        seqzoo("generate", text, *words, "--temperature", "0", "--format", "json")[1]
    )
    assert len(found["rows"]) == 2 and len(found["rows"][0]["tokens"]) == 8
    assert found["state_bytes"] > 0


def test_generate_tokens_of_a_synthetic_task(seqzoo, recall):
    code, out, _ = seqzoo("generate", recall, "--tokens", "3,20", "-n", "4", "--temperature", "0")
    assert code == 0 and len(out.split()) == 6 and out.split()[:2] == ["3", "20"]
    model = package.load(recall).model
    tokens = [int(word) for word in out.split()]
    logits = np.asarray(model(np.array([tokens])))[0]
    assert np.argmax(logits[1:-1], axis=-1).tolist() == tokens[2:]


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "give a prompt"),
        (["--prompt", "abc"], "--tokens 1,2,3"),
        (["--tokens", "a,b"], "must be numbers"),
        (["--tokens", "99"], "token 99; the model knows 0..31"),
        (["--tokens", "1", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt-file", "/nothing/there"], "cannot be read"),
    ],
)
def test_generate_answers_mistakes(seqzoo, recall, words, text):
    code, out, err = seqzoo("generate", recall, *words)
    assert code == 2 and text in err, err
    assert not out or out.endswith("\n")  # of a prompt that was shown before


def test_report_of_a_trained_run(seqzoo, recall):
    assert (recall / "report/index.html").exists()  # made without asking, at the end of training
    code, out, _ = seqzoo("report", recall)
    assert code == 0
    files = {pathlib.Path(line).name for line in out.splitlines()}
    assert {"index.html", "metrics.csv", "loss.png", "metric.png", "lr.png"} <= files
    assert {"grad_norm.png", "tokens_per_second.png"} <= files


def test_a_config_that_names_code_is_refused(seqzoo, recall, tmp_path):
    import shutil

    copy = shutil.copytree(recall, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        text.replace("seqzoo.mixers.mamba.Mamba", "flax.nnx.filterlib.builtins.open")
    )
    for command in (["eval", copy], ["generate", copy, "--tokens", "1"]):
        code, _, err = seqzoo(*command)
        assert code == 2 and "builtins.open" in err


def test_import_makes_a_run(seqzoo, golden, tmp_path):
    """The tokens that Hugging Face wrote, through the command line."""
    source = GOLDEN / "mamba/hf_state8_bias_untied_hf"
    code, out, _ = seqzoo("import", source, "--name", "tiny", "--runs", tmp_path)
    assert code == 0 and "imported into" in out and "seqzoo generate" in out
    run = (tmp_path / "tiny/latest").resolve()
    expected = golden("mamba/hf_state8_bias_untied")
    prompt, tokens = expected["in.prompt_ids"], expected["out.generated_ids"]
    new = tokens.shape[1] - prompt.shape[1]
    words = [w for row in prompt for w in ("--tokens", ",".join(map(str, row)))]
    found = json.loads(
        seqzoo("generate", run, *words, "-n", new, "--temperature", "0", "--format", "json")[1]
    )
    np.testing.assert_array_equal(
        [row["tokens"] for row in found["rows"]], tokens[:, prompt.shape[1] :]
    )

    code, _, err = seqzoo("import", source, "--name", "tiny", "--runs", tmp_path)
    assert code == 2 and "was imported before; --force" in err
    code, _, err = seqzoo("eval", run)
    assert code == 2 and "data.path=TOKENS.npy: there is no such file" in err
    np.save(tmp_path / "tokens.npy", np.arange(4000, dtype=np.uint16) % 50)
    code, out, _ = seqzoo("eval", run, f"data.path={tmp_path / 'tokens.npy'}", "data.seq_len=16")
    assert code == 0 and "perplexity" in out


@pytest.mark.parametrize(
    "words, text",
    [
        (["/nothing", "--name", "x"], "no such folder"),
        ([GOLDEN, "--name", "x"], "no config.json"),
        ([GOLDEN / "mamba/hf_state16_hf", "--name", "../x"], "letters, digits"),
        ([GOLDEN / "mamba/hf_state16_hf", "--name", "x", "model.d_model=3"], "config.json says"),
        ([GOLDEN / "mamba/hf_state16_hf", "--name", "x", "data.pth=a"], "'data.path'"),
    ],
)
def test_import_answers_mistakes(seqzoo, tmp_path, words, text):
    code, _, err = seqzoo("import", *words, "--runs", tmp_path)
    assert code == 2 and text in err, err


def test_import_refuses_a_pickle(seqzoo, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = seqzoo("import", tmp_path, "--name", "x", "--runs", tmp_path)
    assert code == 2 and "pytorch_model.bin is a pickle" in err and "save_pretrained" in err
