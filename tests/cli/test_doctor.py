"""The doctor names what is here, what is used, and what to install for what is not."""

import json
import stat

import pytest

from pallas_kernels import OPERATORS
from pallas_kernels.core import kernel_check
from seqzoo.cli import doctor


def test_every_operator_takes_something_and_says_why_not_a_faster_one(seqzoo):
    code, out, _ = seqzoo("doctor", "--format", "json")
    found = json.loads(out)
    assert code == 0 and set(found["operators"]) == set(OPERATORS)
    for reasons in found["operators"].values():
        assert doctor.taken(reasons) == "xla"
        assert all(reasons[name] for name in ("pallas_tpu", "pallas_gpu"))
    assert "8 x cpu" in found["machine"]["devices"]
    assert "jax " in found["machine"]["versions"]


def test_the_text_shows_the_same(seqzoo):
    out = seqzoo("doctor")[1]
    for word in ("devices", "CPU threads", "compile cache", "configs", "selective_scan", "not: "):
        assert word in out


def test_what_operators_would_take_on_a_tpu(seqzoo):
    """A kernel that is written serves its typical call there; the machine stays this one."""
    found = json.loads(seqzoo("doctor", "--format", "json", "--device", "v5e")[1])
    assert "8 x cpu" in found["machine"]["devices"]
    taken = {name: doctor.taken(reasons) for name, reasons in found["operators"].items()}
    written = {name for name, op in OPERATORS.items() if kernel_check.has_kernel(op)}
    assert {name for name, form in taken.items() if form == "pallas_tpu"} == written
    assert "selective_scan" in written
    same = json.loads(seqzoo("doctor", "--format", "json", "--device", "TPU v5 lite")[1])
    assert same["operators"] == found["operators"]


def test_a_device_that_nobody_knows(seqzoo):
    code, out, err = seqzoo("doctor", "--device", "v9z")
    assert code == 2 and "it must be one of v4, v5e, v5p, v6e, tpu7x" in out + err


@pytest.mark.parametrize("cuda, extra", [("12.4", "cuda12"), ("13.0", "cuda13")])
def test_a_gpu_with_a_jax_for_cpus_is_announced(seqzoo, tmp_path, monkeypatch, cuda, extra):
    """A stand-in for nvidia-smi on the path is all that the machine shows of its GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nif [ -n "$1" ]; then echo "NVIDIA H100"; '
        f'else echo "| CUDA Version: {cuda} |"; fi\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    out = seqzoo("doctor")[1]
    assert "there is a GPU (NVIDIA H100), but this jax is for CPUs" in out
    assert f"make install EXTRA={extra}" in out


def test_a_gpu_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (text,) = doctor.advice("cpu", gpu="NVIDIA H100", tpu=None)
    assert "JAX_PLATFORMS=cpu keeps jax off it" in text
    assert doctor.advice("gpu", gpu="NVIDIA H100", tpu=None) == []


def test_a_tpu_without_libtpu(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (text,) = doctor.advice("cpu", gpu=None, tpu="a TPU (/dev/accel0)")
    assert "EXTRA=tpu" in text
