"""Run folders written by hand, to read them with commands that need no training."""

import copy
import json
import pathlib
from typing import Any

import pytest

from seqzoo.cli.main import main
from seqzoo.train.folder import RunFolder

CONFIG: dict[str, Any] = {
    "name": None,
    "init_from": None,
    "reset": [],
    "task": {"_target_": "seqzoo.tasks.masked_answers.MaskedAnswers", "metric": "accuracy"},
    "data": {
        "_target_": "seqzoo.data.mqar.MQAR",
        "vocab_size": 32,
        "seq_len": 16,
        "num_kv_pairs": 2,
        "seed": 0,
    },
    "model": {
        "_target_": "seqzoo.models.language_model.LanguageModel",
        "vocab_size": 32,
        "d_model": 16,
        "n_layers": 2,
        "pattern": ["attention"],
        "mixers": {
            "attention": {
                "_target_": "seqzoo.mixers.attention.Attention",
                "_partial_": True,
                "d_model": 16,
                "n_heads": 2,
            }
        },
        "dtype": "float32",
    },
    "optimizer": {"_target_": "seqzoo.train.optimizer.AdamW", "lr": 1e-3},
    "schedule": {"_target_": "seqzoo.train.schedule.Constant"},
    "trainer": {"steps": 100, "global_batch_size": 8, "seed": 0},
    "mesh": {},
    "logger": {},
}


def config_with(**changes: Any) -> dict[str, Any]:
    """CONFIG with other values: ``config_with(model__d_model=32)``."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[last] = value
    return config


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Commands keep compiled programs; tests must not fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def write_run():
    """Writes a run of 100 steps below a root and returns its folder; see `_write_run`."""
    return _write_run


@pytest.fixture
def seqzoo(capsys):
    """Runs a command in this process: ``code, out, err = seqzoo("runs", "--runs", folder)``."""

    def run(*words) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def _write_run(
    root: pathlib.Path,
    *,
    accuracy: float = 0.9,
    state: str = "finished",
    fingerprint: str = "mqar-v1-0123",
    metric: str = "accuracy",
    test: float | None = None,
    **changes: Any,
) -> pathlib.Path:
    """Writes a run of 100 steps and returns its folder; changes are keys, model__d_model=32."""
    config = config_with(**changes)
    words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    with RunFolder.open(config, words, root=root, data_fingerprint=fingerprint) as folder:
        with open(folder.metrics_path, "a", encoding="utf-8") as out:
            for step in range(10, 101, 10):
                train = {"step": step, "train/loss": 3 / step, "train/lr": 1e-3}
                out.write(json.dumps({**train, "train/grad_norm": 1 / step}) + "\n")
                if step % 50 == 0:
                    out.write(json.dumps({"step": step, f"valid/{metric}": accuracy * step / 100}))
                    out.write("\n")
        with open(folder.path / "timing.jsonl", "a", encoding="utf-8") as out:
            for step in range(10, 101, 10):
                out.write(json.dumps({"step": step, "tokens_per_second": 1000.0 + step}) + "\n")
        folder.write_status(
            state=state,
            step=100,
            metric={"name": metric, "value": accuracy, "target": 0.95},
            test=None if test is None else {metric: test},
        )
        return folder.path
