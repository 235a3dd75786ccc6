"""Compiled programs: shared in a process, kept on disk, and the same bits from there."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from seqzoo.train import programs


def test_the_same_shapes_share_a_program():
    said = []
    function = jax.jit(lambda x: x * 2)
    one = programs.compiled(function, jnp.ones(3), name="doubling", say=said.append)
    assert programs.compiled(function, jnp.zeros(3), name="doubling", say=said.append) is one
    assert said[0] == "compiling doubling ..." and said[1].startswith("compiled doubling in ")
    assert len(said) == 2 and float(one(jnp.ones(3))[0]) == 2.0
    assert programs.compiled(function, jnp.ones(4), name="doubling") is not one


def test_what_it_needs_is_known_before_it_runs():
    function = jax.jit(lambda x: jnp.sort(x) + x)
    program = programs.compiled(function, jnp.ones(1000), name="sorting")
    assert programs.needed_bytes(program) >= 2 * 4000


def test_more_than_there_is(monkeypatch):
    monkeypatch.setattr(programs, "device_bytes", lambda: 2**20)
    function = jax.jit(lambda x: x + 1)
    with pytest.raises(programs.OutOfMemory) as caught:
        programs.compiled(function, jnp.ones(2**22), name="adding", what="2 rows of 7 tokens")
    told = str(caught.value)
    assert "adding with 2 rows of 7 tokens does not fit" in told
    assert "0.02 GiB on each device, there are 0.00 GiB" in told
    assert "trainer.grad_accum_steps" in told and "model.remat=full" in told


def test_arguments_lie_in_the_memory_that_is_no_longer_free(monkeypatch):
    monkeypatch.setattr(programs, "device_bytes", lambda: 2**20)
    program = programs.compiled(jax.jit(lambda x: x[:9] + 1), jnp.ones(2**20), name="cutting")
    assert programs.needed_bytes(program) > 2**20


def test_the_machine_says_what_it_has():
    assert programs.device_bytes() > 2**20


CHILD = """
import hashlib, json, sys
import numpy as np
from seqzoo.config.compose import compose
from seqzoo.train import manifest, programs
from seqzoo.train import mesh as meshes
from seqzoo.train.setup import initial_state, setup
from seqzoo.train.step import train_step

programs.use_disk_cache()
run = setup(compose(sys.argv[1:]))
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **more: hits.append(event))
state = initial_state(run)
batch = run.data.source("train").batch(np.arange(8))
batch = meshes.put_batch(batch, meshes.batch_sharding(run.spec.mesh, run.spec.rules))
for step in range(3):
    state, metrics = train_step(run.spec)(state, batch, run.hyper(step), np.uint32(0))
digest = hashlib.sha256()
for name, array in manifest.flatten(state).items():
    digest.update(name.encode() + np.asarray(array).tobytes())
print(json.dumps([digest.hexdigest(), sum(event.endswith("cache_hits") for event in hits)]))
"""


@pytest.mark.slow
def test_an_executable_from_the_disk_gives_the_same_bits(tiny_words, tmp_path):
    """With XLA's usual optimisation, and dropout. The short torture shows the same."""
    words = [*tiny_words, "model=mamba_small", "model.dropout=0.1"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words],
            env=env | {"SEQZOO_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    (fresh, missed), (cached, hits) = results
    assert fresh == cached
    assert missed == 0 and hits >= 2  # the drawing of initial values and the step
