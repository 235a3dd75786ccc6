"""Train steps for a TPU mesh: what breaks their table. Compiling them is check-tpu-full's."""

import pytest

from seqzoo.config import paths
from seqzoo.config.compose import compose
from seqzoo.eval import mesh_check
from seqzoo.eval.mesh_check import Step, changes

STEP = Step(
    "jax 1, libtpu 2",
    "mamba_small",
    "2 x 2 x 2",
    "compiled",
    "selective_scan_backward:1 selective_scan_forward:1",
    "all-gather:20 all-reduce:27",
    temp=5 * 2**20,
    peak=9 * 2**20,
)


@pytest.mark.parametrize(
    "worse, told",
    [
        (dict(kernels="selective_scan_forward:1"), "kernels were"),
        (dict(collectives="all-gather:20 all-reduce:28"), "collectives all-gather:20"),
        (dict(temp=7 * 2**20), "temporaries 5,242,880 -> 7,340,032"),
        (dict(status="ValueError: heads"), "ValueError: heads"),
        (dict(model="new"), "the table has no row of it"),
    ],
)
def test_what_got_worse_is_told(worse, told):
    assert changes([STEP], [STEP]) == []
    (text,) = changes([STEP], [STEP._replace(**worse)])
    assert told in text


def test_another_stack_is_not_compared():
    assert changes([STEP], [STEP._replace(stack="other", temp=2**40)]) == []


def test_the_table_and_the_page(tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text(f"prose\n{mesh_check.BEGIN}\n{mesh_check.END}\nmore\n")
    path = tmp_path / "train_steps.csv"
    broken = Step(STEP.stack, "m2_small", "2 x 2 x 2", "ValueError: a|b")
    mesh_check.write(path, [STEP, broken])
    assert mesh_check.read(path) == sorted([STEP, broken])
    text = page.read_text()
    assert (
        "| mamba_small | 2 x 2 x 2 | selective_scan_backward x 1, selective_scan_forward x 1 |"
        in text
    )
    assert "all-gather x 20, all-reduce x 27 | 5.0 MiB | 9.0 MiB |" in text
    assert "ValueError: a/b" in text and text.startswith("prose") and text.endswith("more\n")


def test_the_models_are_there_and_compose():
    for model in mesh_check.MODELS:
        assert (paths.shipped() / "model" / f"{model}.yaml").exists()
        config = compose(mesh_check.overrides(model))
        assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == 8


def test_an_unknown_model(capsys):
    assert mesh_check.main(["mamba"]) == 2
    assert "there is no mamba here; there are mamba_small" in capsys.readouterr().out
