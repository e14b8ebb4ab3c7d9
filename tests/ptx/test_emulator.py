"""The emulator against what the PTX ISA says, in kernels of a few lines; expected numbers are written out."""

import struct

import emulator
import numpy as np
import pytest
import torch
from memory import GlobalMemory, MemoryFault
from parser import parse

HEADER = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 scratch[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<19>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mul.wide.u32 %rd2, %r2, 1;
    add.s64 %rd3, %rd1, %rd2;
"""
STORE = "    st.global.b32 [%rd3], %r9;\n"
END = "    ret;\n}\n"


def execute(code, store=True, out=None, argument=0, **limits):
    """Runs the lines on 64 threads; thread i stores register %r9 to out[i]."""
    out = torch.zeros(64, dtype=torch.int32) if out is None else out
    memory = GlobalMemory()
    ptx = HEADER + code + (STORE if store else "") + END
    emulator.run(ptx, memory, [memory.address(out), argument], (1,), **limits)
    return out, memory


def result(code, dtype=np.uint32, **given):
    return execute(code, **given)[0].numpy().view(dtype)


def f32(number):
    return "0f" + struct.pack(">f", number).hex().upper()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r9, -5, 3;", -2),
        ("add.s32 %r9, 2147483647, 1;", -(2**31)),
        ("sub.s32 %r9, 3, 5;", -2),
        ("mul.lo.s32 %r9, 65536, 65537;", 65536),
        ("mul.hi.s32 %r9, 65536, -65536;", -1),
        ("mad.lo.s32 %r9, 3, 5, -1;", 14),
        ("max.s32 %r9, -1, 1;", 1),
        ("min.s32 %r9, -1, 1;", -1),
        ("div.s32 %r9, -7, 2;", -3),  # towards zero
        ("shr.s32 %r9, -8, 1;", -4),
        ("shr.s32 %r9, -8, 40;", -1),
        ("shr.u32 %r9, -8, 28;", 15),
        ("shr.u32 %r9, -8, 32;", 0),
        ("shl.b32 %r9, 3, 31;", -(2**31)),
        ("shl.b32 %r9, 3, 32;", 0),
        ("and.b32 %r9, 12, 10;", 8),
        ("or.b32 %r9, 12, 10;", 14),
        ("xor.b32 %r9, 12, 10;", 6),
        ("not.b32 %r9, 0;", -1),
        ("bfe.u32 %r9, 0xABCD, 4, 8;", 0xBC),
        ("bfe.u32 %r9, -1, 4, 32;", 0x0FFFFFFF),
        ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x5140U;", 0x55114400),
        ("popc.b32 %r9, 0xF0F;", 8),
        ("mov.b32 %r3, 0x00020001; mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r9, {%rs2, %rs1};", 0x00010002),
        ("mov.u16 %rs1, 0xFFFF; cvt.u32.u16 %r9, %rs1;", 0xFFFF),
        ("mov.u32 %r3, -1; cvt.s64.s32 %rd4, %r3; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r9, %rd4;", -1),
        ("mov.u32 %r3, -1; cvt.u64.u32 %rd4, %r3; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r9, %rd4;", 0),
        ("mul.wide.s32 %rd4, -3, 65536; cvt.u32.u64 %r9, %rd4;", -3 * 65536),
        ("mad.wide.s32 %rd4, -3, 4, 20; cvt.u32.u64 %r9, %rd4;", 8),
        ("setp.lt.s32 %p1, -1, 1; selp.b32 %r9, 7, 9, %p1;", 7),
        ("setp.lt.u32 %p1, -1, 1; selp.b32 %r9, 7, 9, %p1;", 9),
        ("setp.hs.u32 %p1, -1, 1; selp.b32 %r9, 7, 9, %p1;", 7),
        ("setp.eq.s32 %p1, 1, 1; setp.eq.s32 %p2, 1, 2; and.pred %p3, %p1, %p2; selp.b32 %r9, 7, 9, %p3;", 9),
        ("setp.eq.s32 %p1, 1, 2; mov.u32 %r9, 4; @%p1 mov.u32 %r9, 5; @!%p1 add.s32 %r9, %r9, 2;", 6),
    ],
)
def test_integers_are_those_of_the_isa(code, expected):
    assert (result(code, np.int32) == np.int32(np.uint32(expected & 0xFFFFFFFF))).all()


NAN = f32(float("nan"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (f"add.f32 %r9, {f32(0.5)}, {f32(0.25)};", 0.75),
        (f"sub.rn.f32 %r9, {f32(0.5)}, {f32(0.75)};", -0.25),
        (f"mul.f32 %r9, {f32(3)}, {f32(-0.5)};", -1.5),
        (f"div.full.f32 %r9, {f32(1)}, {f32(-4)};", -0.25),
        (f"neg.f32 %r9, {f32(2)};", -2.0),
        (f"abs.f32 %r9, {f32(-2)};", 2.0),
        (f"max.f32 %r9, {NAN}, {f32(-2)};", -2.0),  # the operand that is a number
        (f"min.f32 %r9, {f32(-2)}, {f32(3)};", -2.0),
        # (1 + 2^-12)^2 - 1 in one rounding; the product alone would lose 2^-24
        (f"fma.rn.f32 %r9, {f32(1 + 2**-12)}, {f32(1 + 2**-12)}, {f32(-1)};", 2**-11 + 2**-24),
        ("mov.u32 %r3, -3; cvt.rn.f32.s32 %r9, %r3;", -3.0),
        ("mov.u32 %r3, -1; cvt.rn.f32.u32 %r9, %r3;", 2.0**32),
        ("mov.u16 %rs1, 0x3FC0; cvt.f32.bf16 %r9, %rs1;", 1.5),
        ("mov.u16 %rs1, 0x3E00; cvt.f32.f16 %r9, %rs1;", 1.5),
        (f"mov.u16 %rs1, 0x3FC0; sub.rn.f32.bf16 %r9, %rs1, {f32(2)};", -0.5),
        ("mov.b64 %rd4, 0x3FF8000000000000; cvt.rn.f32.f64 %r9, %rd4;", 1.5),
        (f"setp.lt.f32 %p1, {NAN}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;", 2.0),
        (f"setp.ltu.f32 %p1, {NAN}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;", 1.0),
        (f"setp.ne.f32 %p1, {NAN}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;", 2.0),
        (f"setp.neu.f32 %p1, {NAN}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;", 1.0),
        (f"setp.nan.f32 %p1, {NAN}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;", 1.0),
    ],
)
def test_floats_are_those_of_the_isa(code, expected):
    assert (result(code, np.float32) == np.float32(expected)).all()


def test_a_nan_that_comes_out_has_the_bits_of_a_gpu():
    assert (result("add.f32 %r9, 0fFFC00001, 0f3F800000;") == 0x7FFFFFFF).all()


def test_packed_floats_are_two_results():
    code = f"""
    mov.b32 %r3, {f32(1)}; mov.b32 %r4, {f32(2)}; mov.b64 %rd4, {{%r3, %r4}};
    mov.b32 %r5, {f32(10)}; mov.b64 %rd5, {{%r5, %r5}};
    fma.rn.f32x2 %rd6, %rd4, %rd5, %rd4; mov.b64 {{%r6, %r7}}, %rd6; sub.f32 %r9, %r7, %r6;"""
    assert (result(code, np.float32) == 22 - 11).all()


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [
        ("up.b32 %r9, %r1, 2, 0", [0, 1, *range(30)]),
        ("down.b32 %r9, %r1, 3, 31", [*range(3, 32), 29, 30, 31]),
        ("bfly.b32 %r9, %r1, 1, 31", [lane ^ 1 for lane in range(32)]),
        ("idx.b32 %r9, %r1, 5, 31", [5] * 32),
        # segments of 16 lanes: the upper byte of the clamp is the mask of the segment
        ("down.b32 %r9, %r1, 15, 4127", [15, *range(1, 16), 31, *range(17, 32)]),
    ],
)
def test_shuffles_move_lanes_within_their_warp(shuffle, expected):
    warp = np.array(expected)
    assert result(f"shfl.sync.{shuffle}, -1;").tolist() == [*warp, *(warp + 32)]


def test_a_shuffle_says_which_lanes_had_a_source():
    code = "shfl.sync.up.b32 %r3|%p1, %r1, 4, 0, -1; selp.b32 %r9, 1, 0, %p1;"
    assert result(code).tolist() == ([0] * 4 + [1] * 28) * 2


def test_a_reduction_adds_up_each_warp():
    assert result("mov.u32 %r3, -1; redux.sync.add.s32 %r9, %r1, %r3;").tolist() == [496] * 32 + [1520] * 32


def test_a_loop_runs_as_often_as_its_counter_says():
    code = """
    mov.u32 %r9, 0; ld.param.b32 %r3, [kernel_param_1];
$L__loop:
    add.s32 %r9, %r9, %r1; sub.s32 %r3, %r3, 1; setp.gt.s32 %p1, %r3, 0;
    @%p1 bra $L__loop;"""
    assert result(code, argument=5).tolist() == [5 * thread for thread in range(64)]


def test_a_block_knows_its_place_in_the_grid():
    out, memory = torch.zeros(6, dtype=torch.int32), GlobalMemory()
    code = """
    mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mad.lo.s32 %r5, %r3, 3, %r4; mul.wide.s32 %rd4, %r5, 4;
    add.s64 %rd5, %rd1, %rd4; add.s32 %r9, %r5, 100; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd5], %r9;"""
    emulator.run(HEADER + code + END, memory, [memory.address(out), 0], (2, 3))
    assert out.tolist() == [100, 101, 102, 103, 104, 105]


def test_vectors_are_loaded_and_stored_and_every_byte_is_counted():
    out = torch.arange(256, dtype=torch.int32)
    code = """
    shl.b32 %r3, %r1, 4; cvt.u64.u32 %rd4, %r3; add.s64 %rd5, %rd1, %rd4; setp.lt.s32 %p1, %r1, 32;
    @%p1 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5]; @%p1 st.global.v2.b32 [%rd5+8], {%r5, %r4};"""
    _, memory = execute(code, store=False, out=out)
    assert out[:8].tolist() == [0, 1, 1, 0, 4, 5, 5, 4] and out[128:].tolist() == list(range(128, 256))
    reads, writes = (memory.counts(out, kind)[:, 0].tolist() for kind in ("reads", "writes"))
    assert reads == [1] * 128 + [0] * 128 and writes == [0, 0, 1, 1] * 32 + [0] * 128
    assert memory.sectors == {"load": 16, "store": 16}  # 512 bytes, in sectors of 32


def test_views_of_one_tensor_share_its_memory():
    whole, memory = torch.zeros(10, 8), GlobalMemory()
    part = whole[2:, 1:]
    assert memory.address(part) - memory.address(whole) == (2 * 8 + 1) * 4
    assert memory.counts(part, "reads").shape == (8, 7, 4)
    assert memory.address(torch.zeros(3)) % 256 == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.b32 %r9, [%rd3+4];", "outside its tensor"),
        ("ld.global.b32 %r9, [%rd3+-4];", "outside its tensor"),
        ("ld.global.b32 %r9, [%rd3+2];", "not aligned to 4"),
        ("st.global.b32 [%rd1], %r1;", "lanes store different numbers"),
        ("mov.u32 %r3, scratch; st.shared.b32 [%r3+65536], %r1;", "outside shared memory"),
        ("mov.u32 %r3, scratch; ld.shared.b32 %r9, [%r3];", "nobody wrote"),
        ("mov.u32 %r3, scratch; st.shared.b32 [%r3], %r1;", "lanes store different numbers to one shared address"),
    ],
)
def test_a_wrong_access_is_a_fault(code, message):
    with pytest.raises(MemoryFault, match=message):
        execute(code)


EXCHANGE = """
    mov.u32 %r3, scratch; add.s32 %r4, %r3, %r2; st.shared.b32 [%r4], %r1;
    {barrier}
    xor.b32 %r5, %r2, 128; add.s32 %r6, %r3, %r5; ld.shared.b32 %r9, [%r6];"""


def test_a_barrier_lets_warps_exchange_numbers():
    assert result(EXCHANGE.format(barrier="bar.sync 0;")).tolist() == [thread ^ 32 for thread in range(64)]


def test_a_read_without_a_barrier_is_a_race():
    with pytest.raises(MemoryFault, match="read before a barrier"):
        execute(EXCHANGE.format(barrier=""))


def test_a_write_over_what_another_warp_may_still_read_is_a_race():
    with pytest.raises(MemoryFault, match="overwritten before a barrier"):
        execute(EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r4], %r1;")


@pytest.mark.parametrize(
    "code",
    [
        "sin.approx.f32 %r9, %r1;",
        "add.rz.f32 %r9, %r1, %r1;",
        "add.sat.s32 %r9, %r1, %r1;",
        "fma.rn.ftz.f32 %r9, %r1, %r1, %r1;",
        "cvt.rzi.s32.f32 %r9, %r1;",
        "ld.global.nc.b32 %r9, [%rd3];",
        "shfl.sync.bfly.b32 %r9, %r1, 1, 31, 15;",
        "bar.sync 1;",
        "setp.lt.s32 %p1, %r1, 3; @%p1 bra $L__part; mov.u32 %r9, 0; $L__part: mov.u32 %r9, 1;",
        "setp.lt.s32 %p1, %r1, 3; @%p1 ret;",
        "setp.lt.s32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;",
    ],
)
def test_what_is_not_known_raises(code):
    with pytest.raises(NotImplementedError):
        execute(code)


def test_a_program_that_does_not_end_is_stopped():
    with pytest.raises(emulator.Runaway):
        execute("$L__loop: bra $L__loop;", limit=1000)


def test_an_undefined_register_shows_in_the_result():
    assert np.isnan(result("mov.b32 %r9, %r17;", np.float32)).all()


def test_the_parser_reads_names_types_and_guards():
    program = parse(HEADER + "@!%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd3 + 8 ];" + END)
    assert (program.name, program.target, program.threads) == ("kernel", "sm_90", 64)
    assert program.parameters == (("u64", "kernel_param_0"), ("u32", "kernel_param_1"))
    assert program.registers == {"%p": 0, "%rs": 2, "%r": 4, "%rd": 8} and program.shared == {"scratch": 0}
    load = program.instructions[-2]
    assert (load.name, load.modifiers, load.type) == ("ld", ("global", "v2", "b32"), "b32")
    assert load.operands == ("{ %r3, %r4 }", "[ %rd3 + 8 ]")
    assert (load.guard, load.negated) == ("%p1", True)
