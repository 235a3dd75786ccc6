"""The committed table: what breaks it, what is written, and the command's own errors."""

import dataclasses
import types

import pytest

from pallas_kernels import OPERATORS, check_tpu
from pallas_kernels.core import (
    aot,
    kernel_check,
    kernel_command,
    kernel_report,
    kernel_table,
    schedule,
)
from pallas_kernels.core.kernel_table import FORWARD_ONLY, Row, merged, regressions

ROW = Row(
    stack="jax 1, libtpu 2",
    operator="toy",
    call="real",
    dtype="bfloat16",
    device="v5e",
    part="backward",
    status="compiled",
    kernels="toy_backward",
    vmem=4 * 2**20,
    limit=16 * 2**20,
    raised=0,
    bytes=120 * 2**20,
    around=20 * 2**20,
    minimum=100 * 2**20,
    saved=0,
    temp=8 * 2**20,
    peak=30 * 2**20,
    bundles=1000,
    fills=40,
    spills=20,
    inner=0,
    seconds=1.5,
)


@pytest.mark.parametrize(
    "field, better, worse",
    [
        ("vmem", 3 * 2**20, 5 * 2**20),
        ("bytes", 121 * 2**20, 124 * 2**20),
        ("temp", 9 * 2**20, 10 * 2**20),
        ("spills", 25, 30),
        ("fills", 50, 51),
        ("inner", 0, 1),
        ("bundles", 1200, 1500),
    ],
)
def test_what_got_worse_is_told(field, better, worse):
    assert regressions([ROW], [ROW._replace(**{field: better})]) == []
    (text,) = regressions([ROW], [ROW._replace(**{field: worse})])
    assert f"{field} {getattr(ROW, field):,} -> {worse:,}" in text
    assert "toy real backward on v5e" in text


@pytest.mark.parametrize("field", ["vmem", "bytes", "temp", "spills", "fills", "inner", "bundles"])
def test_a_figure_that_is_no_longer_told_got_worse(field):
    (text,) = regressions([ROW], [ROW._replace(**{field: None})])
    assert text.endswith(f"{field} {getattr(ROW, field):,} -> not told")
    assert regressions([ROW._replace(**{field: None})], [ROW]) == []
    # The portable form is no part of the quick check.
    assert regressions([ROW._replace(xla_temp=1, xla_peak=1)], [ROW]) == []


def test_a_backward_pass_that_is_xlas():
    ahead = ROW._replace(part="documents, state", status=FORWARD_ONLY)
    whole = ahead._replace(status="compiled", vmem=8 * 2**20, bundles=2000)
    assert not kernel_table.failed(ahead) and regressions([ahead], [ahead]) == []
    assert regressions([ahead], [whole]) == []  # another kernel more: figures of other programs
    (text,) = regressions([whole], [ahead])
    assert "compiled before, now compiled; backward is xla's" in text
    (text,) = regressions([ahead], [ahead._replace(status="refused: no room")])
    assert "compiled; backward is xla's before, now refused: no room" in text
    (text,) = regressions([ahead], [ahead._replace(bundles=2000)])
    assert "bundles 1,000 -> 2,000" in text
    (text,) = kernel_report.beside_the_goals([ahead])
    assert text.endswith("documents, state on v5e: compiled; backward is xla's")
    assert "VMEM 4.00 MiB" in kernel_report.line(ahead)
    assert kernel_report.line(ahead).endswith("compiled; backward is xla's  1.5 s")
    cells = "| toy real | documents, state; backward is xla's | v5e | 4.00 MiB | 25% |"
    assert cells in kernel_report.markdown([ahead])


@pytest.mark.parametrize(
    "part, names, status",
    [
        ("documents, state", "toy_forward toy_backward", "compiled"),
        ("documents, state", "toy_forward toy_gradients", "compiled"),
        ("documents", "toy_states toy_states_back", "compiled"),
        ("documents", "splash_mha_fwd splash_mha_dkv_no_residuals", "compiled"),
        ("documents, state", "toy_forward", FORWARD_ONLY),
        ("documents", "toy_states toy_lagsome", FORWARD_ONLY),
        ("backward", "toy_forward", FORWARD_ONLY),
        ("backward", "toy_forward toy_backward", "compiled"),
        ("forward", "toy_forward", "compiled"),
    ],
)
def test_a_program_without_a_kernel_backward_says_so(part, names, status):
    codes = tuple(schedule.Code(name, 2**20, None, 1, 2, 3, 4) for name in names.split())
    found = aot.Compiled(codes, vmem=0, temp=0, peak=0, around=0.0, seconds=0.1, text="")
    target = dataclasses.replace(kernel_check.TPU, compile=lambda *a, **more: found)
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    bare = Row(*ROW[:5], part)
    _, (row,) = kernel_check._compiled(target, device, bare, None, (), dumps=None)
    told = "toy_backward" if part == "backward" and status == "compiled" else names
    assert (row.status, row.kernels, row.vmem) == (status, told, 2**20)


