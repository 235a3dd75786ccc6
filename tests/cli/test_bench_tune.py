"""`seqzoo bench --tune` measures on a device that has kernels, and refuses elsewhere."""


def test_a_cpu_has_nothing_to_tune(seqzoo):
    code, out, err = seqzoo("bench", "--tune")
    assert code == 2
    assert "this is a cpu; run it on a machine with a TPU or an NVIDIA GPU" in out + err


def test_an_unknown_operator_is_answered_with_the_nearest(seqzoo, monkeypatch):
    from pallas_kernels.core import tune

    monkeypatch.setattr(tune, "platform_kernel", lambda: "pallas_tpu")
    code, out, err = seqzoo("bench", "--tune", "selectiv_scan")
    assert code == 2
    assert "there is no operator 'selectiv_scan'" in out + err and "selective_scan" in out + err


def test_operators_that_do_not_run_here_are_told(seqzoo, monkeypatch, tmp_path):
    from pallas_kernels.core import tune

    monkeypatch.setattr(tune, "platform_kernel", lambda: "pallas_tpu")
    monkeypatch.setattr(tune, "specs_for", lambda op, form: tune_specs(op))
    code, out, err = seqzoo("bench", "--tune", "short_conv", "--to", str(tmp_path / "t.json"))
    assert code == 2 and "not tuned:" in out
    assert "no operator that was asked for has a kernel that runs on a cpu" in out + err
    assert not (tmp_path / "t.json").exists()


def tune_specs(op):
    from pallas_kernels.core.testing import ArgSpec
    from pallas_kernels.short_conv.arg_specs import SPECS

    (first, *_) = SPECS
    return [ArgSpec(name="small", sizes={**first.sizes, "t": 8}, draw=first.draw)]
