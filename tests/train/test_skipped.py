"""Updates that a mixer refuses: nothing moves, the log counts, a run of them ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.errors import NotFiniteError
from seqzoo.train import mesh as meshes
from seqzoo.train import session
from seqzoo.train.run_files import read_metrics
from seqzoo.train.setup import initial_state, setup
from seqzoo.train.step import train_step

WORDS = ("model.pattern=[lssl]", "model.mixers.lssl.d_state=4")
NAME = "skipped/kernel_not_finite"


def break_(state):
    """A trained matrix that went out of bounds."""
    mixer = state.params["stack"]["runs"][0][0]["mixer"]
    mixer["transition"]["pl"] = mixer["transition"]["pl"].at[:].set(jnp.inf)
    return state


def updated(config, state):
    run = setup(config)
    random = np.random.default_rng(0)
    batch = {k: random.integers(0, 32, (8, 16)).astype(np.int32) for k in ("tokens", "targets")}
    batch = meshes.put_batch(batch, meshes.batch_sharding(run.spec.mesh, run.spec.rules))
    state, metrics = train_step(run.spec)(state, batch, run.hyper(0), np.uint32(0))
    return state, dict(zip(metrics.names, np.asarray(metrics.pairs), strict=True)), metrics.finite


def test_a_refused_update_changes_nothing(tiny):
    config = tiny(*WORDS, "trainer.grad_accum_steps=2", "trainer.ema_decay=0.5")
    copies = lambda: break_(initial_state(setup(config)))
    before = copies()
    after, pairs, finite = updated(config, copies())
    assert bool(finite) and int(after.step) == 1
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert tuple(pairs.pop(NAME)) == (1, 1)
    assert not any(np.any(pair) for pair in pairs.values())

    after, pairs, finite = updated(config, initial_state(setup(config)))
    assert bool(finite) and tuple(pairs[NAME]) == (0, 1) and pairs["loss"][1] > 0
    assert 0 < pairs["report/rho"][0] / pairs["report/rho"][1] < 1.1


def test_a_run_that_does_nothing_else_ends(fit, run_folder, monkeypatch):
    start = session.initial_state
    monkeypatch.setattr(session, "initial_state", lambda run: break_(start(run)))
    with pytest.raises(NotFiniteError, match="20 steps up to step 20 were skipped: kernel_not"):
        fit(*WORDS, "trainer.steps=40", "trainer.eval_every=0", "trainer.save_every=0")
    lines = read_metrics(run_folder())
    assert [line[f"train/{NAME}"] for line in lines] == [1.0] * len(lines) and len(lines) == 6
    log = (run_folder() / "train.log").read_text()
    assert log.count("the update of step 1 is skipped: kernel_not_finite") == 1
