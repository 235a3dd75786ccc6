"""Settings out of range, and meshes that do not fit the devices: named, before anything runs."""

import jax
import pytest

from seqzoo.errors import ConfigError
from seqzoo.nn.sharding import DEFAULT_RULES
from seqzoo.train import mesh as meshes
from seqzoo.train.settings import LoggerSettings, MeshSettings, TrainerSettings
from seqzoo.train.setup import setup


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (TrainerSettings, {"steps": 0}, "trainer.steps=0; it must be at least 1"),
        (TrainerSettings, {"save_minutes": -1.0}, "trainer.save_minutes=-1.0"),
        (TrainerSettings, {"eval_samples": 0}, "trainer.eval_samples=0"),
        (
            TrainerSettings,
            {"global_batch_size": 10, "grad_accum_steps": 4},
            "trainer.global_batch_size=10 is no multiple of trainer.grad_accum_steps=4",
        ),
        (TrainerSettings, {"ema_decay": 1.0}, "trainer.ema_decay=1.0"),
        (TrainerSettings, {"precision": "low"}, "trainer.precision=low; allowed: default"),
        (TrainerSettings, {"profile": "10"}, "trainer.profile=10; it must be FIRST:LAST"),
        (TrainerSettings, {"profile": "15:10"}, "trainer.profile=15:10"),
        (TrainerSettings, {"profile": "100:200", "steps": 10}, "trainer.profile=100:200 begins at"),
        (TrainerSettings, {"seed": -1}, "trainer.seed=-1; it must be at least 0"),
        (TrainerSettings, {"seed": 2**32}, "trainer.seed=4294967296; .* below 2"),
        (MeshSettings, {"fsdp": 0}, "mesh.fsdp=0"),
        (LoggerSettings, {"progress": "loud"}, "logger.progress=loud; allowed: auto"),
        (LoggerSettings, {"wandb_mode": "maybe"}, "logger.wandb_mode=maybe"),
    ],
)
def test_values_out_of_range(settings, values, said):
    with pytest.raises(ConfigError, match=said):
        settings(**values)


def test_a_key_by_its_other_name(tiny):
    assert tiny("eval.stream_chunk=4").trainer.eval_chunk_length == 4


def test_the_window_of_the_profiler():
    assert TrainerSettings(profile="10:15").profile_window() == (10, 15)
    assert TrainerSettings().profile_window() is None


def test_one_device_is_the_mesh_of_ones():
    mesh = meshes.make_mesh(MeshSettings(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    mesh = meshes.make_mesh(MeshSettings(tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert meshes.batch_ways(mesh, DEFAULT_RULES) == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": 16}, "needs 16 devices; there are 8"),
        ({"fsdp": 3}, r"mesh.tensor \* mesh.sequence = 3 does not divide the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit(values, said):
    with pytest.raises(ConfigError, match=said):
        meshes.make_mesh(MeshSettings(**values))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mesh.data=3"], "=8 rows cannot be shared by 3 devices; it must be a multiple of 3"),
        (["mesh.data=8", "trainer.grad_accum_steps=2"], "=4 rows cannot be shared by 8 devices"),
        (["mesh.data=1", "mesh.tensor=8", "model.d_model=12"], "no multiple of 8"),
        (["mesh.data=2", "mesh.sequence=3"], "data.seq_len=16 tokens cannot be shared by 3"),
        (["mesh.rules={batch: [data, fdsp]}"], r"mesh.rules.batch names 'fdsp'; allowed"),
        (["task.metric=accuracy/7"], "task.metric=accuracy/7"),
    ],
)
def test_what_does_not_fit_together(tiny, words, said):
    with pytest.raises(ConfigError, match=said):
        setup(tiny(*words))


def test_a_mesh_that_an_operator_cannot_use(fit):
    """Widths divide and heads do not: found while the step is traced."""
    words = ("model=based_small", "model.pattern=[based]", "model.d_model=16")
    with pytest.raises(ConfigError, match="an argument of .*'heads' of 2 is no multiple of 4"):
        fit(*words, "mesh.data=1", "mesh.tensor=4")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{0, 1}, {2, 3}], [(0, 2), (1, 2)]),
        ([{2, 3}, {0, 1}], [(1, 2), (0, 2)]),
        ([{0}, {0}, {1}, {1}], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor over two processes
        ([{0, 1}, {0, 1}], [(0, 1), (0, 1)]),  # the whole batch is everybody's
        ([{0, 2}, {1, 3}], None),
        ([{0, 1, 2}, {3}], None),
        ([{1, 2}, {0, 3}], None),
    ],
)
def test_which_rows_a_process_reads(rows, parts):
    ways = 1 + max(max(one) for one in rows)
    found = meshes.parts_of(dict(enumerate(rows)), ways)
    assert (None if found is None else [tuple(found[i]) for i in range(len(rows))]) == parts
