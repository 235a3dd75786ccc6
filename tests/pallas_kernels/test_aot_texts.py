"""What is read from libtpu's texts: compiled programs, tables of use per bundle, listings."""

from pallas_kernels.core import hlo, schedule

PROGRAM = """\
HloModule jit_program, is_scheduled=true, entry_computation_layout={(f32[16,128]{1,0})->f32[16,128]{1,0}}

%fused_computation (param_0: f32[16,128]) -> bf16[16,128] {
  %param_0 = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %convert.0 = bf16[16,128]{1,0:T(8,128)(2,1)} convert(%param_0)
}

%body (carry: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %inside = f32[8,128]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %negated = f32[8,128]{1,0:T(8,128)} negate(%inside)
  ROOT %next = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%inside, %negated)
}

ENTRY %main.1 (x.1: f32[16,128], y.1: f32[64,128]) -> f32[16,128] {
  %x.1 = f32[16,128]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %y.1 = f32[64,128]{1,0:T(8,128)} parameter(1), sharding={replicated}
  %small = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%fused_computation
  %turned = bf16[128,16]{0,1:T(8,128)(2,1)} bitcast(%small)
  %toy_forward.1 = (f32[16,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(1,128)}) custom-call(%turned, %x.1), custom_call_target="tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"52428800"}],"custom_call_config":{"body":"TUzv(= %none"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"835584"},{"memory_space":"2","offset":"0","size":"64"}]}
  %first = f32[16,128]{1,0:T(8,128)} get-tuple-element(%toy_forward.1), index=0
  %part = f32[8,128]{1,0:T(8,128)} slice(%y.1), slice={[0:8], [0:128]}
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%part), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %sum = f32[16,128]{1,0:T(8,128)} all-reduce(%first), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %out = f32[16,128]{1,0:T(8,128)} add(%sum, %first)
}
"""  # noqa: E501


def test_kernels_and_their_vector_memory():
    ((name, line),) = hlo.custom_calls(PROGRAM)
    assert name == "toy_forward.1"
    assert hlo.vmem_bytes(line) == 835_584
    assert hlo.vmem_limit(line) == 50 * 2**20
    assert hlo.vmem_limit(line.replace("52428800", "x")) is None


def test_an_instruction_over_several_lines():
    """As jax's own attention writes them: its block sizes stand in between."""
    told = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, backend_config='
    ((name, line),) = hlo.custom_calls(PROGRAM.replace("backend_config=", told))
    assert name == "toy_forward.1" and hlo.vmem_bytes(line) == 835_584
    assert hlo.passes_bytes(PROGRAM.replace("backend_config=", told)) == hlo.passes_bytes(PROGRAM)


def test_passes_count_operands_and_results_and_loops_as_often_as_they_run():
    """By hand: fusion, slice (as much in as out), 5 turns, the sum over devices, the last sum."""
    block = 16 * 128
    expected = (4 + 2) * block + 4 * (2 * 8 * 128 + 5 * 2 * 8 * 128 + 2 * block + 3 * block)
    assert hlo.passes_bytes(PROGRAM) == expected


def test_collectives_by_kind():
    assert hlo.collectives(PROGRAM) == {"all-reduce": 1}


TABLE = """\
== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 1
0 4 0 4 0 0 1 2 1 1 0
0 4 0 4 0 0 1 1 0 0 0
"""
LISTING = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %v0 = vld [vmem:[#allocation2_spill] sm:$0xff] }
   0x1 LB: > { %p0 = scmp.ge.s32.totalorder %s1, 1 }
   0x2   : > { %v1 = vld [vmem:[#allocation3_spill] sm:$0xff] /* 4-byte Folded Reload */ }
   0x3 LB: > > { %1 = vst [vmem:[#allocation3_spill] sm:$0xff] %v6 ;; %v3 = vld [vmem:[%s1]] }
   0x4   : > > { %v2 = vld [vmem:[#allocation4_spill] sm:$0xff] ;; %s5 = sst [smem:[#allocation5_spill]] }
   0x5   : > { %2 = vst [vmem:[#allocation9] sm:$0xff] %v7 }
"""  # noqa: E501


def test_bundles_fills_and_spills_by_column():
    assert schedule.utilization(TABLE) == (3, 3, 1)


def test_inner_spills_are_those_of_the_deepest_loops_and_of_vector_registers():
    assert schedule.inner_spills(LISTING) == 2
    assert schedule.inner_spills(LISTING.replace("> > {", "> {")) == 3
    assert schedule.inner_spills("") == 0


def test_a_dump_is_found_by_its_instruction(tmp_path):
    for name, text in (("utilization", TABLE), ("bundles", LISTING)):
        what = {
            "utilization": "final_hlo-static-per-bundle-utilization",
            "bundles": "final_bundles",
        }
        (tmp_path / f"17956-toy_forward.1-01-{what[name]}.txt").write_text(text)
        (tmp_path / f"17956-toy_forward.12-01-{what[name]}.txt").write_text("another kernel's")
    code = schedule.read(tmp_path, "toy_forward.1", 835_584)
    assert code == schedule.Code("toy_forward", 835_584, None, 3, 3, 1, 2)
    for instruction in ("other.1", "other.6.ins__u__"):  # the second one as libtpu 0.0.48 names it
        assert schedule.read(tmp_path, instruction, 7) == schedule.Code("other", 7)
    schedule.clear(tmp_path)
    assert not list(tmp_path.iterdir())
