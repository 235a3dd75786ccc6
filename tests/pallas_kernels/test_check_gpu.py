"""check_gpu and gpu_report without a GPU: texts of ptxas, bytes of a body, tables, processes."""

import dataclasses
import functools
import pathlib
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import OPERATORS, check_gpu, gpu_report
from pallas_kernels.core import (
    aot_gpu,
    bench,
    copies,
    cubin,
    gpu,
    gpu_table,
    kernel_report,
    kernel_table,
)
from pallas_kernels.core.axes import axes
from pallas_kernels.core.costs import Cost
from pallas_kernels.core.gpu_table import GpuRow
from pallas_kernels.core.on_gpu import bars, numerics, page, peers, result, shapes, times, work
from pallas_kernels.core.on_gpu.result import Result
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.core.traffic import traffic
from seqzoo.eval import gpu_models

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'toy_backward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for toy_backward_mosaic_gpu_kernel
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
"""
LOG = """\
// -----// IR Dump Before ... //----- //
    %36 = gpu.launch async [%5] blocks(%arg2, %arg3, %arg4) in (%arg8 = %c8, %arg9 = %c1) \
dynamic_shared_memory_size %c65544_i32 {
    %36 = gpu.launch async [%5] dynamic_shared_memory_size %c7_i32 {
"""
PROGRAM = r"""
ENTRY %main.1 (x.1: f32[1024]) -> f32[1024] {
  %m.2 = f32[8]{0} custom-call(%x.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/jvp/toy_backward/mpmd_map" x=1}, backend_config={kernel_hash = "8\C2\"H", module = "ML\EF\"R\00"}
  %m.3 = f32[8]{0} custom-call(%m.2), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/toy_forward/mpmd_map"}, backend_config={kernel_hash = "\06a", module = "MLx"}
  %s.1 = f32[8]{0} custom-call(%m.3), custom_call_target="sort"
}
"""  # noqa: E501


def test_registers_spills_and_shared_memory_by_ptxas_and_mosaic(tmp_path):
    assert cubin.parse(PTXAS) == (168, 20, 1, 1)
    with pytest.raises(ValueError, match="says nothing of registers: ptxas fatal"):
        cubin.parse("ptxas fatal : no such file")
    (tmp_path / "toy_backward_3.ptxas").write_text(PTXAS)
    (tmp_path / "toy_backward_3.mlir-passes.log").write_text(LOG)
    calls = cubin.calls(PROGRAM)
    assert [name for name, _ in calls] == ["toy_backward", "toy_forward"]
    back, ahead = cubin.read(tmp_path, calls)
    assert back == cubin.Code("toy_backward", 168, 20, 65_544, 1)
    assert ahead == cubin.Code("toy_forward")  # nothing was said of it
    cubin.clear(tmp_path)
    # Mosaic does not compile it again, and it is known nonetheless.
    assert not list(tmp_path.iterdir()) and cubin.read(tmp_path, calls)[0] == back
    assert cubin.without_bodies(PROGRAM).count('module = ""') == 2


def copying(x, *, name, config=None):
    """Twice x `[b t e]`, a block of 8 tokens at a time; the second warpgroup only looks on."""
    b, t, e = x.shape

    def body(x_ref, y_ref, x_s, barrier):
        row, thread = jax.lax.axis_index("row"), jax.lax.axis_index("wg")

        def step(i, carry):
            @pl.when(thread == 0)
            def _():
                here = (row, pl.ds(i * 8, 8))
                plgpu.copy_gmem_to_smem(x_ref.at[here], x_s, barrier)
                plgpu.barrier_wait(barrier)
                x_s[...] = x_s[...] * 2
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(x_s, y_ref.at[here])
                plgpu.wait_smem_to_gmem(0)

                @pl.when(i == row)
                def _():
                    plgpu.copy_smem_to_gmem(x_s, y_ref.at[here])

            return carry

        jax.lax.fori_loop(0, t // 8, step, None)

    return gpu.kernel_call(
        body,
        name=name,
        config=config or gpu.GpuConfig(),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((8, e), x.dtype), plgpu.Barrier()],
        grid=(b,),
        grid_names=("row",),
        num_threads=2,
        thread_name="wg",
    )(x)


def test_bytes_of_a_body_follow_loops_branches_warpgroups_and_the_grid():
    x = jax.ShapeDtypeStruct((3, 32, 128), jnp.bfloat16)
    found = traffic(functools.partial(copying, name="toy_forward"), x, platform="cuda")
    (kernel,) = found.kernels
    size, block = 3 * 32 * 128 * 2, 8 * 128 * 2
    assert (kernel.name, kernel.grid) == ("toy_forward", (3,))
    assert kernel.read == size
    assert kernel.written == size + 3 * block  # the block that a row writes twice
    twice = traffic(
        lambda x: jax.lax.scan(lambda c, _: (copying(c, name="toy"), None), x, length=5)[0],
        x,
        platform="cuda",
    )
    assert twice.by_kernels == 5 * found.by_kernels


def test_loops_too_long_to_follow_are_sampled(monkeypatch):
    x = jax.ShapeDtypeStruct((3, 8 * 500, 128), jnp.bfloat16)
    program = functools.partial(copying, name="toy_forward")
    exact = traffic(program, x, platform="cuda")
    monkeypatch.setattr(copies, "_MOST_STEPS", 1500)
    sampled = traffic(program, x, platform="cuda")
    assert sampled.kernels[0].read == exact.kernels[0].read
    # The third row's second write of its third tile stands between what is followed.
    assert sampled.kernels[0].written == exact.kernels[0].written - 8 * 128 * 2
    monkeypatch.setattr(copies, "_MOST_STEPS", 10)
    with pytest.raises(copies.UnknownBody, match="too long to follow"):
        traffic(program, x, platform="cuda")


ROW = GpuRow(
    *("jax 1, nvcc 13", "toy", "real", "bfloat16", "h200", "forward"),
    status="compiled",
    calls=1,
    registers=90,
    spilled=0,
    shared=65_536,
    serial=0,
    bytes=120 * 2**20,
    around=20 * 2**20,
    minimum=100 * 2**20,
    saved=0,
    temp=8 * 2**20,
    peak=30 * 2**20,
    hbm=90 * 2**20,
    seconds=1.5,
)
CODE = ROW._replace(
    kernel="toy_forward", blocks=12, minimum=None, bytes=100 * 2**20, hbm=70 * 2**20
)


def test_what_may_not_be_and_what_got_worse():
    assert gpu_table.wrong([ROW, CODE]) == [] == kernel_table.regressions([CODE], [CODE])
    spills = CODE._replace(spilled=72, shared=232_449)
    assert [text.split(": ")[1] for text in gpu_table.wrong([spills])] == [
        "72 bytes of registers are spilled",
        "232,449 bytes of shared memory",
    ]
    silent = CODE._replace(registers=None, spilled=None, shared=None)
    (text,) = gpu_table.wrong([silent])
    assert text.endswith("ptxas told nothing of registers, spills and shared memory")
    assert "registers 90 -> not told" in kernel_table.regressions([CODE], [silent])[0]
    assert gpu_table.wrong([silent._replace(status="refused: no")]) == []
    ahead = ROW._replace(part="documents, state", status=kernel_table.FORWARD_ONLY)
    assert gpu_table.beside_the_goals([ahead])[0].endswith("compiled; backward is xla's")
    assert "| documents, state; backward is xla's |  | 90 |" in gpu_table.markdown([ahead])
    through = ROW._replace(
        part="forward", minimum=100, bytes=450, hbm=120, spilled=0, shared=116_224
    )
    spilt = through._replace(part="documents, state", spilled=8)
    none = through._replace(call="other", part="backward", status="refused: no")
    (*_, told) = gpu_table.summary([through, spilt, none]).splitlines()
    assert told == f"| {ROW.operator} | 1.20,  | 4.50,  | 0, 8 | 50% | other |"
    assert gpu_table.line(ahead).endswith("compiled; backward is xla's  1.5 s")
    documents = CODE._replace(part="documents, state", spilled=16)
    assert gpu_table.wrong([documents]) == []
    assert "16 bytes of registers" in gpu_table.beside_the_goals([documents])[0]
    less = documents._replace(spilled=0)
    assert "spilled 0 -> 16" in kernel_table.regressions([less], [documents])[0]
    (text,) = kernel_table.regressions([CODE], [CODE._replace(registers=130)])
    assert text == "toy real forward, toy_forward on h200: registers 90 -> 130"
    (text,) = kernel_table.regressions([ROW], [ROW._replace(hbm=95 * 2**20)])
    assert text == "toy real forward on h200: hbm 94,371,840 -> 99,614,720"
    assert kernel_table.regressions([ROW._replace(hbm=None)], [ROW]) == []
    (text,) = kernel_table.regressions([], [ROW._replace(call="-", status="NOT WRITTEN: no")])
    assert text == "toy: NOT WRITTEN: no"


def test_goals_that_are_missed_are_told():
    assert gpu_table.beside_the_goals([ROW, CODE]) == []
    asked = ROW._replace(bytes=140 * 2**20)  # more than goes through device memory
    assert gpu_table.beside_the_goals([asked]) == []
    old = asked._replace(hbm=None)  # of a table without that column
    far = [ROW._replace(hbm=150 * 2**20), old, CODE._replace(serial=1)]
    assert [text.split(": ")[1] for text in gpu_table.beside_the_goals(far)] == [
        "1.50x the least bytes (at most 1.3)",
        "1.40x the least bytes (at most 1.3)",
        "ptxas makes its wgmma wait for one another (C7510)",
    ]


def test_the_table_and_the_page(tmp_path):
    path, md = tmp_path / "kernels_gpu.csv", tmp_path / "kernels.md"
    kernel_table.write(path, [CODE, ROW], GpuRow)
    assert kernel_table.read(path, GpuRow) == [
        ROW._replace(seconds=None),
        CODE._replace(seconds=None),
    ]
    older = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(older))
    assert kernel_table.read(path, GpuRow)[0] == ROW._replace(seconds=None, hbm=None)
    other = f"{kernel_report.BEGIN}\nTPU\n{kernel_report.END}\n"
    md.write_text(f"{other}{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    gpu_table.write(md, [ROW, CODE, ROW._replace(part="backward", status="refused: a|b")])
    text = md.read_text()
    assert text.startswith(other) and text.endswith("after\n") and "old" not in text
    assert "|  |  | toy_forward | 90 | 0 | 65,536 | 12 |  | 70 MiB |  | 100 MiB |" in text
    assert "| forward |  | 90 | 0 | 65,536 |  | 0.90 | 90 MiB | 1.20 | 120 MiB |" in text
    assert "refused: a/b" in text
    _, rows = text.split("### h200")
    lengths = {line.count("|") for line in rows.splitlines() if line.startswith("|")}
    assert len(lengths) == 1


def test_the_committed_page_has_its_places():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert text.index(kernel_report.END) < text.index(gpu_table.BEGIN) < text.index(gpu_table.END)


def test_commands_and_their_messages(capsys, monkeypatch, tmp_path):
    assert check_gpu.operators() == sorted(OPERATORS)
    assert set(gpu_table.SEVEN) <= set(OPERATORS)
    monkeypatch.setattr(aot_gpu, "missing", lambda: "nvidia.cu13.nvvm")
    assert check_gpu.main([]) == 3
    assert "nvidia.cu13.nvvm is not installed, so NO KERNEL" in capsys.readouterr().err
    monkeypatch.setattr(aot_gpu, "missing", lambda: None)
    assert check_gpu.main(["selectiv_scan"]) == 2
    assert "there is no operator selectiv_scan" in capsys.readouterr().out
    assert gpu_report.main(["selectiv_scan"]) == 2
    for command, arguments in ((check_gpu, ["--devices", "a100"]), (gpu_report, ["--only", "a"])):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert f"{arguments[1]} is none of" in capsys.readouterr().err
    for command in (check_gpu, gpu_report):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        assert "examples:" in capsys.readouterr().out


def test_the_target_is_hopper_as_jax_and_the_operators_name_it():
    for device in aot_gpu.DEVICES.values():
        assert gpu.refuses_device(device["name"]) is None
        text = aot_gpu._TARGET.format(**device)
        assert text.count("{") == text.count("}") and "ACCELERATED_FEATURES" in text


# gpu_report: an operator as the seven are, whose kernel the interpreter runs in a moment.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _doubled(x, config):
    return copying(x, name="toy_forward", config=config)


_doubled.defvjp(
    lambda x, config: (_doubled(x, config), None),
    lambda config, _, dy: (copying(dy, name="toy_backward", config=config),),
)


def toy(x, *, implementation=None, config=None):
    if implementation == "pallas_gpu":
        return _doubled(x, config)
    return 2 * x


toy.axes = axes("b t e -> b t e", independent="b")
TOY = ArgSpec(name="small", sizes=dict(b=4, e=128), draw=lambda n, s, rng: rng.normal(size=s))
DRY = numerics.How(seed=3, dry=True)


@pytest.fixture
def one_operator(monkeypatch):
    form = types.SimpleNamespace(PallasGpuConfig=gpu.GpuConfig, run=toy)
    monkeypatch.setattr(toy, "forms", dict(pallas_gpu=form), raising=False)
    monkeypatch.setattr(
        toy,
        "cost",
        lambda b, t, e, *, itemsize=4, backward=False: Cost(bytes=2 * itemsize * b * t * e),
        raising=False,
    )
    monkeypatch.setattr(numerics, "small_specs", lambda op: [TOY])
    monkeypatch.setattr(times, "small_specs", lambda op: [TOY])
    return toy


def test_a_dry_run_of_one_operator(one_operator):
    *_, found = numerics.check(one_operator, DRY)
    assert found.status == "ok" and found.error == 0 and found.allowed == 1e-5
    rows = [told for told in times.measure(one_operator, DRY) if isinstance(told, Result)]
    assert [(r.part, r.what) for r in rows] == [
        ("forward", "pallas_gpu"),
        ("forward", "xla"),
        ("forward + backward", "xla"),
    ]
    assert all(r.seconds and r.tokens == 16 for r in rows)
    assert rows[0].bytes == 2 * 2 * 16 * 128 and rows[2].bytes == 2 * rows[0].bytes
    assert rows[0].matrix == 1


def test_an_operator_that_is_wrong_or_refuses_is_told(one_operator):
    def refusing(x, *, implementation=None, config=None):
        if implementation == "pallas_gpu":
            raise NotImplementedError("toy: refused: x is narrow")
        return 2 * x

    def wrong(x, *, implementation=None, config=None):
        return 2.001 * x if implementation == "pallas_gpu" else 2 * x

    def broken(x, *, implementation=None, config=None):
        return x[:, :, None] if implementation == "pallas_gpu" else 2 * x

    for run, status in (
        (refusing, "refused: toy: refused: x is narrow"),
        (wrong, "WRONG: grad.x: rms 5.0e-04 (allowed 5.0e-05)"),
        (broken, "CRASHED: ValueError: "),
    ):
        for name in ("axes", "forms", "cost"):
            setattr(run, name, getattr(toy, name))
        run.__module__ = toy.__module__
        found = [x for x in numerics.check(run, DRY) if isinstance(x, Result)]
        assert found[0].status.startswith(status)
        assert len(found) == (2 if run is refusing else 1)  # bfloat16 is tried too


@pytest.mark.parametrize(
    "given, told", [(None, None), ("cuda", "cuda,cpu"), ("cpu,cuda", "cpu,cuda"), ("", "")]
)
def test_processes_have_a_cpu_for_float64(monkeypatch, given, told):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if given is not None:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    report = gpu_report.Report(gpu_report.parser().parse_args([]), [])
    assert report._environment("numerics").get("JAX_PLATFORMS") == told


def test_a_second_run_has_the_same_bits_or_a_librarys_digits(one_operator, monkeypatch):
    got, near = {"y": np.ones(4, np.float32)}, {"y": np.full(4, 1 + 1e-6, np.float32)}
    differ = lambda again: numerics._differ(one_operator, got, again, got, "float32")
    assert differ(got) is None and differ(near) == "differs in y"
    library = types.SimpleNamespace(library="cuDNN")
    monkeypatch.setattr(one_operator, "forms", dict(pallas_gpu=library))
    assert differ(near) is None
    assert differ({"y": np.full(4, np.nan, np.float32)}).startswith("is wrong: ")


def test_long_calls_have_the_numbers_that_were_drawn_again_and_again(one_operator):
    spec = dataclasses.replace(TOY, sizes={**TOY.sizes, "t": 1100})
    sets, dys = times.argument_sets(one_operator, spec, "bfloat16", numerics.How(3, dry=False))
    assert len(sets) == len(dys) >= 2 and sets[1][0].shape == dys[1].shape == (4, 1100, 128)
    (x,), (turned,) = (np.asarray(x, np.float32) for x in sets[:2])
    np.testing.assert_array_equal(x[:, 512:1024], x[:, :512])
    np.testing.assert_array_equal(turned[:, 7:], x[:, :-7])


def test_candidates_take_turns_over_sets_and_one_that_fails_is_alone():
    calls = []

    def failing(x):
        raise ValueError("no room")

    found = bench.take_turns_over_sets(
        {"good": lambda x: x + 1, "bad": failing},
        [(jnp.ones(8),), (jnp.zeros(8),)],
        rounds=3,
        least=1e-6,
    )
    assert len(found["good"].seconds) == 3 and found["good"].median > 0
    assert isinstance(found["bad"], ValueError) and not calls


def test_the_associative_scan_is_selective_scan():
    op = OPERATORS["selective_scan"]
    spec = next(s for s in times.kernel_check.specs_of(op, primary=True))
    rng = np.random.default_rng(0)
    shapes_of = dict(u="bte", delta="bte", A="en", B="btn", C="btn", D="e", z="bte", delta_bias="e")
    sizes = dict(b=2, t=16, e=6, n=4)
    given = {
        k: jnp.asarray(spec.draw(k, tuple(sizes[x] for x in letters), rng), jnp.float32)
        for k, letters in shapes_of.items()
    }
    want, _ = op(**given, **spec.options, implementation="xla")
    got = times.associative_scan(spec, *given.values())
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_peers_that_are_missing_are_red_cells(tmp_path):
    rows = [r for r in peers.measure("taylor_attention", 1, True, tmp_path) if type(r) is Result]
    assert len(rows) == 6 and all(r.bad and r.status.startswith("missing: ") for r in rows)
    assert {r.what for r in rows} == {"fla parallel_based", "fla fused_chunk_based"}
    numbers = shapes.agreed(shapes.PEERS["gated_delta_rule"], 5)
    assert {k: x.shape for k, x in numbers.items()}["beta"] == (2, 512, 4)
    for x in numbers.values():  # the same bits on both sides
        np.testing.assert_array_equal(x, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))


RATES = [
    Result("rates", "copy", dtype="float32", seconds=1.0, rate=4e12),
    Result("rates", "matrix product", dtype="bfloat16", seconds=1.0, rate=8e14),
    Result("rates", "exponentials", dtype="float32", seconds=1.0, rate=4e12),
]
TIMED = Result(
    *("times", "selective_scan", "b8_l2048_d2048_n16", "bfloat16", "forward", "pallas_gpu"),
    seconds=3e-4,
    bytes=4e8,
    flops=1e12,
    transcendentals=8e8,
    matrix=0,
    tokens=2048,
)


def test_floors_figures_and_the_page_of_a_report(tmp_path):
    known = page.rates(RATES)
    assert page.floor(TIMED, known) == page.Floor(2e-4, "exponentials")
    assert page.floor(TIMED._replace(matrix=1), known) == page.Floor(1e12 / 8e14, "operations")
    rows = [
        *RATES,
        TIMED,
        TIMED._replace(what="xla", seconds=6e-4),
        TIMED._replace(what="associative_scan", seconds=1.5e-3),
        Result("numerics", "toy", "real", "bfloat16", "y", "pallas_gpu", error=1e-3, allowed=1e-2),
        Result("numerics", "other", status="CRASHED: no | memory"),
        Result(
            "peers", "gla", "B4_T2048_H16_D128", "bfloat16", page.BOTH, "fla chunk_gla"
        )._replace(status="missing: no torch"),
    ]
    page.write(tmp_path, "nvidia-h200", rows, "# head")
    assert result.read(tmp_path / "nvidia-h200.csv") == rows
    text = (tmp_path / "nvidia-h200.md").read_text()
    assert "| every kernel right on the device | 1 of 2 | **missed** |" in text
    assert "at most 1.6x its floor | 67% of it | reached |" in text
    assert "10x associative_scan | 5.00x | **missed** |" in text
    assert "1.0x fla chunk_gla | not measured |" in text
    assert "| 300.0 us | 200.0 us (exponentials) | 67% | 600.0 us | 2.00x | 1,500.0 us |" in text
    assert "**CRASHED: no / memory**" in text and "**missing: no torch**" in text
    assert (tmp_path / "nvidia-h200-by-xla.svg").read_text().count("<rect") == 2
    assert "&lt;x&gt;" in bars.svg("t", [("<x>", 0.5)], 1.0)


def test_processes_that_share_the_numerics_of_an_operator(one_operator, monkeypatch):
    """Each case is one process's."""
    monkeypatch.setattr(numerics.kernel_check, "specs_of", lambda *args, **how: [])
    monkeypatch.setattr(numerics, "_one", lambda op, spec, length, dtype, given, how, wide: dtype)
    asked = lambda part, parts: [*numerics.check(one_operator, numerics.How(3, False, part, parts))]
    whole = asked(0, 1)
    assert whole[1::2] == ["float32", "bfloat16"]
    assert [*asked(0, 3), *asked(1, 3), *asked(2, 3)] == whole
    monkeypatch.setattr(work, "PARTS", dict(slow=2))
    names = work.names_of("numerics", ["gla", "slow"])
    assert names == ["slow/0", "slow/1", "gla"]
    assert [*map(work.operator_of, names)] == ["slow", "slow", "gla"]
    assert work.names_of("numerics", ["gla", "slow"], whole=True) == ["gla", "slow"]


def test_a_process_that_breaks_or_hangs_costs_its_rows_alone(tmp_path, monkeypatch, capsys):
    args = gpu_report.parser().parse_args(["--dry-run", "--output", str(tmp_path)])
    report = gpu_report.Report(args, ["gla"])
    report.folder, report.name = tmp_path, "toy"
    began = time.perf_counter()
    report._process("numerics", "gla", 0.2, report._add)
    assert time.perf_counter() - began < 5
    report._process("numerics", "no_such_operator", 600, report._add)
    args.seconds = 0
    report._phase("times", ("times", "ours"))
    late, broken, skipped = report.rows
    assert late.status == "TOO LONG: 0 s were over (at its start)"
    assert broken.status.startswith("CRASHED: KeyError: 'no_such_operator'")
    assert skipped.status == "skipped: no time was left"
    assert "TOO LONG" in (tmp_path / "toy.md").read_text()
    assert "skipped" in capsys.readouterr().out


def test_what_a_part_of_a_report_does_not_measure_stays(tmp_path):
    model = Result(
        *("models", "mamba_130m", "8 x 2048", "bfloat16", "train step", "kernels"),
        seconds=0.1,
        tokens=16_384,
        flops=1.2e13,
    )
    other = TIMED._replace(operator="gla")
    page.write(tmp_path, "toy", [*RATES, TIMED, other, model], "# head")
    text = (tmp_path / "toy.md").read_text()
    assert "| mamba_130m | 8 x 2048 | kernels | 163,840 | 15.0% | 100,000.0 us |" in text
    where = ["--output", str(tmp_path)]
    for arguments, kept in (
        (["selective_scan", "--only", "times"], [*RATES, other, model]),
        (["--only", "rates,models"], [TIMED, other]),
        ([], []),
    ):
        args = gpu_report.parser().parse_args([*where, *arguments])
        report = gpu_report.Report(args, args.names or sorted(OPERATORS))
        report.name = "toy"
        report._keep(args.only or gpu_report.USUAL)
        assert report.rows == kept
    assert set(work.MODELS) == set(gpu_models.MODELS)


def test_where_there_is_no_gpu_nothing_is_run(capsys):
    assert gpu_report.main(["gla"]) == 3
    assert "NOTHING WAS RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_the_command(tmp_path, capsys):
    where = ["--dry-run", "--output", str(tmp_path)]
    assert gpu_report.main([*where, "selective_scan", "--only", "numerics,rates,times"]) == 0
    said = capsys.readouterr().out
    assert "0 red" in said and "allowed 1.0e-05" in said
    assert "selective_scan bare" in (tmp_path / "dry-run.md").read_text()
