"""What makes a run that run, and the name of its folder."""

import copy
import re

import pytest

from seqzoo.train import identity

OURS = {
    "task": {"_target_": "seqzoo.tasks.next_token.NextToken", "metric": "loss"},
    "model": {"d_model": 64, "remat": "none", "mixers": {"mamba": {"implementation": None}}},
    "data": {"_target_": "seqzoo.data.text.Text", "path": "/here", "seq_len": 64, "seed": 0},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 10},
    "trainer": {
        "steps": 100,
        "global_batch_size": 8,
        "grad_accum_steps": 1,
        "seed": 0,
        "ema_decay": None,
        "precision": "default",
        "deterministic": False,
        "log_every": 10,
        "save_every": 10,
        "eval_every": 10,
        "stop_at_target": False,
        "workers": 1,
    },
    "mesh": {"data": 1},
    "logger": {"wandb": False},
    "init_from": None,
    "reset": [],
}


def changed(key: str, value) -> dict:
    config = copy.deepcopy(OURS)
    *sections, last = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.d_model", 65),
        ("task.metric", "accuracy"),
        ("data.seed", 1),
        ("data.seq_len", 65),
        ("optimizer.lr", 2e-3),
        ("schedule.warmup_steps", 11),
        ("trainer.seed", 1),
        ("trainer.steps", 101),
        ("trainer.global_batch_size", 16),
        ("trainer.ema_decay", 0.9),
        ("trainer.precision", "highest"),
        ("trainer.deterministic", True),
        ("init_from", "runs/a/trunk-01@5"),
    ],
)
def test_in(key, value):
    assert identity.run_hash(OURS, "f") != identity.run_hash(changed(key, value), "f")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", "/there"),
        ("model.remat", "full"),
        ("model.mixers.mamba.implementation", "xla"),
        ("trainer.grad_accum_steps", 4),
        ("trainer.log_every", 1),
        ("trainer.save_every", 1),
        ("trainer.eval_every", 1),
        ("trainer.workers", 8),
        ("mesh.data", 8),
        ("logger.wandb", True),
        ("reset", ["data"]),  # without init_from it says nothing
        ("optimizer.lr", 0.001),
        ("trainer.steps", 100.0),
    ],
)
def test_out(key, value):
    assert identity.run_hash(OURS, "f") == identity.run_hash(changed(key, value), "f")


def test_the_data_counts_by_what_it_says_of_itself():
    assert identity.run_hash(OURS, "f") != identity.run_hash(OURS, "g")
    there = changed("data.path", "/there")
    assert identity.run_hash(OURS) != identity.run_hash(there)  # all that is known of it


def test_evaluations_count_where_they_may_end_the_run():
    stopping = changed("trainer.stop_at_target", True)
    rarer = copy.deepcopy(stopping)
    rarer["trainer"]["eval_every"] = 20
    assert identity.run_hash(stopping) != identity.run_hash(rarer)


def test_a_trunk_counts_by_name_wherever_it_lies():
    one, other = (changed("init_from", f"{at}/trunk-01@5") for at in ("runs/a", "/far/away"))
    assert identity.run_hash(one) == identity.run_hash(other)


def test_names_are_short_and_harmless():
    words = [
        "experiment=mqar",
        "optimizer.lr=3e-4",
        "model.pattern=[mamba,attention]",
        "mesh.data=8",
    ]
    name = identity.run_name(OURS, words)
    assert name == f"lr_3e-4-pattern_mamba_attention-{identity.run_hash(OURS)}"
    assert identity.run_name(OURS, []) == f"default-{identity.run_hash(OURS)}"
    long = identity.run_name(OURS, [f"model.key{i}=/../é{i}" for i in range(50)])
    assert len(long.encode()) <= 100 and re.fullmatch(r"[A-Za-z0-9._-]+", long)
    assert long.endswith(identity.run_hash(OURS))
    assert identity.experiment_name(OURS, words) == "mqar"
    assert identity.experiment_name(OURS) == "text"
    assert identity.experiment_name(OURS | {"name": "my study"}) == "my_study"
    assert identity.experiment_name(OURS | {"name": "my study"}, words) == "my_study"