def test_one_that_no_longer_compiles_and_one_without_a_row():
    broken = ROW._replace(status="XlaRuntimeError: vmem")
    (text,) = regressions([ROW], [broken])
    assert "compiled before, now XlaRuntimeError: vmem" in text
    (text,) = regressions([broken], [broken])  # a table may not hold what fails
    refused = ROW._replace(status="refused: no room")
    assert regressions([refused], [refused]) == []
    (text,) = regressions([ROW], [refused])
    assert "compiled before, now refused: no room" in text
    (text,) = regressions([ROW], [ROW._replace(call="new")])
    assert "the table has no row of it" in text


def test_a_kernel_that_is_called_no_more():
    two = ROW._replace(kernels="toy_backward toy_sums")
    assert regressions([ROW], [two]) == []
    (text,) = regressions([two], [ROW])
    assert text == "toy real backward on v5e: toy_sums is called no more"


def test_rows_that_vanish_are_told(tmp_path, monkeypatch, capsys):
    """Those that the command was to measure, and no others."""
    packed = ROW._replace(part="documents, state")
    there = [ROW, ROW._replace(part="forward"), ROW._replace(device="tpu7x"), packed]
    others = [
        packed._replace(device="tpu7x"),  # of --full
        ROW._replace(call="long"),
        ROW._replace(device="v6e"),
        ROW._replace(stack="jax 9, libtpu 9"),
    ]
    table = tmp_path / "kernels.csv"
    kernel_table.write(table, [*there, *others])

    def told(found, *arguments):
        monkeypatch.setattr(kernel_command, "_check", lambda command, name, args: found)
        monkeypatch.setattr(kernel_command, "operators", lambda command: ["toy", "other"])
        given = [*arguments, "--check", "--table", str(table)]
        args = kernel_command.parser(check_tpu.COMMAND).parse_args(given)
        code = kernel_command.run(check_tpu.COMMAND, args)
        texts = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WRONG: ")]
        assert code == bool(texts)
        return [text.removeprefix("WRONG: ").split(": ")[0] for text in texts]

    assert told(there, "toy") == []
    for i, row in enumerate(there):
        assert told([*there[:i], *there[i + 1 :]], "toy") == [row.name]
    here = [*there, *others[:3]]
    assert told(here, "toy", "--full") == []
    assert set(told(there, "toy", "--full")) == {row.name for row in others[:3]}
    assert told([packed], "toy", "--devices", "v5e") == [ROW.name, there[1].name]
    # Another operator's rows, none at all, and a process that broke and said so.
    other = [ROW._replace(operator="other")]
    assert told(other, "other")[0] == "other real backward on v5e"
    assert len(told([], "toy")) == len(there) + 1  # a row of the other stack
    broke = ROW._replace(stack="", call="-", status="the process ended with 1")
    assert told([broke], "toy") == [broke.name]


def test_another_stack_is_not_compared():
    other = ROW._replace(stack="jax 9, libtpu 9", vmem=2**30)
    assert regressions([ROW], [other]) == []
    assert regressions([ROW], [other._replace(status="refused: no")]) == []
    (text,) = regressions([ROW], [other._replace(status="ValueError: no")])
    assert "ValueError: no" in text
    text = kernel_table.unknown_stack([ROW], [other])
    assert text == "the table has no rows of stack jax 9, libtpu 9; nothing was compared"
    # A stack counts as a whole, and a process that broke has none.
    assert kernel_table.unknown_stack([ROW], [ROW._replace(operator="new")]) is None
    assert kernel_table.unknown_stack([ROW], [ROW._replace(stack="")]) is None
    assert kernel_table.compared([ROW], [ROW, other]) == 1


