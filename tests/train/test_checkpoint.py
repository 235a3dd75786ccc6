"""Checkpoints that are damaged, cut off, too large for the disk; and which ones are kept."""

import errno
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqzoo.errors import CheckpointError
from seqzoo.train import checkpoint
from seqzoo.train.checkpoint import Checkpointer
from seqzoo.train.run_files import read_metrics

META = {"metric": {"name": "accuracy", "mode": "max"}, "position": 40}


def state(number: float):
    return {"params": {"w": jnp.full((64, 64), float(number)), "empty": jnp.zeros((0, 3))}}


def saved(folder, metrics, **options) -> Checkpointer:
    """Steps 1, 2, ... with these metrics."""
    checkpoints = Checkpointer(folder, **options)
    for step, metric in enumerate(metrics, 1):
        checkpoints.save(step, state(step), META, metric)
    checkpoints.wait()
    return checkpoints


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_bit(folder: pathlib.Path) -> None:
    """Of the largest array, wherever its bytes lie (small ones are in Orbax's own tables)."""
    stored = checkpoint.read_meta(folder)["arrays"]
    wanted = {k: jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"]) for k, a in stored.items()}
    arrays = checkpoint.read_step(folder, wanted).state.values()
    needle = np.asarray(max(arrays, key=lambda a: a.size)).tobytes()[:16]
    for file in (folder / "state").rglob("*"):
        data = bytearray(file.read_bytes()) if file.is_file() else b""
        if needle in data:
            data[data.index(needle) + 5] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("the array's bytes are nowhere")


def cut_off(folder: pathlib.Path) -> None:
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_the_document(folder: pathlib.Path) -> None:
    (folder / "meta" / "metadata").unlink()


def test_what_was_saved_comes_back(tmp_path):
    checkpoints = saved(tmp_path, [0.1])
    step, found, meta = checkpoints.restore(state(0))
    assert (step, meta) == (1, META)
    np.testing.assert_array_equal(found["params"]["w"], np.full((64, 64), 1.0))
    assert found["params"]["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
    ],
)
def test_what_cannot_be_read_for_now_is_not_damaged(tmp_path, monkeypatch, error):
    """Or a run whose memory ends while it goes on would lose its checkpoints, one by one."""
    checkpoints = saved(tmp_path, [0.1, 0.2])

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read_arrays", fail)
        with pytest.raises(CheckpointError, match="cannot be read for now: .*stays as it is"):
            checkpoints.restore(state(0))
    assert checkpoints.steps() == [1, 2] and not checkpoints.damaged
    assert checkpoints.restore(state(0)).step == 2
    checkpoints.close()


@pytest.mark.parametrize(
    ("mode", "metrics", "kept"),
    [
        ("max", [0.5, 0.9, 0.2, 0.3, 0.4], [2, 4, 5]),
        ("min", [0.5, 0.9, 0.2, 0.3, 0.4], [3, 4, 5]),
        ("max", [0.9, 0.9, 0.1, 0.1, 0.1], [2, 4, 5]),  # of equals the newest
        ("max", [None, float("nan"), None, None], [3, 4]),
        ("min", [1.0, 2.0, 3.0], [1, 2, 3]),
    ],
)
def test_kept_are_the_last_two_and_the_best(tmp_path, mode, metrics, kept):
    saved(tmp_path, metrics, metric_mode=mode)
    assert checkpoint.list_steps(tmp_path) == kept
    assert Checkpointer(tmp_path, metric_mode=mode).steps() == kept


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, lose_the_document])
def test_a_damaged_step_is_set_aside_and_saving_goes_on(tmp_path, damage):
    saved(tmp_path, [0.1, 0.2, 0.3]).close()
    damage(tmp_path / "3")
    checkpoints = Checkpointer(tmp_path)
    step, found, _ = checkpoints.restore(state(0))
    assert step == 2 and float(found["params"]["w"][0, 0]) == 2.0
    (told,) = checkpoints.damaged
    assert "checkpoint 3" in told and "damaged-3" in told
    assert (tmp_path / "damaged-3").is_dir()
    checkpoints.save(3, state(30), META, 0.3)
    checkpoints.close()
    assert float(Checkpointer(tmp_path).restore(state(0)).state["params"]["w"][0, 0]) == 30.0


