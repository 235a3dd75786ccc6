"""What benches claim beside times: programs flat in depth, one train step for a sweep."""

import json

import pytest

from seqzoo.cli import bench as command
from seqzoo.cli.main import main
from seqzoo.eval.bench._train_step import MAMBA
from seqzoo.eval.bench.compile import _SMALL, lines_of, lower, sweep_compilations


def test_the_train_step_is_as_long_for_32_layers_as_for_4():
    few, many = (lines_of(lower((*MAMBA, *_SMALL, f"model.n_layers={n}"))) for n in (4, 32))
    assert many == pytest.approx(few, rel=0.05)


def test_a_hybrid_is_flat_in_depth_too():
    words = (*MAMBA, *_SMALL, "model.pattern=[mamba,attention]")
    few, many = (lines_of(lower((*words, f"model.n_layers={n}"))) for n in (4, 32))
    assert many == pytest.approx(few, rel=0.05)


def test_learning_rates_and_seeds_share_one_train_step():
    """Counted by the compile events of jax.monitoring."""
    assert sweep_compilations(rates=(1e-3, 3e-3, 1e-2), seeds=(0, 1, 2)) == (1, 0)


def test_names_of_benches(capsys):
    assert {"training", "first_step", "decode", "compile", "feeding"} <= set(command.modules())
    assert not any(name.startswith("peer") for name in command.modules())
    assert main(["bench", "fedding"]) == 2
    assert "did you mean 'feeding'" in capsys.readouterr().err


def test_json_names_the_machine(capsys):
    assert main(["bench", "feeding", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"machine", "devices", "versions", "commit"} <= set(found["machine"])
    assert all(row["samples/s"] > 0 for row in found["results"]["feeding"])


def test_a_peer_that_cannot_start(capsys):
    from seqzoo.errors import ConfigError
    from seqzoo.eval.bench.training import Peer

    with pytest.raises(ConfigError, match="nowhere/python cannot be started"):
        Peer("nowhere/python")
