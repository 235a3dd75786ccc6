"""Fifty updates on a mesh give the losses of one device, with microbatches and remat beside it."""

import pytest

from seqzoo.train.run_files import read_metrics

WORDS = (
    "trainer.steps=50",
    "trainer.log_every=1",
    "trainer.eval_every=0",
    "trainer.test_samples=0",
    "optimizer.lr=0.003",
)
SMALL = ("model.d_model=16", "data.seq_len=32")
HYBRID = ("model=mamba_attention", *SMALL)
BASED = ("model=based_small", *SMALL)
MEMORY = (
    "model=titans_mag_small",
    "model.mixers.titans_mag.n_heads=2",
    "model.mixers.titans_mag.head_dim=8",
    "model.mixers.titans_mag.window=8",
    "model.mixers.titans_mag.chunk=8",
    *SMALL,
)
ALL = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.sequence=2")


def losses(run):
    return [line["train/loss"] for line in read_metrics(run.path) if "train/loss" in line]


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ((), (*ALL, "trainer.grad_accum_steps=2", "model.remat=full")),
        *(
            pytest.param(model, mesh, marks=pytest.mark.slow)
            for model in (HYBRID, BASED, MEMORY)
            for mesh in (
                ("mesh.data=8",),
                ("mesh.data=1", "mesh.fsdp=8"),
                ("mesh.data=4", "mesh.tensor=2", "trainer.grad_accum_steps=2"),
                ("mesh.data=2", "mesh.sequence=4", "trainer.grad_accum_steps=4"),
                (*ALL, "model.remat=dots"),
            )
        ),
    ],
)
def test_losses_on_a_mesh_are_those_of_one_device(fit, tmp_path, model, mesh):
    one = losses(fit(*model, *WORDS, root=tmp_path / "one"))
    many = losses(fit(*model, *WORDS, *mesh, root=tmp_path / "many"))
    assert len(one) == 50 and one[-1] < one[0]
    assert many == pytest.approx(one, rel=1e-4)