def test_nothing_whole_is_nothing(tmp_path):
    saved(tmp_path, [0.1]).close()
    cut_off(tmp_path / "1")
    assert Checkpointer(tmp_path).restore(state(0)) is None


def test_best_last_and_numbers(tmp_path):
    checkpoints = saved(tmp_path, [0.1, 0.9, 0.2, 0.3])
    assert [checkpoints.restore(state(0), s).step for s in ("best", "last", None, 3)] == [
        2, 4, 4, 3,
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"allowed are 'last', 'best' and the steps"):
        checkpoints.restore(state(0), 17)
    assert checkpoint.find_step(tmp_path, "best").name == "2"


def test_part_of_a_step(tmp_path):
    checkpoints = saved(tmp_path, [0.1])
    wanted = {"params": {"w": jnp.zeros((64, 64))}}
    assert set(checkpoints.restore(wanted, partial=True).state["params"]) == {"w"}
    with pytest.raises(CheckpointError, match="'params/empty' is in the checkpoint and not here"):
        checkpoints.restore(wanted)


def test_another_model_is_named(tmp_path):
    checkpoints = saved(tmp_path, [0.1])
    wanted = {"params": {"w": jnp.zeros((64, 65)), "empty": jnp.zeros((0, 3))}}
    with pytest.raises(CheckpointError, match=r"float32\[64,64\] in the .* float32\[64,65\] here"):
        checkpoints.restore(wanted)


def test_saving_backwards_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="step 2 is there already"):
        saved(tmp_path, [0.1, 0.2]).save(1, state(1), META)


def test_a_metric_may_come_later(tmp_path):
    checkpoints = saved(tmp_path, [0.5, 0.1, None])
    checkpoints.save(3, state(99), META | {"position": 41}, 0.9)
    assert checkpoint.list_steps(tmp_path) == [2, 3] and checkpoints.best_step() == 3
    checkpoints.close()
    step, found, meta = Checkpointer(tmp_path).restore(state(0), "best")
    assert (step, meta["position"]) == (3, 41)
    assert float(found["params"]["w"][0, 0]) == 3.0  # the arrays are those of the first time


def test_another_mesh_reads_it(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"w": jax.device_put(jnp.arange(4096.0), spread)}, META)
    checkpoints.close()
    other = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[2:4])
    wanted = jax.ShapeDtypeStruct(
        (4096,), np.float32, sharding=NamedSharding(other, PartitionSpec("data"))
    )
    found = Checkpointer(tmp_path).restore({"w": wanted}).state["w"]
    np.testing.assert_array_equal(found, np.arange(4096.0))
    assert found.sharding == wanted.sharding
    flip_a_bit(tmp_path / "1")
    assert Checkpointer(tmp_path).restore({"w": wanted}) is None


def test_a_run_falls_back_from_a_flipped_bit_and_ends_the_same(fit, stop_at, run_folder, tmp_path):
    large = "model.d_model=16"  # arrays below 1 KiB lie in Orbax's own tables
    whole = fit(large, root=tmp_path / "whole").path
    stop_at(9, large)
    path = run_folder()
    flip_a_bit(path / "checkpoints" / "10")
    fit(large)
    log = (path / "train.log").read_text()
    assert "warning: checkpoint 10" in log and "going on from step 8" in log
    assert (path / "checkpoints" / "damaged-10").is_dir()
    assert read_metrics(path) == read_metrics(whole)


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from seqzoo.errors import CheckpointError
from seqzoo.train.checkpoint import Checkpointer

checkpoints = Checkpointer(sys.argv[1])
for step in (1, 2):
    checkpoints.save(step, {"w": jnp.full((256, 256), float(step))}, {"metric": {"mode": "max"}})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no large file now
try:
    checkpoints.save(3, {"w": jnp.full((256, 256), 3.0)}, {"metric": {"mode": "max"}})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
    print(checkpoints.steps())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(3, {"w": jnp.full((256, 256), 3.5)}, {"metric": {"mode": "max"}})
checkpoints.close()
print(Checkpointer(sys.argv[1]).restore({"w": jnp.zeros((256, 256))}).state["w"][0, 0])
"""


def test_a_full_disk_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told, steps, value = done.stdout.splitlines()[-3:]
    assert "step 3 could not be saved" in told and "make room" in told
    assert (json.loads(steps), float(value)) == ([1, 2], 3.5)
