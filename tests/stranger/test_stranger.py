"""A stranger's mixer: only the wheel and docs/add_a_mixer.md, no file of seqzoo touched.

The wheel is built from this checkout and unpacked into a folder of its own; the stranger's package
(tests/stranger/mylab) is copied outside the repository. Commands run there, as processes.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
TRAIN = [
    "--config-dir", "mylab/configs",
    "model=mamba_small", "model.pattern=[diagonal]", "model.d_model=16", "model.n_layers=2",
    "model.mixers.diagonal.d_state=4",
    "data.vocab_size=32", "data.seq_len=16", "data.num_kv_pairs=2",
    "trainer.steps=400", "trainer.save_every=20", "trainer.eval_every=200",
    "trainer.global_batch_size=8", "trainer.stop_at_target=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the stranger's package, and the environment that finds it and the wheel."""
    lab = tmp_path_factory.mktemp("lab")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(lab / "dist")]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = (lab / "dist").glob("seqzoo-*.whl")
    unpack = ["install", "--no-deps", "--no-compile", "--target", str(lab / "site"), str(wheel)]
    subprocess.run([*pip, *unpack], check=True, timeout=300)
    shutil.copytree(HERE / "mylab", lab / "work" / "mylab")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "SEQZOO_TRUST")}
    env |= {
        "PYTHONPATH": f"{lab / 'site'}{os.pathsep}{lab / 'work'}",
        "JAX_PLATFORMS": "cpu",
        "SEQZOO_CACHE": str(lab / "cache"),
    }
    return lab / "work", env


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "seqzoo.cli.main", *args]


def run(lab, *args: str, code: int = 0) -> str:
    folder, env = lab
    done = subprocess.run(
        command(*args), cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_wheel_is_what_runs(lab):
    folder, env = lab
    where = subprocess.run(
        [sys.executable, "-c", "import seqzoo, pallas_kernels; print(seqzoo.__file__)"],
        cwd=folder, env=env, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(folder.parent / "site"))


def test_the_mixer_passes_the_suite(lab):
    printed = run(lab, "check", "mylab.mixers.diagonal.Diagonal", "d_state=4")
    assert "broken" not in printed.lower()


def test_it_trains_is_killed_resumes_and_evaluates(lab):
    folder, env = lab
    child = subprocess.Popen(
        command("train", *TRAIN), cwd=folder, env=env, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not [p for p in folder.glob("runs/*/*/checkpoints/*") if p.name.isdigit()]:
        assert child.poll() is None, "the run ended before it saved anything"
        assert time.monotonic() < deadline, "no checkpoint after four minutes"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (run_folder,) = [
        p.parent for p in folder.glob("runs/*/*/config.yaml") if not p.parent.is_symlink()
    ]
    assert json.loads((run_folder / "status.json").read_text())["state"] != "finished"

    run(lab, "train", *TRAIN, "--trust", "mylab")
    status = json.loads((run_folder / "status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == ("finished", 400, 2)

    refused = run(lab, "eval", str(run_folder), code=2)
    assert "mylab.mixers.diagonal.Diagonal" in refused and "--trust mylab" in refused
    assert "accuracy" in run(lab, "eval", str(run_folder), "--trust", "mylab")