def test_a_check_of_an_unknown_stack_fails(tmp_path, monkeypatch, capsys):
    table = tmp_path / "kernels.csv"
    monkeypatch.setattr(kernel_command, "_check", lambda command, name, args: [ROW])
    check = lambda: kernel_command.run(
        check_tpu.COMMAND,
        kernel_command.parser(check_tpu.COMMAND).parse_args(
            ["gla", "--check", "--table", str(table)]
        ),
    )
    kernel_table.write(table, [ROW])
    assert check() == 0
    assert f"1 of 1 programs compiled, 1 rows compared with {table}, 0 wrong" in (
        capsys.readouterr().out
    )
    kernel_table.write(table, [ROW._replace(stack="jax 9, libtpu 9")])
    assert check() == 1
    said = capsys.readouterr().out
    assert (
        "WRONG: the table has no rows of stack jax 1, libtpu 2; nothing was compared (run make "
        in (said)
    )
    assert "check-tpu-table)" in said and "0 rows compared" in said


def test_the_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "kernels.csv"
    bare = ROW._replace(part="documents", bytes=None, minimum=None, status="refused: a, b")
    kernel_table.write(path, [bare, ROW])
    assert kernel_table.read(path) == [ROW._replace(seconds=None), bare._replace(seconds=None)]
    assert kernel_table.read(tmp_path / "none.csv") == []


def test_new_rows_take_the_place_of_old_ones():
    gone, other = ROW._replace(call="gone"), ROW._replace(operator="other")
    new = ROW._replace(vmem=1)
    assert merged([ROW, gone, other], [new], whole=False) == [gone, other, new]
    assert merged([ROW, gone, other], [new], whole=True) == [other, new]


def test_the_page_keeps_its_prose(tmp_path):
    path = tmp_path / "kernels.md"
    path.write_text(f"before\n{kernel_report.BEGIN}\nold\n{kernel_report.END}\nafter\n")
    kernel_report.write(path, [ROW, ROW._replace(device="v6e", status="refused: a|b")])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = "| toy real | backward | v5e | 4.00 MiB | 25% | 1.20 | 120 MiB |"
    assert row in text and "refused: a/b" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert [len({line.count("|") for line in table}) for table in tables] == [1, 1]
    with pytest.raises(ValueError, match="lacks the lines"):
        (tmp_path / "bare.md").write_text("prose")
        kernel_report.write(tmp_path / "bare.md", [ROW])


def test_goals_that_are_missed_are_told():
    assert kernel_report.beside_the_goals([ROW]) == []
    no = ROW._replace(status="refused: no room")
    assert kernel_report.beside_the_goals([no])[0].endswith("refused: no room")
    far = ROW._replace(bytes=140 * 2**20, vmem=13 * 2**20, inner=3)
    assert [text.split(": ")[1] for text in kernel_report.beside_the_goals([far])] == [
        "1.40x the least bytes (at most 1.3)",
        "81% of the vector memory (at most 75%)",
        "3 spills in inner loops",
    ]


def test_the_command_knows_the_operators_without_jax():
    assert check_tpu.operators() == sorted(OPERATORS)


def test_bad_arguments(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        check_tpu.main(["--devices", "v5e,v9"])
    assert "v9 is none of v5e, v5p, v6e, tpu7x" in capsys.readouterr().err
    monkeypatch.setattr(check_tpu.importlib.util, "find_spec", lambda name: None)
    assert check_tpu.main([]) == 3
    assert "NO KERNEL WAS COMPILED" in capsys.readouterr().err
    monkeypatch.setattr(check_tpu.importlib.util, "find_spec", lambda name: name)
    assert check_tpu.main(["selectiv_scan"]) == 2
    assert "there is no operator selectiv_scan" in capsys.readouterr().out


def test_the_summary_has_the_worst_of_each_operator():
    worse = ROW._replace(call="other", bytes=3 * ROW.minimum, inner=7)
    wide = ROW._replace(dtype="float32", inner=90)
    text = kernel_report.summary(
        [ROW, worse, wide, ROW._replace(status="refused: no room", vmem=None)]
    )
    assert text.splitlines()[2] == f"| toy | 3.00 | {ROW.vmem / ROW.limit:.0%} | 7, 90 |  |"
